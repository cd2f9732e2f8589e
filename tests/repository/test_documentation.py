"""What the documents promise: commands compose, files and links exist, the configuration guide is up to date."""

import importlib.util
import io
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from benchmark.config.settings import read_settings
from wrinklefree import cli
from wrinklefree.composition import compose
from wrinklefree.training.data_config import parse_prepare
from wrinklefree.training.evaluation_config import parse_evaluation

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([
    *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "tutorials").glob("*.md"),
    ROOT / "docs" / "api" / "index.md",
])  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
# Commands about the world outside the repository: nothing of ours to check.
FOREIGN = ("git", "cd")


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of every fenced bash block, split as a shell would."""
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language == "bash":
                for line in block.replace("\\\n", " ").splitlines():
                    words = shlex.split(line, comments=True)
                    if words:
                        yield page.name, words


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_launcher(words: list[str]) -> list[str]:
    """`uv run [python | torchrun --x=y] program ...` -> `program ...`."""
    if words[:2] == ["uv", "run"]:
        words = words[2:]
    if words[0] == "torchrun":
        words = [word for word in words[1:] if not word.startswith("--nproc_per_node=")]
    return words[1:] if words[0] == "python" else words


def check_uv_sync(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    known = {"--extra": project["project"]["optional-dependencies"], "--group": project["dependency-groups"]}
    for flag, value in pairwise([*arguments, ""]):
        if flag.startswith("--"):
            assert flag == "--all-extras" or value in known[flag], f"{flag} {value}"


def check_training(arguments: list[str]) -> None:
    """`--help` and Hydra's own flags apart, the arguments compose and decode; of a sweep, its first and last job."""
    overrides = [argument for argument in arguments if not argument.startswith("-") and argument != "job"]
    if "-m" in arguments:
        compose([re.sub(r"=([^,\[]*),.*", r"=\1", override) for override in overrides])
        overrides = [re.sub(r"=[^\[]*,", "=", override) for override in overrides]
    compose(overrides)


FLAG_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "scripts/convert_to_gguf.py": cli.convert_main,
    "scripts/doctor.py": cli.doctor_main,
    "scripts/export_hf.py": cli.export_main,
    "scripts/generate.py": cli.generate_main,
    "scripts/serve.py": cli.serve_main,
}


def check_benchmark(arguments: list[str]) -> None:
    """Overrides decode; `--resume FILE` and `--analyze-only FILE` stand alone."""
    if arguments[:1] in (["--resume"], ["--analyze-only"]):
        assert len(arguments) == 2
        return
    read_settings(arguments)


PARSED_COMMANDS: dict[str, Callable[[list[str]], object]] = {
    "scripts/run_evaluation.py": parse_evaluation,
    "scripts/prepare_data.py": parse_prepare,
    "scripts/run_benchmark.py": check_benchmark,
}
"""Commands whose arguments are overrides, and what decodes them."""


def check_flags(command: Callable[[list[str]], int], arguments: list[str]) -> None:
    """The command's help knows every flag."""
    shown = io.StringIO()
    with redirect_stdout(shown), suppress(SystemExit):
        command(["--help"])
    known = set(re.findall(r"--[a-z-]+", shown.getvalue()))
    assert "--help" in known
    unknown = [argument for argument in arguments if argument.startswith("--") and argument not in known]
    assert unknown == []


@pytest.mark.parametrize(("page", "words"), [pytest.param(*entry, id=" ".join(entry[1])[:90]) for entry in commands()])
def test_printed_command_is_one_that_we_have(page: str, words: list[str]) -> None:
    if words[0] in FOREIGN:
        return
    if words[:2] == ["uv", "sync"]:
        check_uv_sync(words[2:])
        return
    program, *arguments = without_launcher(words)
    if program == "-m":
        program = f"{arguments[0].replace('.', '/')}.py"
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program in ("pytest", "bash"):
        paths = [argument for argument in arguments if not argument.startswith("-")]
        paths += [argument.partition("=")[2] for argument in arguments if argument.startswith("--cov=")]
        assert [path for path in paths if not (ROOT / path).exists()] == []
    elif program == "pre-commit":
        assert (ROOT / ".pre-commit-config.yaml").is_file()
    else:
        assert program.startswith(("scripts/", "benchmark/")), f"{page}: no rule checks {' '.join(words)!r}"
        assert (ROOT / program).is_file()
        if program == "scripts/train.py":
            check_training(arguments)
        elif program in PARSED_COMMANDS:
            PARSED_COMMANDS[program](arguments)
        elif program in FLAG_COMMANDS:
            check_flags(FLAG_COMMANDS[program], arguments)


