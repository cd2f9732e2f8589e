"""A small table, with the state sizes that follow from the algorithms."""

import pytest

from benchmark.optimizer_table import main


def test_state_bytes_are_those_of_the_algorithms(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    assert main(["--layers", "1", "--vocabulary", "512", "--rounds", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    state = {cells[1].strip(): float(cells[2]) for line in lines if (cells := line.split("|"))}
    assert state["adamw"] == pytest.approx(8, abs=0.01)
    assert 2 <= state["adamw_8bit"] < 2.2
    assert 4 < state["muon"] < 8
    assert state["apollo_mini"] < state["apollo"] < 8
