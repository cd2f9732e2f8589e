"""Blocking engines under an asyncio server: a bounded number at work, a bounded number waiting, none left behind.

Each request at work has a thread that pulls the engine's iterator and hands its text over to the event loop. Whoever goes
away closes the engine's token stream from outside, which wakes the thread even in the middle of a long prompt; a plain
generator, which cannot be closed while it runs, is closed by the thread at its next token. A slot is free again when its
thread is through, not when its client has left.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import GeneratorType
from typing import Any, TypeVar

from wrinklefree.serving.engine.protocol import Token

Item = TypeVar("Item")
logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """As many requests wait as may."""


class StoppingError(Exception):
    """The server takes no further work."""


class _End:
    """No more items."""


class Slots:
    """Admission to the engine: first come, first served. Used from one event loop."""

    def __init__(self, slots: int, max_waiting: int) -> None:
        """Allow `slots` requests at work and `max_waiting` in line."""
        self.slots = slots
        self.max_waiting = max_waiting
        self.used = 0
        self._waiting: list[asyncio.Future[None]] = []
        self._stopping = False
        self._listening: set[asyncio.Queue[Any]] = set()

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._waiting)

    async def acquire(self) -> None:
        """Wait for a slot; `release` gives it back.

        Raises:
            QueueFullError: the line is as long as it may be.
            StoppingError: the server stops, now or while waiting.
        """
        if self._stopping:
            raise StoppingError
        if self.used < self.slots and not self._waiting:
            self.used += 1
            return
        if len(self._waiting) >= self.max_waiting:
            raise QueueFullError
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.release()  # the slot came at the moment of giving up
            raise
        finally:
            if turn in self._waiting:
                self._waiting.remove(turn)

    def release(self) -> None:
        """Hand the slot to the next in line, or free it."""
        while self._waiting:
            turn = self._waiting.pop(0)
            if not turn.done():
                turn.set_result(None)
                return
        self.used -= 1

    def stop(self) -> None:
        """Turn away those in line and everybody after them; those at work go on."""
        self._stopping = True
        for turn in self._waiting:
            if not turn.done():
                turn.set_exception(StoppingError())

    def abort(self) -> None:
        """Break off those at work: they get a `StoppingError`."""
        for items in self._listening:
            items.put_nowait(StoppingError())

    @contextmanager
    def listening(self, items: "asyncio.Queue[Any]") -> Iterator[None]:
        """Have `abort` reach whoever reads these items."""
        self._listening.add(items)
        try:
            yield
        finally:
            self._listening.discard(items)


class Work:
    """One request at work: knows the token stream to close when nobody listens any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens: Iterator[Token] | None = None
        self._abandoned = False

    @property
    def abandoned(self) -> bool:
        """Whether nobody listens any more."""
        return self._abandoned

    def watch(self, tokens: Iterator[Token]) -> Iterator[Token]:
        """Take over a stream that the engine opened; returns it."""
        with self._lock:
            self._tokens = tokens
            abandoned = self._abandoned
        if abandoned:
            _close(tokens)
        return tokens

    def abandon(self) -> None:
        """End the work. From any thread, any number of times."""
        with self._lock:
            self._abandoned = True
            tokens = self._tokens
        if not isinstance(tokens, GeneratorType):
            _close(tokens)


@asynccontextmanager
async def in_background(
    slots: Slots, start: Callable[[Work], Iterator[Item]], *, deadline: float, tick_seconds: float
) -> AsyncIterator[AsyncIterator[Item | None]]:
    """Run `start(work)` and its iterator in a thread, inside a slot; yields its items. Leaving ends the work.

    Args:
        slots: Where to wait.
        start: Opens the iterator, in the thread.
        deadline: The loop's time after which waiting and working end with `TimeoutError`.
        tick_seconds: None is yielded each time that nothing came for so long.

    Raises:
        QueueFullError, StoppingError: from `Slots.acquire`; the latter also from `Slots.abort`.
        TimeoutError: in line, or at work, for too long.
    """
    async with asyncio.timeout_at(deadline):
        await slots.acquire()
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[Item | BaseException | _End] = asyncio.Queue()
    work = Work()

    def hand_over(call: Callable[..., None], *arguments: object) -> None:
        try:
            loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens
            work.abandon()

    def run() -> None:
        source: Iterator[Item] | None = None
        try:
            source = start(work)
            for item in source:
                if work.abandoned:
                    break
                hand_over(items.put_nowait, item)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the request must learn of it
            hand_over(items.put_nowait, error)
        finally:
            _close(source)
            hand_over(items.put_nowait, _End())
            hand_over(slots.release)

    async def received() -> AsyncIterator[Item | None]:
        while True:
            until = min(deadline, loop.time() + tick_seconds)
            try:
                async with asyncio.timeout_at(until):
                    item = await items.get()
            except TimeoutError:
                if loop.time() >= deadline:
                    raise
                yield None
                continue
            if isinstance(item, _End):
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    try:
        threading.Thread(target=run, name="generation", daemon=True).start()
    except RuntimeError:  # the system gives no more threads
        slots.release()
        raise
    try:
        with slots.listening(items):
            yield received()
    finally:
        work.abandon()


def _close(source: Iterator[object] | None) -> None:
    close = getattr(source, "close", None)
    if close is not None:
        try:
            close()
        except Exception:
            logger.exception("an engine failed while a request was closed")
