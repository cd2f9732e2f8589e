"""Pieces of a self-contained HTML page: one file, no script, no request to anything outside it.

Text is escaped where it is put in; what a function returns is HTML.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml

SHORT = 28
"""Characters of a table's cell that is not broken into lines."""
_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --raised: #f5f6f8; --text: #1b1f24; --faint: #646d78; --line: #d9dde2;
  --accent: #2563a8; --good: #1a7f4b; --bad: #b3261e; --warn: #95600a;
  --c0: #2563a8; --c1: #c2571a; --c2: #1a7f4b; --c3: #8e44ad; --c4: #b3261e; --c5: #0e7c86; --c6: #8a6d1f; --c7: #6b6f76; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171b; --raised: #1e2227; --text: #e4e7ea; --faint: #97a0aa; --line: #363c44;
  --accent: #6aaaf0; --good: #58c98c; --bad: #f2857c; --warn: #e3b04b;
  --c0: #6aaaf0; --c1: #f09a5f; --c2: #58c98c; --c3: #c792e0; --c4: #f2857c; --c5: #4fc4cf; --c6: #d6b84f; --c7: #a9afb7; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 1.6rem; margin: 0 0 4px; } h2 { font-size: 1.15rem; margin: 34px 0 10px; }
p { margin: 6px 0; } a { color: var(--accent); } .faint { color: var(--faint); }
.status { display: inline-block; padding: 1px 10px; border-radius: 10px; border: 1px solid; font-size: .85rem; }
.completed, .good { color: var(--good); } .failed, .bad { color: var(--bad); }
.interrupted, .running, .warn { color: var(--warn); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 8px; margin: 14px 0; }
dl div { background: var(--raised); border-radius: 6px; padding: 8px 12px; }
dt { color: var(--faint); font-size: .8rem; } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--raised); border-radius: 6px; padding: 10px; }
figcaption { font-size: .85rem; color: var(--faint); }
svg { display: block; width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--faint); }
svg text.name { fill: var(--text); font-size: 12px; } .grid { stroke: var(--line); }
.curve { fill: none; stroke-width: 1.4; stroke-linejoin: round; } .bar { fill: var(--accent); opacity: .75; }
.curve.raw { opacity: .3; stroke-width: 1; }
.interval { stroke: var(--text); stroke-width: 1.3; fill: none; }
.key { margin-left: 10px; white-space: nowrap; }
.key i { display: inline-block; width: 14px; height: 3px; margin: 0 4px 3px 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.short { white-space: nowrap; } td:not(.short) { min-width: 13em; overflow-wrap: anywhere; }
th { color: var(--faint); font-weight: 500; } blockquote { margin: 8px 0; padding: 8px 14px; background: var(--raised);
  border-left: 3px solid var(--line); border-radius: 0 6px 6px 0; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { background: var(--raised); padding: 12px; border-radius: 6px; overflow-x: auto; font-size: .82rem; margin: 8px 0; }
code { overflow-wrap: anywhere; } summary { cursor: pointer; padding: 3px 0; } ul { padding-left: 22px; margin: 6px 0; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_COLOURS = "".join(
    f".curve.c{n} {{ stroke: var(--c{n}); }} .dot.c{n} {{ fill: var(--c{n}); }} .key i.c{n} {{ background: var(--c{n}); }}\n"
    for n in range(8)
)


def page(title: str, body: Sequence[str]) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Text of a model or a data set ends up on this page: nothing in it may load or run anything.
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{_COLOURS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it; nothing where that is empty."""
    inside = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inside}\n</section>" if inside else ""


def heading(title: str, status: str, subtitle: str) -> str:
    """Title, the state in its colour, and a line below."""
    state = f'<span class="status {escape(status)}">{escape(status)}</span>'
    return f'<h1>{escape(title)} {state}</h1>\n<p class="faint">{escape(subtitle)}</p>'


def facts(entries: Mapping[str, str]) -> str:
    """Small boxes of a name and a value."""
    boxes = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in entries.items())
    return f"<dl>{boxes}</dl>" if boxes else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text; nothing without rows."""
    if not rows:
        return ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<tr>{top}</tr>\n{body}\n</table></div>'


def entries(found: Mapping[str, str]) -> str:
    """Names and values that may be long, one below the other."""
    rows = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in found.items())
    return f'<div class="scroll"><table>\n{rows}\n</table></div>' if rows else ""


def version_list(versions: Mapping[str, object]) -> str:
    """Packages with their versions, as words."""
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _cell(text: str) -> str:
    """Figures and names stay on one line, sentences and paths need not."""
    kind = ' class="short"' if len(text) <= SHORT else ""
    return f"<td{kind}>{escape(text)}</td>"


def paragraphs(lines: Sequence[str]) -> str:
    """Each line as a paragraph."""
    return "\n".join(f"<p>{escape(line)}</p>" for line in lines if line)


def charts(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    drawn = [figure for figure in figures if figure]
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def samples(entries: Sequence[tuple[str, str, str]]) -> str:
    """(who, prompt, continuation), the continuation in bold."""
    return "\n".join(
        f'<p class="faint">{escape(who)}</p><blockquote>{escape(prompt)}<b>{escape(continuation)}</b></blockquote>'
        for who, prompt, continuation in entries
    )


def configuration(tree: Mapping[str, Any], *, title: str = "as composed") -> str:
    """A configuration as YAML, folded away."""
    text = yaml.safe_dump(dict(tree), sort_keys=True, allow_unicode=True, width=100)
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def notes(entries: Sequence[tuple[str, str]]) -> str:
    """(good, warn or bad; text) as a list."""
    items = "".join(f'<li class="{escape(kind)}">{escape(text)}</li>' for kind, text in entries)
    return f"<ul>{items}</ul>" if items else ""
