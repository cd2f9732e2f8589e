"""A few hundred changed model files, and proof that the outcomes which count as failures are recognised."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmark import mutated_headers
from benchmark.mutated_headers import gguf_fields, gguf_file, outcome, run
from wrinklefree.utils.errors import CheckpointError


def test_changed_files_are_refused_or_read(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    counts = run(300, 0, tmp_path)
    assert counts.total() == 300
    assert {key: count for key, count in counts.items() if key[2] not in {"refused", "read"}} == {}
    # Both ends occur: the changes neither miss the header nor destroy it every time.
    assert {(name, result) for name, _, result in counts} >= {
        ("gguf", "refused"),
        ("gguf", "read"),
        ("safetensors", "refused"),
    }
    record_property("changed_files", counts.total())


def test_the_same_seed_makes_the_same_files(tmp_path: Path) -> None:
    assert run(60, 5, tmp_path) == run(60, 5, tmp_path)


def test_the_walk_finds_every_integer_of_the_header(tmp_path: Path) -> None:
    content = gguf_file(tmp_path)
    offsets = [field for field in gguf_fields(content) if field.kind == "offset"]
    assert len(offsets) == int.from_bytes(content[8:16], "little")
    assert offsets[-1].at + 8 <= len(content)


def fail(_: Path) -> None:
    raise KeyError("torch")


def flood(_: Path) -> None:
    bytearray(2**40)


def babble(_: Path) -> None:
    raise CheckpointError("x" * 5000)


def refuse(_: Path) -> None:
    raise CheckpointError("damaged")


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (fail, "KeyError: 'torch'"),
        (flood, "runaway allocation"),
        (babble, "a message of 5000 characters or several lines"),
        (refuse, "refused"),
        (lambda _: None, "read"),
    ],
)
def test_outcomes_are_told_apart(tmp_path: Path, read, expected: str) -> None:
    with mutated_headers.bounded_memory(2**30):
        assert outcome(read, tmp_path) == expected


def test_the_table_is_printed_and_a_failure_is_an_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mutated_headers.main(["--count", "40"]) == 0
    assert "40 files, 0 failures" in capsys.readouterr().out
    real = mutated_headers.read_whole_gguf
    calls = iter(range(1000))

    def escape(path: Path) -> None:
        # The first call reads the unchanged file.
        if next(calls):
            raise ZeroDivisionError("one")
        real(path)

    monkeypatch.setattr(mutated_headers, "read_whole_gguf", escape)
    assert mutated_headers.main(["--count", "4"]) == 1
    assert "ZeroDivisionError: one" in capsys.readouterr().out
