"""Write a checkpoint as a folder that transformers loads."""

import sys

from wrinklefree.cli import export_main

if __name__ == "__main__":
    sys.exit(export_main())
