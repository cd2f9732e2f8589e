"""What the repository's files may contain, and where tests stand."""

import re
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
PACKAGE = ROOT / "src" / "wrinklefree"
# Spelt in pieces, so that this file passes its own test.
MACHINE_PATH = re.compile(r"(?<![\w.$}~-])/(?:" + "work|" + "root|" + "home/[a-z]+)/|/tmp/" + "bash")
REGISTRY_HOST = re.compile(
    "|".join(re.escape(name + ".org") for name in ("py" + "pi", "python" + "hosted", "npm" + "js"))
)
SEED_TOP_LEVEL = (
    "pyproject.toml", "uv.lock", "README.md", "configs", "src", "scripts", "benchmark", "tests", "docs",
    "training_logs", "extern", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md",
)  # fmt: skip


def repository_files() -> list[Path]:
    """Files that git tracks or would track, so that a new file is checked before it is committed."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    paths = (ROOT / line for line in listing.stdout.splitlines())
    return [path for path in paths if path.is_file() and path.name != "uv.lock"]


def text_files() -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            found.append((path.relative_to(ROOT), content.decode("utf-8")))
    return found


@pytest.fixture(scope="module")
def texts() -> list[tuple[Path, str]]:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout: lists the tracked files")
    return text_files()


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        (MACHINE_PATH, "see /" + "work/main", True),
        (MACHINE_PATH, "out=/" + "home/ann/x", True),
        (MACHINE_PATH, "a path/" + "work/x", False),
        (MACHINE_PATH, "$HOME/" + "work/x", False),
        (REGISTRY_HOST, "https://" + "py" + "pi.org/simple", True),
        (REGISTRY_HOST, "arxiv.org", False),
    ],
)
def test_patterns_find_what_they_should(pattern: re.Pattern[str], text: str, found: bool) -> None:
    assert bool(pattern.search(text)) is found


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY_HOST], ids=["machine paths", "registry hosts"])
def test_no_file_contains(texts: list[tuple[Path, str]], pattern: re.Pattern[str]) -> None:
    hits = [f"{path}: {match.group()}" for path, text in texts for match in [pattern.search(text)] if match]
    assert hits == []


def test_top_level_is_there() -> None:
    assert [name for name in SEED_TOP_LEVEL if not (ROOT / name).exists()] == []


def test_test_files_have_distinct_names() -> None:
    counts = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert {name for name, count in counts.items() if count > 1} == set()


def test_tests_mirror_the_source() -> None:
    """tests/<layer>/test_<module>[_<aspect>].py tests src/wrinklefree/<layer>/<module>.py."""
    strays: list[str] = []
    for layer in (path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()):
        modules = {path.stem for path in layer.glob("*.py")} - {"__init__"}
        for test in (TESTS / layer.name).glob("test_*.py"):
            subject = test.stem.removeprefix("test_")
            if not any(subject == module or subject.startswith(f"{module}_") for module in modules):
                strays.append(str(test.relative_to(ROOT)))
    assert strays == []


def test_no_script_shadows_a_module() -> None:
    """A script's folder comes first on `sys.path`: a script named like an installed module would be imported for it."""
    import importlib.util

    names = [path.stem for path in (ROOT / "scripts").glob("*.py")]
    assert [name for name in names if importlib.util.find_spec(name) is not None] == []


def test_submodule_is_a_pointer_to_the_public_repository() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout: reads the index")
    entry = subprocess.run(
        ["git", "ls-files", "--stage", "extern/BitNet"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert entry[0] == "160000"
    assert f"commit {entry[1][:7]}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "url = https://github.com/microsoft/BitNet.git" in (ROOT / ".gitmodules").read_text(encoding="utf-8")


def test_flash_attention_is_a_group_and_not_an_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = [name for names in project["project"]["optional-dependencies"].values() for name in names]
    assert not any(name.startswith("flash-attn") for name in extras)
    assert any(name.startswith("flash-attn") for name in project["dependency-groups"]["flash"])


def test_yaml_files_parse() -> None:
    files = [*(ROOT / "configs").rglob("*.yaml"), ROOT / ".pre-commit-config.yaml", *(ROOT / ".github").rglob("*.yml")]
    assert files
    for path in files:
        yaml.safe_load(path.read_text(encoding="utf-8"))
