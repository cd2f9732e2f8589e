"""Search for efficient settings."""

import sys

from wrinklefree.cli import benchmark_main

if __name__ == "__main__":
    sys.exit(benchmark_main())
