"""What every engine does with a request before and around the forward pass: check it, queue it, stream its tokens.

A `Request` is shared between the thread that works on it and the one that reads. The reader holds a `TokenStream`; when
that is closed or forgotten, the request is cancelled and the worker drops it at its next look. Nothing polls: readers
wait on a queue, workers on another.
"""

import atexit
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from types import TracebackType

from wrinklefree.serving.engine.protocol import Sampling, Token
from wrinklefree.utils.errors import ConfigError, EngineError
from wrinklefree.utils.tokenizer import TextTokenizer

JOIN_SECONDS = 30.0
"""Longest that closing an engine waits for a worker; a worker looks at its request after every token or prompt chunk."""

END_OF_TURN = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>",
)  # fmt: skip
"""Tokens that end a text or a turn in the families that we train, whichever of them the tokenizer calls eos. llama.cpp
stops at them as well."""


def end_tokens_of(tokenizer: TextTokenizer, more: Sequence[int] = ()) -> frozenset[int]:
    """Tokens that end a continuation: eos, `more` (ids that a file names), and those of `END_OF_TURN` that exist."""
    found = {tokenizer.eos_token_id, *more}
    for word in END_OF_TURN:
        ids = tokenizer.encode(word)
        if len(ids) == 1 and tokenizer.token(ids[0]) == word:
            found.add(ids[0])
    return frozenset(found)


def check_request(prompt: Sequence[int], sampling: Sampling, *, context_length: int, vocab_size: int) -> None:
    """Refuse what no engine could answer, before any work.

    Raises:
        ConfigError: an empty prompt, an id outside of the vocabulary, a prompt and continuation longer than the context,
            or a sampling setting outside of its range.
    """
    if not prompt:
        raise ConfigError("the prompt has no tokens; give at least one")
    outside = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise ConfigError(f"the prompt holds token {outside}, the vocabulary ends at {vocab_size - 1}")
    if sampling.max_tokens < 0:
        raise ConfigError(f"max_tokens is {sampling.max_tokens}; give 0 or more")
    if len(prompt) + sampling.max_tokens > context_length:
        raise ConfigError(
            f"the prompt has {len(prompt)} tokens and {sampling.max_tokens} more were asked for, the context holds "
            f"{context_length}; shorten the prompt, ask for fewer, or start with a longer context"
        )
    if not 0 <= sampling.temperature < float("inf"):
        raise ConfigError(f"temperature is {sampling.temperature}; give a number from 0 (greedy) up")
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        raise ConfigError(f"top_p is {sampling.top_p}; give a number above 0, at most 1")
    if sampling.top_k is not None and sampling.top_k < 1:
        raise ConfigError(f"top_k is {sampling.top_k}; give 1 or more")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= vocab_size:
        raise ConfigError(f"logprobs is {sampling.logprobs}; give 0 to {vocab_size}")


class _End:
    """Marks the end of a request's tokens."""


_END = _End()


class Request:
    """One prompt on its way through an engine: the worker puts tokens, the reader's `TokenStream` takes them."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling) -> None:
        self.prompt = list(prompt)
        self.sampling = sampling
        self._items: SimpleQueue[Token | BaseException | _End] = SimpleQueue()
        self._lock = threading.Lock()
        self._cancelled = False
        self._interrupt: Callable[[], None] | None = None

    @property
    def cancelled(self) -> bool:
        """Whether nobody reads any more; the worker looks at this between tokens."""
        return self._cancelled

    def put(self, token: Token) -> None:
        """Hand a token to the reader."""
        self._items.put(token)

    def finish(self) -> None:
        """No more tokens."""
        self._items.put(_END)

    def fail(self, error: BaseException) -> None:
        """No more tokens, for this reason: the reader raises it."""
        self._items.put(error)

    def cancel(self) -> None:
        """Wake the reader with the end, and the worker out of a blocking read; may be called twice and from any thread."""
        with self._lock:
            already, self._cancelled = self._cancelled, True
            interrupt = self._interrupt
        if already:
            return
        self._items.put(_END)
        if interrupt is not None:
            interrupt()

    def on_cancel(self, interrupt: Callable[[], None] | None) -> None:
        """What wakes the worker from a blocking read; called at once where the request is cancelled already."""
        with self._lock:
            self._interrupt = interrupt
            already = self._cancelled
        if already and interrupt is not None:
            interrupt()

    def take(self) -> Token | None:
        """Wait for the next token; None at the end."""
        item = self._items.get()
        if isinstance(item, Token):
            return item
        if isinstance(item, _End):
            return None
        raise item


class TokenStream(Iterator[Token]):
    """Tokens of one request. Closing it, from any thread, cancels the request; so does forgetting it."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._over = False

    def __next__(self) -> Token:
        if self._over:
            raise StopIteration
        try:
            token = self._request.take()
        except BaseException:
            self._over = True
            raise
        if token is None or self._over:
            self._over = True
            raise StopIteration
        return token

    def close(self) -> None:
        """Give the request up; a reader that waits in another thread sees the end."""
        self._over = True
        self._request.cancel()

    def __enter__(self) -> "TokenStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._request.cancel()


class WorkerPool:
    """`slots` threads that work on requests one by one, first come first served.

    `work` puts tokens into the request and returns at its end; what it raises is raised to the reader.
    """

    def __init__(self, slots: int, work: Callable[[Request], None], *, name: str) -> None:
        self._work = work
        self._waiting: SimpleQueue[Request | None] = SimpleQueue()
        self._running: set[Request] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{index}", daemon=True) for index in range(slots)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Request) -> TokenStream:
        """Queue a request.

        Raises:
            EngineError: the pool is closed.
        """
        with self._lock:
            if self._closed:
                raise closed_error()
            self._waiting.put(request)
        return TokenStream(request)

    def close(self) -> None:
        """Fail waiting requests, end running ones, join the threads."""
        with self._lock:
            if not self._closed:
                self._closed = True
                fail_all(self._waiting)
                for request in self._running:
                    request.fail(closed_error())
                    request.cancel()
                for _ in self._threads:
                    self._waiting.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(JOIN_SECONDS)

    @property
    def stuck(self) -> bool:
        """Whether a thread is still at work after `close`."""
        return any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (request := self._waiting.get()) is not None:
            if request.cancelled:
                continue
            with self._lock:
                if self._closed:
                    request.fail(closed_error())
                    continue
                self._running.add(request)
            try:
                self._work(request)
                request.finish()
            except BaseException as error:  # noqa: BLE001 - a worker must survive; the reader gets it
                request.fail(error)
            finally:
                with self._lock:
                    self._running.discard(request)


def fail_all(waiting: "SimpleQueue[Request | None]") -> None:
    """Fail everything that waits."""
    while True:
        try:
            request = waiting.get_nowait()
        except Empty:
            return
        if request is not None:
            request.fail(closed_error())


def closed_error() -> EngineError:
    """What a request gets when its engine goes away."""
    return EngineError("the engine was closed before the answer was complete; start it again")


def close_at_exit(engine: object) -> None:
    """Close an engine when the interpreter ends, if it is still alive then.

    A thread inside native code must not outlive the interpreter; normal shutdown waits for no daemon thread.
    """
    reference = weakref.ref(engine)

    def close() -> None:
        living = reference()
        if living is not None:
            living.close()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]

    atexit.register(close)
