import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wrinklefree.utils import run_fingerprint
from wrinklefree.utils.run_fingerprint import INFRASTRUCTURE_KEYS, INFRASTRUCTURE_PAIRS, Fingerprint, fingerprint

TREE: dict[str, Any] = {
    "model": {"name": "tiny", "architecture": {"hidden_size": 256, "rope_theta": 10000.0, "rope_scaling": None}},
    "training": {
        "stage": "stage2",
        "lr": 0.0001,
        "batch_size": 4,
        "init_from": None,
        "checkpoint": {"save_interval": 500, "keep_last_n": 2},
        "logging": {"log_interval": 10},
        "teacher": {"source": "auto", "offload": False},
        "betas": [0.9, 0.95],
    },
    "seed": 42,
    "output_dir": "outputs",
}
SECTIONS = ("model", "training", "seed")


@pytest.fixture(autouse=True)
def code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the sources a thousand times would only cost time; tests of the code's identity undo this."""
    fixed = run_fingerprint._Code("nogit", False, "sources")
    monkeypatch.setattr(run_fingerprint, "_code_of_package", lambda: fixed)


def value(tree: dict[str, Any], sections: tuple[str, ...] = SECTIONS, **inputs: str) -> str:
    return fingerprint(tree, sections=sections, inputs=inputs, repository=None).value


def changed(path: str, new: Any) -> dict[str, Any]:
    tree = {key: (dict(item) if isinstance(item, dict) else item) for key, item in TREE.items()}
    *parents, last = path.split(".")
    node: Any = tree
    for parent in parents:
        node[parent] = dict(node.get(parent, {}))
        node = node[parent]
    node[last] = new
    return tree


@pytest.mark.parametrize(
    ("path", "new"),
    [
        ("output_dir", "elsewhere"),
        ("training.output_dir", "elsewhere"),
        ("training.checkpoint.save_interval", 7),
        ("training.checkpoint.resume_from", "x"),
        ("training.checkpoint.keep_last_n", 9),
        ("training.checkpoint", {}),
        ("training.logging.log_interval", 1),
        ("training.logging.deep.deeper", 1),
        ("training.data.num_workers", 8),
        ("training.init_from", "outputs/x"),
        ("training.teacher.source", "outputs/y"),
        ("training.teacher.offload", True),
        ("training.activation_checkpointing", True),
        ("training.compile", False),
        ("training.evaluation.interval", 7),
        ("model.path", "elsewhere"),
        ("model.experiment_name", "x"),
        ("training.wandb.project", "x"),
        *((key, {"some": 1}) for key in sorted(INFRASTRUCTURE_KEYS)),
        *((f"model.{key}", 1) for key in sorted(INFRASTRUCTURE_KEYS)),
    ],
)
def test_infrastructure_changes_nothing_wherever_it_is_nested(path: str, new: Any) -> None:
    assert value(changed(path, new)) == value(TREE)


@pytest.mark.parametrize(
    ("path", "new"),
    [
        ("training.lr", 0.0002),
        ("training.batch_size", 8),
        ("training.forward_products", "int8"),
        ("training.backward_products", "int8"),
        ("training.betas", [0.95, 0.9]),
        ("training.teacher.kind", "base"),
        ("training.stage", "stage3"),
        ("training.checkpoint.other", 1),
        ("training.source", "x"),
        ("model.architecture.hidden_size", 257),
        ("model.architecture.rope_scaling", {}),
        ("model.source", "hub"),
        ("seed", 43),
        ("seed", True),
        ("seed", "42"),
    ],
)
def test_what_decides_the_result_changes_it(path: str, new: Any) -> None:
    assert value(changed(path, new)) != value(TREE)


def test_spelling_makes_no_difference() -> None:
    respelt = changed("model.architecture", {"rope_scaling": None, "rope_theta": 10000, "hidden_size": 256.0})
    respelt = dict(reversed(respelt.items()))
    respelt["training"] = {**respelt["training"], "lr": 1e-4, "betas": (0.9, 0.95)}
    assert value(respelt, ("seed", "training", "model")) == value(TREE)


def test_sections_and_inputs_are_what_counts() -> None:
    assert value(changed("influence.enabled", True)) == value(TREE)
    assert value(TREE, ("model", "training")) != value(TREE)
    assert value(TREE, (*SECTIONS, "absent")) == value(TREE)
    assert value(TREE, parent="a") != value(TREE)
    assert value(TREE, parent="a") != value(TREE, parent="b")
    assert value(TREE, parent="a", teacher="b") != value(TREE, parent="b", teacher="a")


def test_the_parts_are_reported() -> None:
    made = fingerprint(TREE, sections=SECTIONS, inputs={"parent": "abc"}, repository=None)
    assert len(made.value) == len(made.config_hash) == 64
    assert made.short == made.value[:8]
    assert (made.git_commit, made.git_dirty, made.inputs) == ("nogit", False, {"parent": "abc"})
    with pytest.raises(TypeError, match="a configuration holds no set"):
        value(changed("seed", {1}))


NAMES = st.sampled_from(["lr", "steps", "alpha", "source", "checkpoint", "teacher", "training", "name", "x", "y"])
NUMBERS = st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=5)


def branches(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, min_size=1, max_size=4)


# Named: hypothesis reads the source of this function, and does not always find that of a lambda.
TREES = st.dictionaries(NAMES, st.recursive(SCALARS, branches, max_leaves=8), min_size=1, max_size=4)


