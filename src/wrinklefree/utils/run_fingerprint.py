"""The identity of a run: what decides its result, and nothing else.

Hashed are the configuration's sections that the stage reads, the fingerprints of what it eats (parent, teacher, data,
...), and the code: the commit, and the changed files of `src/` and `configs/` when there are any. Where things are
stored, logged or watched is left out, however deep it is nested, so that moving an output folder loses no run.
"""

import hashlib
import json
import logging
import math
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

logger = logging.getLogger(__name__)

NO_GIT = "nogit"
"""Stands for the commit where there is no repository; the package's own sources are hashed instead."""

_CODE_FOLDERS = ("src", "configs")
_NOT_DIRT = (":(exclude)training_logs", ":(exclude)outputs")
_PACKAGE = Path(__file__).resolve().parents[1]

INFRASTRUCTURE_KEYS = frozenset(
    {
        "allow_slow", "audit", "dry_run", "estimate", "estimation", "experiment_name", "gcs", "hydra", "logging",
        "num_workers", "output_dir", "resume", "serving", "skip_recovery", "tensorboard", "tracker", "trackers",
        "tracking", "trackio", "wandb",
    }
)  # fmt: skip
"""Keys that are dropped at any depth, with all below them."""

INFRASTRUCTURE_PAIRS = frozenset(
    {
        ("checkpoint", "asynchronous"),
        ("checkpoint", "keep_last_n"),
        ("checkpoint", "resume_from"),
        ("checkpoint", "save_interval"),
        # The same mathematics, watched or computed otherwise.
        ("packing", "attention"),
        ("teacher", "offload"),
        ("training", "activation_checkpointing"),
        ("training", "compile"),
        ("training", "evaluation"),
        ("training", "max_nonfinite_steps"),
        # Paths of what the stage eats: `inputs` carries the fingerprints, and a path may move.
        ("model", "path"),
        ("sources", "path"),
        ("sources", "verify"),
        ("teacher", "cache"),
        ("teacher", "source"),
        ("training", "init_from"),
    }
)
"""(parent, key) pairs that are dropped at any depth."""


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a run, and what it was made of."""

    value: str
    """SHA-256 in hexadecimal; its first 8 characters name the run's folder."""
    git_commit: str
    """Full hash of the commit, or `nogit`."""
    git_dirty: bool
    """Whether the checkout holds changes that no commit does (outside `training_logs/` and `outputs/`)."""
    config_hash: str
    inputs: Mapping[str, str]
    """Role -> fingerprint of what the run eats."""

    @property
    def short(self) -> str:
        """The first 8 characters."""
        return self.value[:8]


@dataclass(frozen=True)
class _Code:
    commit: str
    is_dirty: bool
    changes: str
    """SHA-256 of the changed sources (without a repository: of all sources); empty when there are none."""


def fingerprint(
    tree: Mapping[str, Any], *, sections: Sequence[str], inputs: Mapping[str, str], repository: Path | None
) -> Fingerprint:
    """The identity of the run that `tree` describes.

    Args:
        tree: The composed configuration as plain dicts, lists and scalars. Order of keys and the spelling of a number
            (1 or 1.0) make no difference.
        sections: Root keys that decide the result; a section that `tree` lacks has its defaults and counts as absent.
        inputs: Role -> fingerprint of what the run eats.
        repository: Root of the checkout that the code runs from; None when it runs from an installed package.
    """
    config_hash = _hash(_math_only({name: tree[name] for name in sections if name in tree}, ""))
    code = _code_of_checkout(repository) if repository is not None else _code_of_package()
    identity = {"config": config_hash, "inputs": dict(inputs), "commit": code.commit, "changes": code.changes}
    return Fingerprint(
        value=_hash(identity),
        git_commit=code.commit,
        git_dirty=code.is_dirty,
        config_hash=config_hash,
        inputs=dict(inputs),
    )


def _hash(node: Any) -> str:
    canonical = json.dumps(node, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _math_only(node: Any, parent: str) -> Any:
    """`node` without infrastructure and in one spelling, ready for JSON."""
    if isinstance(node, Mapping):
        kept: dict[str, Any] = {}
        for raw_key, value in cast("Mapping[Any, Any]", node).items():
            key = str(raw_key)
            if key in INFRASTRUCTURE_KEYS or (parent, key) in INFRASTRUCTURE_PAIRS:
                continue
            cleaned = _math_only(value, key)
            # A section that sets nothing (but infrastructure) is the same as one that is not there.
            if cleaned != {}:
                kept[key] = cleaned
        return kept
    if isinstance(node, list | tuple):
        return [_math_only(element, parent) for element in cast("list[Any]", node)]
    if node is None or isinstance(node, bool | int | str):
        return node
    if isinstance(node, float):
        return int(node) if math.isfinite(node) and node.is_integer() else node
    if isinstance(node, Path):
        return str(node)
    raise TypeError(f"a configuration holds no {type(node).__name__} ({parent}={node!r})")


def _code_of_package() -> _Code:
    sources = sorted(path for path in _PACKAGE.rglob("*") if path.suffix in {".py", ".yaml"})
    return _Code(NO_GIT, False, f"{version('wrinklefree')}:{_hash_files(_PACKAGE, sources)}")


def _code_of_checkout(repository: Path) -> _Code:
    try:
        commit = _git(repository, "rev-parse", "--verify", "HEAD").decode().strip()
        status = _git(repository, "status", "--porcelain", "-z", "--untracked-files=normal", "--", ".", *_NOT_DIRT)
        # Names and contents instead of a textual diff, whose form depends on the user's git settings.
        changed = _git(repository, "diff", "HEAD", "--name-only", "--no-renames", "-z", "--", *_CODE_FOLDERS)
        new = _git(repository, "ls-files", "--others", "--exclude-standard", "-z", "--", *_CODE_FOLDERS)
    except FileNotFoundError:
        logger.warning("NO GIT: the git command is missing; the run's identity uses a hash of the sources instead")
        return _code_of_package()
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        logger.warning("NO GIT: %s; the run's identity uses a hash of the sources instead", reason[0])
        return _code_of_package()
    paths = [repository / os.fsdecode(name) for name in sorted({*changed.split(b"\0"), *new.split(b"\0")} - {b""})]
    return _Code(commit, bool(status), _hash_files(repository, paths) if paths else "")


def _git(repository: Path, *arguments: str) -> bytes:
    """Output of a git command that changes nothing."""
    # A commit hook exports GIT_DIR and GIT_INDEX_FILE, which would point the command at another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    command = ["git", "--literal-pathspecs"] if arguments[0] != "status" else ["git"]
    return subprocess.run(
        [*command, *arguments], cwd=repository, env=environment, check=True, capture_output=True, timeout=60
    ).stdout


def _hash_files(root: Path, paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes() if path.is_file() else b"\0absent"
        digest.update(f"{path.relative_to(root).as_posix()}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()
