"""Do the tests notice? Each promise of reliability is broken in a copy of the source, and a named test must fail.

    uv run python -m benchmark.mutations [NAME ...]

A mutation replaces a few lines: a rename is left out, a hash is not compared, a refused precondition counts as kept. The
test named beside it runs against the copy and has to fail by an assertion or an error of its own; a copy that cannot even be
collected counts as unnoticed. Before that, all named tests must pass on the unchanged copy. The repository itself is
only read.

Each test runs in a forked process, so that PyTorch is imported once. A missing fsync cannot be seen by killing a process,
because what it wrote lives on in the kernel; the test that catches it watches the order of the calls.
"""

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("src", "tests", "benchmark", "configs", "scripts")
SECONDS = 120
"""How long a test may take; a mutation that makes it wait for ever is noticed too."""

_CHECKPOINT = "tests/utils/test_checkpoint.py::test_"
_STORAGE = "tests/utils/test_storage.py::test_"
_GCS = "tests/utils/test_gcs_storage.py::test_"
_LEASE = "tests/utils/test_lease.py::test_"
_MIRROR = "tests/utils/test_mirror.py::test_"
_RUN = "tests/utils/test_run_manager.py::test_"
_IDENTITY = "tests/utils/test_run_fingerprint.py::test_"
_TRAINER = "tests/training/test_trainer.py::test_"
_SHARDING = "tests/training/sharding/test_"


@dataclass(frozen=True)
class Mutation:
    """A change that breaks one promise, and the test that has to notice."""

    name: str
    file: str
    """Below `src/wrinklefree`."""
    old: str
    """Occurs once in the file."""
    new: str
    test: str

    def path(self, root: Path) -> Path:
        """The file in a copy of the repository."""
        return root / "src" / "wrinklefree" / self.file


