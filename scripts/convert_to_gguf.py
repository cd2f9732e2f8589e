"""Write a checkpoint as a GGUF file."""

import sys

from wrinklefree.cli import convert_main

if __name__ == "__main__":
    sys.exit(convert_main())
