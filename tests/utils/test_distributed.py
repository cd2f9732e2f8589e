import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed

from wrinklefree.utils.distributed import (
    decide_on_rank_zero,
    gather_on_all,
    is_main,
    largest_of_ranks,
    naming_lost_ranks,
    rank,
    sum_over_ranks,
    world_size,
)
from wrinklefree.utils.errors import ConfigError, RankLostError

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def on_two_ranks(tmp_path: Path, action: Callable[[], str]) -> list[str]:
    """What `action` returns on rank 0 and 1 of a gloo group."""
    return on_ranks(2, tmp_path, action)


def on_ranks(count: int, tmp_path: Path, action: Callable[[], str]) -> list[str]:
    """What `action` returns on each rank of a gloo group; empty where it did not return."""
    pids: list[int] = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                torch.distributed.init_process_group(
                    "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=number, world_size=count
                )
                (tmp_path / str(number)).touch()
                (tmp_path / str(number)).write_text(action())
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return [(tmp_path / str(number)).read_text() for number in range(count)]


def test_alone_everything_is_decided_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (rank(), world_size(), is_main()) == (0, 1, True)
    assert decide_on_rank_zero(lambda: "skip") == "skip"


def test_before_the_group_exists_the_launcher_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (rank(), world_size(), is_main()) == (3, 4, False)
    with pytest.raises(RuntimeError, match="WORLD_SIZE is 4, but the process group is not initialised"):
        decide_on_rank_zero(lambda: "skip")


def test_all_ranks_get_the_decision_of_rank_zero(tmp_path: Path) -> None:
    assert on_two_ranks(tmp_path, lambda: decide_on_rank_zero(lambda: f"decided by {rank()}")) == ["decided by 0"] * 2


def test_an_error_of_rank_zero_is_everybodys(tmp_path: Path) -> None:
    def action() -> str:
        messages: list[str] = []
        for error in (ConfigError("no such model"), KeyError("x")):

            def fail(error: Exception = error) -> None:
                raise error

            try:
                decide_on_rank_zero(fail)
            except (ConfigError, KeyError, RuntimeError) as caught:
                messages.append(f"{type(caught).__name__}: {caught}")
        return "; ".join(messages)

    assert on_two_ranks(tmp_path, action) == [
        "ConfigError: no such model; KeyError: 'x'",
        "ConfigError: no such model; RuntimeError: rank 0 failed: KeyError('x')",
    ]


def test_sums_and_the_largest_are_those_of_all_ranks(tmp_path: Path) -> None:
    def action() -> str:
        return f"{sum_over_ranks([1.0, 2.5 * rank()])} {largest_of_ranks(rank() + 10)} {gather_on_all(rank())}"

    assert on_ranks(3, tmp_path, action) == ["[3.0, 7.5] 12.0 [0, 1, 2]"] * 3
    assert sum_over_ranks([0.1, 3]) == [0.1, 3]
    assert (largest_of_ranks(4), gather_on_all("x")) == (4, ["x"])


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_dies_is_named_by_all_others(lost: int, tmp_path: Path) -> None:
    def action() -> str:
        largest_of_ranks(0)
        if rank() == lost:
            os._exit(9)
        try:
            with naming_lost_ranks():
                while True:
                    largest_of_ranks(0)
        except RankLostError as error:
            return str(error)

    told = on_ranks(3, tmp_path, action)
    assert told[lost] == ""
    for number in {0, 1, 2} - {lost}:
        assert told[number].startswith(f"lost rank {lost} of 3: killed, crashed, or silent for longer than")


def test_a_rank_that_sleeps_past_the_timeout_is_named(tmp_path: Path) -> None:
    def action() -> str:
        group = torch.distributed.new_group(timeout=timedelta(seconds=1))
        if rank() == 1:
            time.sleep(8)
            return "slept"
        try:
            with naming_lost_ranks():
                torch.distributed.barrier(group)
        except RankLostError as error:
            return str(error)
        return "no error"

    told = on_ranks(2, tmp_path, action)
    assert told[0].startswith("lost rank 1 of 2")
    assert told[1] == "slept"


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="^a defect$"), naming_lost_ranks():
        raise RuntimeError("a defect")