MUTATIONS = (
    Mutation(
        "file written in place, without a rename", "utils/storage.py",
        "write_durably(temporary, content)\n            temporary.replace(path)", "path.write_bytes(content)",
        f"{_STORAGE}a_failed_write_keeps_the_old_content_and_leaves_nothing",
    ),
    Mutation(
        "files not flushed", "utils/storage.py",
        "        yield descriptor\n        os.fsync(descriptor)\n", "        yield descriptor\n",
        f"{_CHECKPOINT}everything_is_flushed_before_the_rename_and_old_ones_go_last",
    ),
    Mutation(
        "folder not flushed after the rename", "utils/manifest.py",
        "        fsync_directory(final.parent)\n", "",
        f"{_CHECKPOINT}everything_is_flushed_before_the_rename_and_old_ones_go_last",
    ),
    Mutation(
        "pruning leaves the manifest for last", "utils/manifest.py",
        "        (folder / MANIFEST).unlink(missing_ok=True)\n        fsync_directory(folder)\n", "",
        f"{_CHECKPOINT}everything_is_flushed_before_the_rename_and_old_ones_go_last",
    ),
    Mutation(
        "SHA-256 not compared", "utils/manifest.py",
        'if digest != expected["sha256"]:', "if False:",
        f"{_CHECKPOINT}every_corruption_is_found_and_the_one_before_is_used",
    ),
    Mutation(
        "manifest not checked against itself", "utils/manifest.py",
        'if checked["digest"] != _digest(checked) or content != _canonical(checked):', "if False:",
        f"{_CHECKPOINT}every_corruption_is_found_and_the_one_before_is_used",
    ),
    Mutation(
        "files that nothing lists are accepted", "utils/manifest.py",
        "for name in sorted(present.keys() - recorded.keys()):", "for name in ():",
        f"{_CHECKPOINT}every_corruption_is_found_and_the_one_before_is_used",
    ),
    Mutation(
        "hash taken of what the disk holds, not of what was meant", "utils/manifest.py",
        "known[name] if name in known else _sha256(path)", "_sha256(path)",
        f"{_CHECKPOINT}what_the_disk_garbled_while_writing_is_found_by_the_digest_of_what_was_meant",
    ),
    Mutation(
        "step in the name not compared", "utils/checkpoint.py",
        'if name is None or manifest["step"] != int(name[1]):', "if name is None:",
        f"{_CHECKPOINT}a_renamed_checkpoint_is_not_taken_for_another_step",
    ),
    Mutation(
        "all checkpoints corrupt: a silent fresh start", "utils/checkpoint.py",
        "if found is None and reasons:", "if False:",
        f"{_CHECKPOINT}all_corrupt_is_an_error_that_names_them_and_never_a_fresh_start",
    ),
    Mutation(
        "older checkpoint taken without a word", "utils/checkpoint.py",
        "                self._on_corrupt(reasons)\n", "                pass\n",
        f"{_CHECKPOINT}every_corruption_is_found_and_the_one_before_is_used",
    ),
    Mutation(
        "one checkpoint kept", "utils/checkpoint.py", "_LEAST_KEPT = 2", "_LEAST_KEPT = 1",
        f"{_CHECKPOINT}prunes_to_keep_last_n_and_never_below_two",
    ),
    Mutation(
        "leftovers of a killed process stay", "utils/checkpoint.py",
        "removed = remove_leftovers(self.folder)\n        folders", "removed = []\n        folders",
        f"{_CHECKPOINT}a_crash_at_any_file_operation_leaves_the_old_or_the_new_state",
    ),
    Mutation(
        "partial folder stays after a full disk", "utils/checkpoint.py",
        "        except BaseException:\n            pending.abandon()\n            raise\n",
        "        except BaseException:\n            raise\n",
        f"{_CHECKPOINT}a_disk_that_fills_up_on_the_way_keeps_the_last_good_one",
    ),
    Mutation(
        "free space not checked", "utils/storage.py", "if free < needed:", "if False:",
        f"{_CHECKPOINT}too_little_space_is_refused_before_the_first_byte",
    ),
    Mutation(
        "412 ignored", "utils/gcs_storage.py", "return self._holds(name, data)", "return True",
        f"{_GCS}conditions_are_kept",
    ),
    Mutation(
        "lost reply taken for a lost race", "utils/gcs_storage.py", "return self._holds(name, data)", "return False",
        f"{_GCS}a_condition_that_our_own_lost_reply_broke_counts_as_kept",
    ),
    Mutation(
        "write without its precondition", "utils/gcs_storage.py",
        '{**options, "if_generation_match": generation}', "options",
        f"{_GCS}of_racing_creators_one_wins_on_an_independent_server[few]",
    ),
    Mutation(
        "lease taken from a living holder", "utils/lease.py",
        'if record.get("released") or age > STALE_SECONDS:', "if True:",
        f"{_LEASE}the_second_is_told_who_the_first_is",
    ),
    Mutation(
        "lease renewed by who lost it", "utils/lease.py",
        "held = ours and self._storage.replace", "held = self._storage.replace",
        f"{_LEASE}a_silent_holder_loses_it_to_exactly_one",
    ),
    Mutation(
        "lease given back by who lost it", "utils/lease.py",
        'if _record(content).get("token") == self._token:', "if True:",
        f"{_LEASE}a_silent_holder_loses_it_to_exactly_one",
    ),
    Mutation(
        "lease lost without a word", "utils/lease.py", "if silent > LOST_SECONDS:", "if False:",
        f"{_LEASE}losing_it_is_told_once_and_an_outage_is_survived",
    ),
    Mutation(
        "manifest uploaded before its blobs", "utils/mirror.py",
        "            manifest = verify_manifest(folder)\n",
        "            manifest = verify_manifest(folder)\n"
        '            self.storage.write_bytes(f"{name}/{MANIFEST}", (folder / MANIFEST).read_bytes())\n',
        f"{_MIRROR}blobs_go_before_the_manifest_that_lists_them",
    ),
    Mutation(
        "download not verified", "utils/mirror.py", "            verify_manifest(temporary)\n", "",
        f"{_MIRROR}a_rotten_checkpoint_is_passed_over",
    ),
    Mutation(
        "names in a manifest may leave the folder", "utils/mirror.py",
        "if not destination.resolve().is_relative_to(temporary.resolve()):", "if False:",
        f"{_MIRROR}a_manifest_cannot_write_outside_its_folder",
    ),
    Mutation(
        "run not locked", "utils/run_manager.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
        f"{_RUN}two_processes_never_write_one_run_and_a_dead_one_is_taken_over",
    ),
    Mutation(
        "completed run skipped without its artifact", "utils/run_manager.py",
        "        except CheckpointError:\n            return False\n        return True",
        "        except CheckpointError:\n            return True\n        return True",
        f"{_RUN}a_completed_run_with_a_damaged_artifact_is_not_skipped",
    ),
    Mutation(
        "secrets not scrubbed", "utils/audit_logger.py", "for pattern in _SECRETS:", "for pattern in ():",
        "tests/utils/test_audit_logger.py::test_no_planted_secret_reaches_a_record_or_the_log",
    ),
    Mutation(
        "changed code is the same run", "utils/run_fingerprint.py",
        '_hash_files(repository, paths) if paths else ""', '""',
        f"{_IDENTITY}changed_code_is_dirty_and_another_run",
    ),
    Mutation(
        "save interval moves the fingerprint", "utils/run_fingerprint.py",
        "if key in INFRASTRUCTURE_KEYS or (parent, key) in INFRASTRUCTURE_PAIRS:", "if key in INFRASTRUCTURE_KEYS:",
        f"{_IDENTITY}infrastructure_changes_nothing_wherever_it_is_nested",
    ),
    Mutation(
        "strict=False: a missing tensor stays random", "models/weights.py",
        '        *_problem("missing", missing),\n', "",
        "tests/models/test_artifact.py::test_assemble_accounts_for_every_tensor",
    ),
    Mutation(
        "step that is not finite applied", "training/trainer.py",
        "        if finite:\n            hand_gradients_over", "        if True:\n            hand_gradients_over",
        f"{_TRAINER}a_step_that_is_not_finite_changes_nothing",
    ),
    Mutation(
        "weights that are not finite saved", "training/trainer.py",
        "        self._refuse_nonfinite_weights()\n        weights", "        weights",
        f"{_TRAINER}what_is_not_finite_never_reaches_a_checkpoint",
    ),
    Mutation(
        "data begins anew on resuming", "training/trainer.py",
        '        self.stream.load_state_dict(checkpoint.state["stream"])\n', "",
        f"{_TRAINER}a_resumed_run_is_bit_identical",
    ),
    Mutation(
        "optimizer begins anew on resuming", "training/trainer.py",
        'load_optimizer_parts(self.optimizer, checkpoint, "optimizer.", checkpoint.state["optimizer"])', "pass",
        f"{_TRAINER}a_resumed_run_is_bit_identical",
    ),
    Mutation(
        "schedule begins anew on resuming", "training/trainer.py",
        '        self.progress = Progress(**checkpoint.state["progress"])\n', "",
        f"{_TRAINER}a_resumed_run_is_bit_identical",
    ),
    Mutation(
        "signal not heard", "training/trainer.py",
        "int(largest_of_ranks(self.stop_signal or 0))", "0",
        f"{_TRAINER}a_signal_is_obeyed_and_the_resumed_run_still_validates",
    ),
    Mutation(
        "resumed with another optimizer without a word", "training/trainer.py",
        "if changed and not allow_identity_change:", "if False:",
        f"{_TRAINER}another_device_set_up_is_refused_unless_told",
    ),
    Mutation(
        "gradients averaged over ranks instead of summed", "training/fsdp_wrapper.py",
        "        group.set_gradient_divide_factor(1.0)\n",
        "        group.set_gradient_divide_factor(float(sharding.mesh.size()))\n",
        f"{_SHARDING}equality.py::test_gradients_of_the_first_step_are_those_of_one_process[stage2]",
    ),
    Mutation(
        "scale of this rank's rows only", "training/code_gather.py",
        "        torch.distributed.all_reduce(sums, group=self._group)\n", "        sums *= 2\n",
        f"{_SHARDING}gathered_bytes.py::test_gathered_codes_and_scales_are_those_of_the_whole_weight",
    ),
    Mutation(
        "a rank's failed write not told to the others", "utils/sharded_checkpoint.py",
        "                if failures:\n", "                if False:\n",
        f"{_SHARDING}checkpoints.py::test_a_rank_that_cannot_write_fails_all_and_leaves_the_older_checkpoint",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """How the tests took it."""

    noticed: bool
    reason: str
    """The first line of the failure, or what happened instead."""
    seconds: float


def copy_repository(root: Path) -> None:
    """What the tests need, in `root`."""
    for name in COPIED:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    shutil.copy(ROOT / "pyproject.toml", root / "pyproject.toml")


@contextlib.contextmanager
def mutated(mutation: Mutation, root: Path) -> Iterator[None]:
    """The copy with the mutation in it, while the block lasts.

    Raises:
        ValueError: the lines to replace are not there exactly once: the source has moved on.
    """
    path = mutation.path(root)
    original = path.read_text(encoding="utf-8")
    if original.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.old!r} is {original.count(mutation.old)} times in {mutation.file}"
        )
    path.write_text(original.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(original, encoding="utf-8")


def run_tests(root: Path, tests: Sequence[str], log: Path) -> int:
    """Exit code of pytest over the copy, in a forked process; its output goes to `log`."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = _pytest_here(root, tests, log)
        except BaseException:  # noqa: BLE001 - nothing may return into the parent's stack
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + SECONDS * (1 + len(tests) // 4)
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # ranks that a failed test left waiting
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def _pytest_here(root: Path, tests: Sequence[str], log: Path) -> int:
    """In the child: forget the modules of the repository, and run pytest over those of the copy."""
    import pytest

    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", PYTHONPATH=f"{root / 'src'}{os.pathsep}{root}")
    for name in [name for name in sys.modules if name.partition(".")[0] in {"wrinklefree", "benchmark"}]:
        del sys.modules[name]
    importlib.invalidate_caches()
    sys.path[:] = [str(root / "src"), str(root), *(path for path in sys.path if path not in {"", str(ROOT)})]
    os.chdir(root)
    # `warm_up` has imported a package whose assertions pytest would have rewritten.
    quiet = ["-q", "-x", "--no-header", "--tb=short", "-rfE", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    options = [*quiet, "-m", "", "-p", "no:cacheprovider", f"--timeout={SECONDS}"]
    return int(pytest.main([*options, *tests]))


def judge(code: int, output: str) -> tuple[bool, str]:
    """Whether the tests noticed, and how; from pytest's exit code and output."""
    lines = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if code == 0:
        return False, "the test still passes"
    if code == -signal.SIGKILL:
        return False, f"no answer within {SECONDS} s"
    if code != 1 or not lines or not lines[0].startswith("FAILED "):
        return False, f"could not run (exit code {code}): {lines[0] if lines else output[-200:]}"
    return True, next((line[1:].strip() for line in output.splitlines() if line.startswith("E  ")), "")


def examine(mutation: Mutation, root: Path) -> Verdict:
    """Run the named test on the mutated copy in `root`."""
    log = root / "output.txt"
    started = time.perf_counter()
    with mutated(mutation, root):
        code = run_tests(root, [mutation.test], log)
    noticed, reason = judge(code, log.read_text(encoding="utf-8", errors="replace"))
    return Verdict(noticed, reason, time.perf_counter() - started)


def warm_up() -> None:
    """Import what is slow and not ours, once, before the forks."""
    for name in ("torch", "torch.distributed.fsdp", "safetensors.torch", "numpy", "yaml"):
        importlib.import_module(name)
    for name in ("google.cloud.storage", "transformers"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def row(mutation: Mutation, verdict: Verdict) -> str:
    """A line of the table."""
    test = mutation.test.rpartition("/")[2].replace("::", "` `")
    reason = " ".join(verdict.reason.replace("|", "/").split())[:80]
    result = "red" if verdict.noticed else "**unnoticed**"
    return f"| {mutation.name} | `{test}` | {result} | {reason} | {verdict.seconds:.1f} |"


HEADER = "| mutation | test | result | first line | s |\n|---|---|---|---|---|"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when a mutation goes unnoticed or a test fails on the unchanged copy."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.mutations", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="words; mutations whose name holds one (default: all)")
    parser.add_argument("--files", help="only mutations of this folder below src/wrinklefree, such as utils")
    options = parser.parse_args(arguments)
    chosen = [
        mutation
        for mutation in MUTATIONS
        if (not options.names or any(name in mutation.name for name in options.names))
        and mutation.file.startswith(options.files or "")
    ]
    warm_up()
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        copy_repository(root)
        log = root / "output.txt"
        code = run_tests(root, list(dict.fromkeys(mutation.test for mutation in chosen)), log)
        if code != 0:
            sys.stdout.write(log.read_text(encoding="utf-8", errors="replace"))
            sys.stdout.write(f"the tests fail without any mutation (exit code {code})\n")
            return 1
        sys.stdout.write(f"{len(chosen)} mutations; their tests pass on the unchanged copy\n\n{HEADER}\n")
        for mutation in chosen:
            verdict = examine(mutation, root)
            unnoticed += not verdict.noticed
            sys.stdout.write(row(mutation, verdict) + "\n")
            sys.stdout.flush()
    sys.stdout.write(f"\n{len(chosen) - unnoticed} of {len(chosen)} noticed\n")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
