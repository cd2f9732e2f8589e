"""Show packed rows as text, with borders, targets and masks: see `--help`."""

import sys

from wrinklefree.cli import inspect_main

if __name__ == "__main__":
    sys.exit(inspect_main())
