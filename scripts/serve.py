"""Serve a GGUF file or a checkpoint folder over HTTP."""

import sys

from wrinklefree.cli import serve_main

if __name__ == "__main__":
    sys.exit(serve_main())
