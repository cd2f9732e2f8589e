"""Run stage 3's teacher once and keep its largest logits: see `--help`."""

import sys

from wrinklefree.cli import cache_main

if __name__ == "__main__":
    sys.exit(cache_main())
