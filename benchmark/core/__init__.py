"""One trial: what it is told, how it is run in a process of its own, and what is measured."""
