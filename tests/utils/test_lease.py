import json
import threading

import pytest

from wrinklefree.utils.errors import NetworkError, StorageError
from wrinklefree.utils.lease import LOST_SECONDS, STALE_SECONDS, Lease


class Memory:
    """Versioned objects in memory; `down` makes every call fail."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.lock = threading.Lock()
        self.down = False

    def _check(self) -> None:
        if self.down:
            raise NetworkError("down")

    def read_versioned(self, name: str) -> tuple[bytes, str]:
        self._check()
        with self.lock:
            if name not in self.objects:
                raise FileNotFoundError(name)
            content, version = self.objects[name]
            return content, str(version)

    def create(self, name: str, data: bytes) -> bool:
        self._check()
        with self.lock:
            return self.objects.setdefault(name, (data, 1))[0] is data

    def replace(self, name: str, data: bytes, version: str) -> bool:
        self._check()
        with self.lock:
            if str(self.objects[name][1]) != version:
                return False
            self.objects[name] = (data, int(version) + 1)
            return True


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def never(reason: str) -> None:
    raise AssertionError(reason)


def test_the_second_is_told_who_the_first_is() -> None:
    storage = Memory()
    lease = Lease(storage, on_lost=never)
    with pytest.raises(StorageError, match=r"being written by process \d+ on .* \(since 20"):
        Lease(storage, on_lost=never)
    lease.release()
    lease.release()
    Lease(storage, on_lost=never).release()


def test_a_silent_holder_loses_it_to_exactly_one() -> None:
    storage, clock = Memory(), Clock()
    lost: list[str] = []
    first = Lease(storage, on_lost=lost.append, clock=clock)
    clock.now += STALE_SECONDS - 1
    with pytest.raises(StorageError):
        Lease(storage, on_lost=never, clock=clock)
    clock.now += 2
    winners: list[Lease] = []
    gate = threading.Barrier(8)

    def race() -> None:
        gate.wait()
        try:
            winners.append(Lease(storage, on_lost=never, clock=clock))
        except StorageError:
            return

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert not first.renew()
    first.release()
    assert json.loads(storage.objects["lease.json"][0])["released"] is False
    winners[0].release()
    assert json.loads(storage.objects["lease.json"][0])["released"] is True


def test_losing_it_is_told_once_and_an_outage_is_survived() -> None:
    storage, clock = Memory(), Clock()
    told = threading.Event()
    reasons: list[str] = []

    def on_lost(reason: str) -> None:
        reasons.append(reason)
        told.set()

    lease = Lease(storage, on_lost=on_lost, clock=clock, renew_seconds=0.01)
    storage.down = True
    assert not told.wait(0.1)
    clock.now += LOST_SECONDS + 1
    assert told.wait(5)
    assert reasons == ["the lease could not be renewed for 241 s, and another process may hold it"]
    lease.release()


def test_a_garbled_lease_can_be_taken() -> None:
    storage = Memory()
    storage.create("lease.json", b"\xff not json")
    Lease(storage, on_lost=never).release()
