"""Continue a prompt, or hold a conversation, with a checkpoint or a GGUF file."""

import sys

from wrinklefree.cli import generate_main

if __name__ == "__main__":
    sys.exit(generate_main())
