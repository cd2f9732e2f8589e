"""Run a study of `configs/study/`: see `--help`."""

import sys

from wrinklefree.cli import study_main

if __name__ == "__main__":
    sys.exit(study_main())
