"""Sphinx: Markdown pages, and reference pages written from the source before each build."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from reference_pages import write_reference_pages  # noqa: E402 (needs the path above)

project = "WrinkleFree"
author = "WrinkleFree contributors"
copyright = "2026, WrinkleFree contributors"
extensions = ["myst_parser"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "WrinkleFree"
exclude_patterns = ["_build"]
# The API pages carry names such as `[B, T]` that no lexer needs to understand.
highlight_language = "text"

write_reference_pages(source=HERE.parent / "src" / "wrinklefree", target=HERE / "api" / "generated")
