"""API pages from the source text: one Markdown page a module, read with `ast`.

Nothing is imported, so the build needs neither torch nor a GPU, and docstrings stay the Markdown that they are. Public
means: defined in the module, no leading underscore.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Attributes|Example|Examples|Note):\s*$")
ENTRY = re.compile(r"^    (\S[^:]*): ")
LAYERS = ("quantization", "models", "distillation", "data", "serving", "training", "utils")


def markdown(docstring: str) -> str:
    """A google-style docstring as Markdown: sections in bold, their entries as list items, stray `<` escaped."""
    lines: list[str] = []
    inside_section = False
    for line in docstring.splitlines():
        if SECTION.match(line):
            inside_section = True
            lines += ["", f"**{line.strip().rstrip(':')}**", ""]
        elif inside_section and ENTRY.match(line):
            lines.append("- " + ENTRY.sub(r"`\1`: ", line))
        elif inside_section and line.startswith("    "):
            lines.append("  " + line.strip())
        else:
            inside_section = inside_section and not line.strip()
            lines.append(line)
    pieces = "\n".join(lines).split("`")
    pieces[::2] = [piece.replace("<", "&lt;") for piece in pieces[::2]]
    return "`".join(pieces)


def signature(node: Definition) -> str:
    """The first line of a definition, as Python."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}"


def is_public(node: ast.stmt) -> bool:
    """Whether a statement defines a name for users."""
    return isinstance(node, Definition) and not node.name.startswith("_")


def fields(node: ast.ClassDef) -> Iterator[str]:
    """Annotated attributes with the string that follows them."""
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if statement.target.id.startswith("_"):
            continue
        note = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            note = f": {' '.join(str(following.value.value).split())}"
        yield f"- `{ast.unparse(statement)}`{markdown(note)}"


def definition(node: Definition, level: int) -> Iterator[str]:
    """Heading, signature, docstring, fields and public methods of one definition."""
    yield f"{'#' * level} {node.name}"
    yield from ("", "```python", signature(node), "```", "")
    yield from (markdown(ast.get_docstring(node) or ""), "")
    if isinstance(node, ast.ClassDef):
        yield from (*fields(node), "")
        for method in node.body:
            if is_public(method) and isinstance(method, Definition):
                yield from definition(method, level + 1)


def page(path: Path, name: str) -> str:
    """The whole page of one module."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    lines = [f"# {name}", "", markdown(ast.get_docstring(module) or ""), ""]
    for node in module.body:
        if is_public(node) and isinstance(node, Definition):
            lines += definition(node, 2)
    return "\n".join(lines) + "\n"


def write_reference_pages(source: Path, target: Path) -> None:
    """One page a module and one list a layer; pages of modules that are gone are removed."""
    target.mkdir(parents=True, exist_ok=True)
    written: set[Path] = set()
    for layer in LAYERS:
        modules = sorted(path for path in (source / layer).glob("*.py") if path.stem != "__init__")
        names = [f"wrinklefree.{layer}.{path.stem}" for path in modules]
        for path, name in zip(modules, names, strict=True):
            written.add(write_if_changed(target / f"{name}.md", page(path, name)))
        about = ast.get_docstring(ast.parse((source / layer / "__init__.py").read_text(encoding="utf-8"))) or ""
        listing = [f"# {layer}", "", about, "", "```{toctree}", ":maxdepth: 1", "", *names, "```", ""]
        written.add(write_if_changed(target / f"{layer}.md", "\n".join(listing)))
    for stale in set(target.glob("*.md")) - written:
        stale.unlink()


def write_if_changed(path: Path, text: str) -> Path:
    """Write only what differs, so that an incremental build rereads only what changed."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path
