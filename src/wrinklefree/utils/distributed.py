"""Which process this is, decisions that all processes share, and small sums over them.

No rank ever decides alone: two ranks that look at a folder a moment apart may see different things, and a run in
which one rank skips while the others train hangs.

Control traffic (counts, flags, decisions) is of CPU tensors and goes through gloo even where gradients go through NCCL:
it neither waits for the device nor stands in its queue. Alone, every function here costs nothing.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed

from wrinklefree.utils.errors import RankLostError, WrinkleFreeError

SECONDS_TO_REPORT = 5.0
"""How long a rank that lost a peer waits for the others to say that they are alive."""
_ALIVE = "wrinklefree/alive"

Decision = TypeVar("Decision")


def _initialised() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """This process's number; before the process group exists, the launcher's word for it."""
    return torch.distributed.get_rank() if _initialised() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together; before the process group exists, the launcher's word for it."""
    return torch.distributed.get_world_size() if _initialised() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and speaks to the user."""
    return rank() == 0


def local_rank() -> int:
    """This process's number on its machine: the GPU that it uses."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def process_group(timeout_minutes: float, *, alone: bool = False) -> Generator[None]:
    """The group of the processes that `torchrun` started; left without one where there is a single process.

    Args:
        timeout_minutes: How long a collective may wait for a rank before the run ends.
        alone: Make a group also for a single process, for what cannot do without.

    Raises:
        RankLostError: on leaving, when another rank died or stopped answering: it is named.
    """
    if _initialised() or (world_size() == 1 and not alone):
        yield
        return
    timeout = timedelta(minutes=timeout_minutes)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group(backend, timeout=timeout)
    else:
        store = cast("Any", torch.distributed).HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    try:
        with naming_lost_ranks():
            yield
    finally:
        # A rank that died leaves connections that cannot be closed in good order.
        with suppress(RuntimeError):
            torch.distributed.destroy_process_group()


@contextmanager
def naming_lost_ranks() -> Generator[None]:
    """Turn a collective that failed into an error that names the ranks which do not answer any more.

    Every rank that sees a collective fail says in the group's store that it is alive; whoever is silent then is lost.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not _is_collective_failure(error):
            raise
        with _sparing_from_the_launcher():
            lost = _silent_ranks()
        if lost is None:
            named = "rank 0 (it kept the group's store)"
        elif lost:
            named = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}"
        else:
            raise
        raise RankLostError(
            f"lost {named} of {world_size()}: killed, crashed, or silent for longer than distributed.timeout_minutes. "
            "Look at that process's last lines; the same command resumes from the newest checkpoint"
        ) from error


@contextmanager
def _sparing_from_the_launcher() -> Generator[None]:
    """Hold back SIGTERM: a launcher sends it to all as soon as one is lost, and somebody must say what happened."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_collective_failure(error: RuntimeError) -> bool:
    text = str(error).lower()
    distributed = isinstance(error, torch.distributed.DistError)
    return distributed or any(word in text for word in ("gloo", "nccl", "connection closed", "socket", "timed out"))


def _silent_ranks() -> list[int] | None:
    """Ranks that do not report within `SECONDS_TO_REPORT`; None when the store itself is gone."""
    store = cast("Any", torch.distributed.distributed_c10d)._get_default_store()
    try:
        store.set(f"{_ALIVE}/{rank()}", b"1")
        end = time.monotonic() + SECONDS_TO_REPORT
        silent = [number for number in range(world_size()) if number != rank()]
        while silent and time.monotonic() < end:
            silent = [number for number in silent if not store.check([f"{_ALIVE}/{number}"])]
            time.sleep(0.1)
    except RuntimeError:
        return None
    return silent


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise sums over all ranks, in float64; the values themselves where there is one."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return cast("list[float]", cast("Any", total).tolist())


def largest_of_ranks(value: float) -> float:
    """The largest of all ranks' values."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return float(largest)


def gather_on_all(value: Decision, group: Any = None) -> list[Decision]:
    """The values of all ranks, by rank; pickled, so small."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def decide_on_rank_zero(decide: Callable[[], Decision], group: Any = None) -> Decision:
    """Call `decide` on rank 0 only and return its result on every rank; `group` is one of all ranks.

    When it raises, every rank raises: rank 0 its own error, the others the same if it is one of ours (so that all end
    with one exit code), else a `RuntimeError` that quotes it.
    """
    if world_size() == 1:
        return decide()
    if not _initialised():
        raise RuntimeError(f"WORLD_SIZE is {world_size()}, but the process group is not initialised yet")
    outcome: list[tuple[Decision | None, BaseException | None]] = [(None, None)]
    if not is_main():
        torch.distributed.broadcast_object_list(outcome, src=0, group=group)
        result, error = outcome[0]
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]  # rank 0 sent either an error or a Decision
    try:
        decision = decide()
    except BaseException as error:
        told = error if isinstance(error, WrinkleFreeError) else RuntimeError(f"rank 0 failed: {error!r}")
        torch.distributed.broadcast_object_list([(None, told)], src=0, group=group)
        raise
    torch.distributed.broadcast_object_list([(decision, None)], src=0, group=group)
    return decision
