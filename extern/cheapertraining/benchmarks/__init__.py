"""Measurements behind the README's figures; run from the library's folder as `python -m benchmarks.<name>`."""
