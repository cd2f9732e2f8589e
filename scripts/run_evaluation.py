"""Score a checkpoint, or compare two: see `--help`."""

import sys

from wrinklefree.cli import evaluate_main

if __name__ == "__main__":
    sys.exit(evaluate_main())