def test_a_wrong_command_would_be_noticed() -> None:
    from wrinklefree.utils.errors import ConfigError

    with pytest.raises(ConfigError, match="batch_siez"):
        check_training(["model=smollm2_135m", "training=stage2_pretrain", "training.batch_siez=4"])
    with pytest.raises(KeyError):
        check_uv_sync(["--exrta", "eval"])
    with pytest.raises(AssertionError, match="--modle"):
        check_flags(cli.serve_main, ["--modle", "x"])


def anchors(page: Path) -> set[str]:
    """Heading anchors as GitHub and MyST make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken: list[str] = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert broken == []


def test_configuration_guide_is_up_to_date() -> None:
    guide = load(ROOT / "scripts" / "make_configuration_guide.py")
    text = guide.GUIDE.read_text(encoding="utf-8")
    assert guide.with_reference(text, guide.render()) == text, "run scripts/make_configuration_guide.py"


def test_configuration_guide_has_every_key_of_a_composed_command() -> None:
    guide = (ROOT / "docs" / "configuration_guide.md").read_text(encoding="utf-8")
    tree = compose(["model=tiny", "training=stage3_distill"]).tree

    def dotted(branch: dict[str, object], prefix: str) -> Iterator[str]:
        for key, value in branch.items():
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from dotted(value, f"{prefix}{key}.")

    assert [key for key in dotted(tree, "") if f"`{key}`" not in guide] == []


def test_readme_lists_the_options_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for group in ("model", "training", "data", "distributed", "distillation"):
        missing = [p.stem for p in (ROOT / "configs" / group).glob("*.yaml") if not re.search(rf"\b{p.stem}\b", readme)]
        assert missing == [], group


def test_reference_pages_are_markdown(tmp_path: Path) -> None:
    source = tmp_path / "wrinklefree"
    for layer in ("quantization", "models", "distillation", "data", "serving", "training", "utils"):
        (source / layer).mkdir(parents=True)
        (source / layer / "__init__.py").write_text('"""About."""\n', encoding="utf-8")
    (source / "utils" / "sample.py").write_text(
        '"""Module with x < y."""\n\n\ndef add(a: int, *, b: int = 1) -> int:\n    """Return a sum `a < b`.\n\n'
        "    Args:\n        a: first\n            term.\n        b: second.\n\n"
        '    Raises:\n        ValueError: never.\n    """\n'
        "    return a + b\n\n\ndef _hidden() -> None: ...\n",
        encoding="utf-8",
    )
    target = tmp_path / "generated"
    target.mkdir()
    (target / "wrinklefree.utils.gone.md").write_text("stale", encoding="utf-8")
    pages = load(ROOT / "docs" / "reference_pages.py")
    pages.write_reference_pages(source, target)
    page = (target / "wrinklefree.utils.sample.md").read_text(encoding="utf-8")
    assert "Module with x &lt; y." in page
    assert "def add(a: int, *, b: int=1) -> int" in page
    assert "Return a sum `a < b`." in page
    assert "**Args**\n\n- `a`: first\n  term.\n- `b`: second.\n" in page
    assert "**Raises**\n\n- `ValueError`: never." in page
    assert "_hidden" not in page
    assert not (target / "wrinklefree.utils.gone.md").exists()
    assert "wrinklefree.utils.sample" in (target / "utils.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_documentation_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
