"""Filter, deduplicate and tokenize text into memory-mapped shards: see `--help`."""

import sys

from wrinklefree.cli import prepare_main

if __name__ == "__main__":
    sys.exit(prepare_main())
