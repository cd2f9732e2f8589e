"""The list of mutations fits the source, and the way it is judged tells red from broken."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.mutations import MUTATIONS, ROOT, Mutation, judge, mutated

KILLED = -9


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_applies_once_and_leaves_valid_python(mutation: Mutation, tmp_path: Path) -> None:
    copy = mutation.path(tmp_path)
    copy.parent.mkdir(parents=True)
    original = mutation.path(ROOT).read_text(encoding="utf-8")
    copy.write_text(original, encoding="utf-8")
    with mutated(mutation, tmp_path):
        changed = copy.read_text(encoding="utf-8")
        assert changed != original
        ast.parse(changed)
    assert copy.read_text(encoding="utf-8") == original


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_named_test_is_there(mutation: Mutation) -> None:
    file, _, name = mutation.test.partition("::")
    functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name.partition("[")[0] in functions


def test_a_source_that_moved_on_is_an_error(tmp_path: Path) -> None:
    mutation = Mutation("gone", "module.py", "no such line", "", "tests/test_x.py::test_y")
    mutation.path(tmp_path).parent.mkdir(parents=True)
    mutation.path(tmp_path).write_text("a = 1\n")
    with pytest.raises(ValueError, match="gone: 'no such line' is 0 times in module.py"), mutated(mutation, tmp_path):
        pass


@pytest.mark.parametrize(
    ("code", "output", "noticed", "reason"),
    [
        (0, "1 passed", False, "the test still passes"),
        (1, "E   assert 1 == 2\nFAILED tests/test_x.py::test_y", True, "assert 1 == 2"),
        (1, "ERROR tests/test_x.py - ImportError", False, "could not run (exit code 1): ERROR tests/test_x.py - ImportError"),
        (KILLED, "", False, "no answer within 120 s"),
        (4, "no such test", False, "could not run (exit code 4): no such test"),
    ],
)  # fmt: skip
def test_only_a_failure_of_the_test_itself_counts(code: int, output: str, noticed: bool, reason: str) -> None:
    assert judge(code, output) == (noticed, reason)


@pytest.mark.reliability
def test_a_hash_that_is_not_compared_turns_its_test_red() -> None:
    command = [sys.executable, "-m", "benchmark.mutations", "SHA-256"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "1 of 1 noticed" in finished.stdout
