"""Requests: what is refused before work, who wakes whom, and that nobody waits for ever."""

import gc
import threading

import pytest

from wrinklefree.serving.engine.protocol import Sampling, Token
from wrinklefree.serving.engine.requests import Request, TokenStream, WorkerPool, check_request, end_tokens_of
from wrinklefree.utils.errors import ConfigError, EngineError
from wrinklefree.utils.tokenizer import TextTokenizer


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], Sampling(1), "the prompt has no tokens"),
        ([1, 10], Sampling(1), "the prompt holds token 10, the vocabulary ends at 9"),
        ([-1], Sampling(1), "the prompt holds token -1"),
        ([1] * 6, Sampling(3), "the prompt has 6 tokens and 3 more were asked for, the context holds 8"),
        ([1], Sampling(-1), "max_tokens is -1"),
        ([1], Sampling(1, temperature=-0.1), "temperature is -0.1"),
        ([1], Sampling(1, temperature=float("nan")), "temperature is nan"),
        ([1], Sampling(1, top_p=0.0), "top_p is 0.0"),
        ([1], Sampling(1, top_k=0), "top_k is 0"),
        ([1], Sampling(1, logprobs=11), "logprobs is 11"),
    ],
)
def test_refused_before_any_work(prompt: list[int], sampling: Sampling, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_request(prompt, sampling, context_length=8, vocab_size=10)


def test_a_prompt_and_continuation_may_fill_the_context() -> None:
    check_request([1] * 5, Sampling(3, temperature=0, top_p=1.0, top_k=1, logprobs=10), context_length=8, vocab_size=10)
    with pytest.raises(ConfigError, match="holds 7"):
        check_request([1] * 5, Sampling(3), context_length=7, vocab_size=10)


def test_end_tokens_are_those_that_exist(tokenizer: TextTokenizer) -> None:
    assert end_tokens_of(tokenizer) == {tokenizer.eos_token_id}
    assert end_tokens_of(tokenizer, [7]) == {tokenizer.eos_token_id, 7}


def counting(request: Request) -> None:
    """Works until the request's limit, or until nobody reads."""
    for index in range(request.sampling.max_tokens):
        if request.cancelled:
            return
        request.put(Token(index))


def test_tokens_come_in_order_then_the_end() -> None:
    pool = WorkerPool(1, counting, name="test")
    stream = pool.submit(Request([1], Sampling(3)))
    assert [token.id for token in stream] == [0, 1, 2]
    assert next(stream, None) is None
    pool.close()


def test_what_a_worker_raises_the_reader_gets_and_the_worker_lives() -> None:
    def work(request: Request) -> None:
        request.put(Token(1))
        if request.prompt == [0]:
            raise EngineError("broken")

    pool = WorkerPool(1, work, name="test")
    stream = pool.submit(Request([0], Sampling(3)))
    assert next(stream) == Token(1)
    with pytest.raises(EngineError, match="broken"):
        next(stream)
    assert next(stream, None) is None
    assert list(pool.submit(Request([1], Sampling(3)))) == [Token(1)]
    pool.close()


def test_cancelled_requests_are_never_begun() -> None:
    gate, begun = threading.Event(), []

    def work(request: Request) -> None:
        begun.append(request.prompt[0])
        assert gate.wait(10)

    pool = WorkerPool(1, work, name="test")
    first = pool.submit(Request([0], Sampling(1)))
    closed = pool.submit(Request([1], Sampling(1)))
    forgotten = pool.submit(Request([2], Sampling(1)))
    last = pool.submit(Request([3], Sampling(1)))
    closed.close()
    del forgotten
    gc.collect()
    gate.set()
    assert list(first) == list(closed) == list(last) == []
    assert begun == [0, 3]
    pool.close()


def test_closing_wakes_a_reader_in_another_thread_and_interrupts_the_worker() -> None:
    started, interrupted = threading.Event(), threading.Event()

    def work(request: Request) -> None:
        request.on_cancel(interrupted.set)
        started.set()
        assert interrupted.wait(10)

    pool = WorkerPool(1, work, name="test")
    stream = pool.submit(Request([1], Sampling(1)))
    seen: list[list[Token]] = []
    reader = threading.Thread(target=lambda: seen.append(list(stream)))
    reader.start()
    assert started.wait(10)  # a request that is cancelled before its turn is never worked on
    stream.close()
    stream.close()
    reader.join(10)
    assert seen == [[]]
    assert interrupted.wait(10)
    pool.close()


def test_an_interrupt_set_after_the_cancel_fires_at_once() -> None:
    request, fired = Request([1], Sampling(1)), []
    request.cancel()
    request.on_cancel(lambda: fired.append(True))
    assert fired == [True]


def test_closing_a_pool_fails_running_and_waiting_requests() -> None:
    running = threading.Event()

    def work(request: Request) -> None:
        woken = threading.Event()
        request.on_cancel(woken.set)
        running.set()
        assert woken.wait(10)

    pool = WorkerPool(1, work, name="test")
    streams = [pool.submit(Request([1], Sampling(1))) for _ in range(3)]
    assert running.wait(10)
    pool.close()
    pool.close()
    for stream in streams:
        with pytest.raises(EngineError, match="closed before the answer was complete"):
            next(stream)
    with pytest.raises(EngineError, match="closed"):
        pool.submit(Request([1], Sampling(1)))
    assert not pool.stuck


def test_a_stream_is_a_context_manager() -> None:
    request = Request([1], Sampling(1))
    with TokenStream(request) as stream:
        request.put(Token(4))
        assert next(stream) == Token(4)
    assert request.cancelled