def respell(node: Any, choices: random.Random) -> Any:
    """Another spelling of the same tree: other order, other number types, infrastructure strewn in."""
    if isinstance(node, dict):
        items = [(key, respell(item, choices)) for key, item in node.items()]
        items += [(key, choices.random()) for key in choices.sample(sorted(INFRASTRUCTURE_KEYS), 2)]
        choices.shuffle(items)
        return dict(items)
    if isinstance(node, list):
        return tuple(respell(item, choices) for item in node)
    if isinstance(node, bool) or node is None or isinstance(node, str):
        return node
    if float(node) == node and float(node).is_integer() and abs(node) < 2**53:
        return choices.choice([int, float])(node)
    return node


@settings(max_examples=400, deadline=None)
@given(tree=TREES, seed=st.integers(0, 2**32))
def test_any_tree_keeps_its_identity_in_any_spelling(tree: dict[str, Any], seed: int) -> None:
    sections = tuple(tree)
    assert value(respell(tree, random.Random(seed)), sections) == value(tree, sections)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(node, dict):
        return [
            leaf
            for key, item in node.items()
            if (path[-1] if path else "", key) not in INFRASTRUCTURE_PAIRS
            for leaf in leaves(item, (*path, key))
        ]
    if isinstance(node, list):
        return [leaf for index, item in enumerate(node) for leaf in leaves(item, (*path, index))]
    return [path]


def replaced(node: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[path[0]] = replaced(node[path[0]], path[1:], new)
    return copy


@settings(max_examples=400, deadline=None)
@given(tree=TREES, choice=st.integers(0, 10**6), new=SCALARS)
def test_any_change_of_a_value_changes_the_identity(tree: dict[str, Any], choice: int, new: Any) -> None:
    paths = [path for path in leaves(tree) if "teacher" not in path and "training" not in path]
    if not paths:
        return
    path = paths[choice % len(paths)]
    old: Any = tree
    for key in path:
        old = old[key]
    same = old == new and isinstance(old, bool) == isinstance(new, bool)
    sections = tuple(tree)
    assert (value(replaced(tree, path, new), sections) == value(tree, sections)) == same


def git(repository: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *arguments], cwd=repository, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(variable, raising=False)
    root = tmp_path / "checkout"
    for name in ("src/module.py", "configs/config.yaml", "README.md", "training_logs/warnings/one.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("first\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


def of_checkout(repository: Path) -> Fingerprint:
    return fingerprint(TREE, sections=SECTIONS, inputs={}, repository=repository)


def test_a_clean_checkout_is_its_commit(repository: Path) -> None:
    clean = of_checkout(repository)
    assert len(clean.git_commit) == 40
    assert not clean.git_dirty
    git(repository, "commit", "-q", "--allow-empty", "-m", "second")
    assert of_checkout(repository).value != clean.value


@pytest.mark.parametrize("name", ["src/module.py", "configs/config.yaml", "src/new.py", "configs/model/new.yaml"])
def test_changed_code_is_dirty_and_another_run(repository: Path, name: str) -> None:
    clean = of_checkout(repository)
    path = repository / name
    before = path.read_text() if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    path.write_text("second\n")
    dirty = of_checkout(repository)
    assert dirty.git_dirty
    assert dirty.git_commit == clean.git_commit
    assert dirty.value != clean.value
    path.write_text("third\n")
    assert of_checkout(repository).value not in {clean.value, dirty.value}
    path.write_text("second\n")
    git(repository, "add", name)
    assert of_checkout(repository).value == dirty.value
    git(repository, "reset", "-q")
    if before is None:
        path.unlink()
    else:
        path.write_text(before)
    assert of_checkout(repository) == clean


def test_a_deleted_source_is_another_run(repository: Path) -> None:
    clean = of_checkout(repository)
    (repository / "src" / "module.py").unlink()
    assert of_checkout(repository).value != clean.value


def test_logs_and_outputs_are_no_dirt(repository: Path) -> None:
    clean = of_checkout(repository)
    (repository / "training_logs" / "warnings" / "one.json").write_text("changed")
    (repository / "training_logs" / "warnings" / "two.json").write_text("new")
    (repository / "outputs").mkdir()
    (repository / "outputs" / "x").write_text("new")
    assert of_checkout(repository) == clean


def test_a_changed_readme_is_dirty_but_the_same_run(repository: Path) -> None:
    clean = of_checkout(repository)
    (repository / "README.md").write_text("changed")
    dirty = of_checkout(repository)
    assert dirty.git_dirty
    assert dirty.value == clean.value


def test_git_settings_and_hooks_do_not_matter(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "src" / "ünï code.py").write_text("new\n")
    (repository / "src" / "module.py").write_text("changed\n")
    dirty = of_checkout(repository)
    for setting, choice in (("diff.noprefix", "true"), ("color.ui", "always"), ("status.relativePaths", "false")):
        git(repository, "config", setting, choice)
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    assert of_checkout(repository) == dirty


def test_a_clone_elsewhere_is_the_same_run(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository, tmp_path / "elsewhere")
    assert of_checkout(tmp_path / "elsewhere").value == of_checkout(repository).value


def test_without_a_repository_the_sources_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "inner" / "module.py").write_text("one")
    (package / "weights.bin").write_text("not code")
    monkeypatch.setattr(run_fingerprint, "_PACKAGE", package)
    first = fingerprint(TREE, sections=SECTIONS, inputs={}, repository=None)
    assert (first.git_commit, first.git_dirty) == ("nogit", False)
    (package / "weights.bin").write_text("changed")
    assert fingerprint(TREE, sections=SECTIONS, inputs={}, repository=None) == first
    empty = tmp_path / "no_commit_yet"
    empty.mkdir()
    git(empty, "init", "-q")
    assert of_checkout(empty) == first
    assert "NO GIT" in caplog.text
    (package / "inner" / "module.py").write_text("two")
    assert fingerprint(TREE, sections=SECTIONS, inputs={}, repository=None).value != first.value
