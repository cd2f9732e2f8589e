"""Counts are those of tests that passed, and every test of the table exists."""

import ast
from pathlib import Path

import pytest

from benchmark.reliability_table import ROOT, ROWS, Case, Row, count, main, read_report

ROW = Row("fault", ("tests/test_a.py::test_b",), "holds", "faults")


def case(name: str = "test_b", *, passed: bool = True, skipped: bool = False, **properties: int) -> Case:
    return Case(f"tests/test_a.py::{name}", passed, skipped, properties)


def test_counts_are_added_over_the_cases_that_ran() -> None:
    cases = [case(faults=3), case(faults=4), case(skipped=True), case("test_c", faults=100)]
    assert count(ROW, cases) == (7, "passed")
    assert count(Row("fault", ("tests/test_a.py",), "holds"), cases) == (3, "passed")


def test_a_failure_hides_the_count_and_silence_is_no_pass() -> None:
    assert count(ROW, [case(faults=3), case(passed=False)]) == (None, "**failed**")
    assert count(ROW, [case()]) == (None, "**faults was not recorded**")
    assert count(ROW, [case(skipped=True)]) == (None, "not run")


def test_a_report_is_read_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.xml"
    case_head = '<testcase classname="tests.utils.test_checkpoint" '
    name = "test_a_crash_at_any_file_operation_leaves_the_old_or_the_new_state"
    recorded = '<properties><property name="crash_points" value="87"/></properties>'
    head = f'<testsuites><testsuite>{case_head}name="{name}">'
    tail = "</testcase></testsuite></testsuites>"
    report.write_text(head + recorded + tail)
    assert read_report(report) == [Case(f"tests/utils/test_checkpoint.py::{name}", True, False, {"crash_points": 87})]
    assert main(["--report", str(report)]) == 0
    assert "| crash at a file operation of a save | 87 | passed |" in capsys.readouterr().out
    report.write_text(head + recorded + "<failure/>" + tail)
    assert main(["--report", str(report)]) == 1


@pytest.mark.parametrize("test", sorted({test for row in ROWS for test in row.tests}))
def test_every_test_of_the_table_exists(test: str) -> None:
    file, _, name = test.partition("::")
    functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert not name or name in functions
