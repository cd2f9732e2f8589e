"""The import rules: the contracts of pyproject.toml, and package `__init__` modules that import nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "wrinklefree"
LAYERS = ("utils", "native", "quantization", "models", "distillation", "data", "serving", "training")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def test_contracts_hold() -> None:
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_package_init_imports_nothing(path: Path) -> None:
    assert imports(path) == set()


def test_imports_of_our_own_modules_are_absolute() -> None:
    # The one file that also lives outside of the package, beside its neighbour.
    travelling = PACKAGE / "serving" / "hf_modeling" / "modeling_wrinklefree.py"
    files = set(PACKAGE.rglob("*.py")) - {travelling}
    assert {f"{path}: {name}" for path in files for name in imports(path) if name.startswith(".")} == set()
    assert {name for name in imports(travelling) if name.startswith((".", "wrinklefree"))} == {
        ".configuration_wrinklefree"
    }


def test_every_layer_is_in_the_contract() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders - {"assets", "configs"} == set(LAYERS)


def test_configuration_loads_no_heavy_library() -> None:
    program = (
        "import sys; import wrinklefree.composition, wrinklefree.cli; "
        "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
