"""Train a stage, or all of them: see `--help`."""

import sys

from wrinklefree.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
