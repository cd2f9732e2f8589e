import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed

from wrinklefree.utils.distributed import decide_on_rank_zero, is_main, rank, world_size
from wrinklefree.utils.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def on_two_ranks(tmp_path: Path, action: Callable[[], str]) -> list[str]:
    """What `action` returns on rank 0 and 1 of a gloo group."""
    pids: list[int] = []
    for number in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                torch.distributed.init_process_group(
                    "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=number, world_size=2
                )
                (tmp_path / str(number)).write_text(action())
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return [(tmp_path / str(number)).read_text() for number in range(2)]


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
