"""The reliability table: what was injected into the tests that promise "nothing is lost", and how often.

    uv run python -m benchmark.reliability_table            # about ten minutes on two cores
    uv run python -m benchmark.reliability_table --quick    # without those marked reliability

Runs the tests named below as pytest runs them, and adds up what they record (`record_property`), or their number where they
record nothing. Every one of them asserts that nothing was lost: a count is printed only if its tests passed.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """A kind of fault."""

    fault: str
    tests: tuple[str, ...]
    """Files or node ids; parameters in brackets are left out, so one id names all of a test's cases."""
    passes: str
    """What the tests assert."""
    counted: str = ""
    """The recorded property that counts the faults; empty: one a test."""


_UTILS, _TRAINING, _WHOLE = "tests/utils/test_", "tests/training/test_", "tests/end_to_end/test_"
_CORRUPTION = f"{_UTILS}checkpoint.py::test_every_corruption_is_found_and_the_one_before_is_used"
_TYPOS = "tests/test_composition_typos.py"

ROWS = (
    Row(
        "crash at a file operation of a save",
        (f"{_UTILS}checkpoint.py::test_a_crash_at_any_file_operation_leaves_the_old_or_the_new_state",),
        "old or new state, verified; no partial file",
        "crash_points",
    ),
    Row(
        "SIGKILL of a training command",
        (f"{_WHOLE}killed_run.py::test_four_kills_change_no_weight",),
        "final weights equal to the undisturbed run's, bit by bit",
        "sigkills",
    ),
    Row(
        "stop and resume",
        (f"{_TRAINING}trainer.py::test_a_resumed_run_is_bit_identical",),
        "all weights equal, bit by bit",
    ),
    Row(
        "corruption of a checkpoint",
        (_CORRUPTION,),
        "found, the one before used",
        "corruptions",
    ),
    Row(
        "corruption loaded in silence",
        (_CORRUPTION,),
        "must be 0",
        "corruptions_loaded_silently",
    ),
    Row(
        "bit flips in tensors that a plain loader misses",
        (_CORRUPTION,),
        "for comparison; the manifest found them all",
        "bit_flips_that_a_plain_loader_misses",
    ),
    Row(
        "disk full on the way",
        (f"{_UTILS}checkpoint.py::test_a_disk_that_fills_up_on_the_way_keeps_the_last_good_one",),
        "last good checkpoint intact, no partial file",
        "disk_full_points",
    ),
    Row(
        "SIGTERM, SIGINT",
        (
            f"{_TRAINING}trainer.py::test_a_signal_is_obeyed_and_the_resumed_run_still_validates",
            f"{_WHOLE}killed_run.py::test_terminated_run_saves_and_resumes",
        ),
        "saved, exit code, resumed bit by bit",
    ),
    Row(
        "NaN or infinity in loss, gradient or weight",
        (f"{_TRAINING}trainer.py::test_what_is_not_finite_never_reaches_a_checkpoint",),
        "skipped or aborted; never in a checkpoint",
        "nonfinite_values",
    ),
    Row(
        "racing writers of one object, Go server",
        (f"{_UTILS}gcs_storage.py::test_of_racing_creators_one_wins_on_an_independent_server",),
        "one winner a round",
        "races_with_one_winner",
    ),
    Row(
        "lease of a silent holder, 8 takers",
        (f"{_WHOLE}remote_runs.py::test_of_those_that_take_a_silent_holders_lease_one_wins",),
        "one winner a round",
        "lease_take_overs_with_one_winner",
    ),
    Row(
        "storage server killed while uploading",
        (f"{_WHOLE}remote_runs.py::test_a_server_that_is_killed_in_the_middle_of_an_upload_gets_it_all_in_the_end",),
        "all arrives, nothing twice",
        "servers_killed_while_uploading",
    ),
    Row(
        "faulty reply to a request of a save",
        (f"{_UTILS}mirror.py::test_a_fault_at_any_request_of_a_save_costs_a_retry_and_never_a_blob",),
        "saved; never a manifest without its blobs",
        "faulty_requests",
    ),
    Row(
        "faulty reply to a storage operation",
        (f"{_UTILS}gcs_storage.py::test_a_passing_fault_is_repeated",),
        "repeated, right content",
    ),
    Row(
        "several processes: save at n, resume at m, a rank that cannot write, a rotten part",
        ("tests/training/sharding/test_checkpoints.py",),
        "equal, or refused with a message",
    ),
    Row("misspelt key", (_TYPOS,), "refused in one line that names it", "misspelt_keys"),
    Row(
        "misspelt key without the right suggestion",
        (_TYPOS,),
        "at most 5% of them",
        "misspelt_keys_without_suggestion",
    ),
    Row("misspelt option of a group", (_TYPOS,), "refused in one line", "misspelt_options"),
    Row("value of the wrong kind", (_TYPOS,), "refused in one line", "wrong_values"),
    Row(
        "planted secrets",
        (f"{_UTILS}audit_logger.py::test_no_planted_secret_reaches_a_record_or_the_log",),
        "none in records or log",
        "planted_secrets",
    ),
    Row(
        "changed model file (GGUF, safetensors)",
        ("tests/benchmark/test_mutated_headers.py::test_changed_files_are_refused_or_read",),
        "refused or read, no runaway memory; 10,000 by benchmark.mutated_headers",
        "changed_files",
    ),
    Row(
        "key that must (not) move the fingerprint",
        (f"{_UTILS}run_fingerprint.py",),
        "moves exactly if it decides the result",
    ),
)


