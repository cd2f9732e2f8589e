"""Show what is here and what is missing on this machine, each with its fix."""

import sys

from wrinklefree.cli import doctor_main

if __name__ == "__main__":
    sys.exit(doctor_main())
