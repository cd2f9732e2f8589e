"""Settings of the benchmark: two YAML files, and the classes that they are decoded into."""
