"""Markdown tables that are readable as plain text too."""

from collections.abc import Sequence


def render_markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; every line has as many cells as the head."""
    rows = [[cell.replace("|", "\\|") for cell in line] for line in (head, *lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(rows[0]), line(["-" * width for width in widths]), *map(line, rows[1:])])
