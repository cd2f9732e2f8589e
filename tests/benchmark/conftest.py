"""`benchmark` stands beside the package and is not installed with it: make it importable from any folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