@dataclass(frozen=True)
class Case:
    """One test as pytest reports it."""

    test: str
    """Node id without parameters."""
    passed: bool
    skipped: bool
    properties: dict[str, int]


def read_report(path: Path) -> list[Case]:
    """The cases of a JUnit file."""
    cases = []
    for node in ElementTree.parse(path).getroot().iter("testcase"):
        file = node.get("classname", "").replace(".", "/") + ".py"
        failed = any(node.find(kind) is not None for kind in ("failure", "error"))
        values = {p.get("name", ""): p.get("value", "") for p in node.iter("property")}
        counts = {name: int(value) for name, value in values.items() if value.isdigit()}
        name = node.get("name", "").partition("[")[0]
        cases.append(Case(f"{file}::{name}", not failed, node.find("skipped") is not None, counts))
    return cases


def count(row: Row, cases: Sequence[Case]) -> tuple[int | None, str]:
    """(faults injected, verdict) of a row; the count is None where a test failed or none ran."""
    mine = [case for case in cases if any(case.test == test or case.test.startswith(f"{test}::") for test in row.tests)]
    ran = [case for case in mine if not case.skipped]
    if not ran:
        return None, "not run"
    if not all(case.passed for case in ran):
        return None, "**failed**"
    if not row.counted:
        return len(ran), "passed"
    counts = [case.properties[row.counted] for case in ran if row.counted in case.properties]
    return (sum(counts), "passed") if counts else (None, f"**{row.counted} was not recorded**")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests and print the table; 1 if a test failed or counted nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.reliability_table", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave out the tests marked reliability")
    parser.add_argument("--report", type=Path, help="read this JUnit file instead of running the tests")
    options = parser.parse_args(argv)
    tests = list(dict.fromkeys(test for row in ROWS for test in row.tests))
    with tempfile.TemporaryDirectory() as folder:
        report = options.report or Path(folder) / "report.xml"
        if options.report is None:
            marks = "not reliability and not slow" if options.quick else ""
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-m",
                marks,
                "-o",
                "junit_family=xunit1",
                f"--junitxml={report}",
            ]
            subprocess.run([*command, *tests], cwd=ROOT, check=False)
        cases = read_report(report)
    sys.stdout.write("\n| fault | injected | result | what must hold |\n|---|---|---|---|\n")
    verdicts = []
    for row in ROWS:
        number, verdict = count(row, cases)
        verdicts.append(verdict)
        shown = "" if number is None else f"{number:,}"
        sys.stdout.write(f"| {row.fault} | {shown} | {verdict} | {row.passes} |\n")
    return 0 if all(verdict in ("passed", "not run") for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
