"""The CPU engine behind the seam of `engine.protocol`: several requests share each read of the weights.

One thread runs steps. A step holds one token of every sequence that is generating and, in what room is left, the next
pieces of prompts, oldest request first: nobody waits for another's long prompt longer than one step. Since no bit of a
token's logits depends on what it shares a step with, the same seed gives the same tokens whatever the load.

A slot keeps what it computed after its request has ended. A new prompt takes the longest common beginning from whatever
slot has it, so a conversation's earlier turns and a shared system prompt are computed once.
"""

import logging
import os
import random
import threading
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from wrinklefree.serving.engine.native.model import CacheType, NativeModel, NativeOptions, PackedModel
from wrinklefree.serving.engine.native.sampling import choose
from wrinklefree.serving.engine.protocol import EngineInfo, Sampling, Token
from wrinklefree.serving.engine.requests import (
    JOIN_SECONDS,
    Request,
    TokenStream,
    check_request,
    close_at_exit,
    closed_error,
    end_tokens_of,
)
from wrinklefree.utils.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

STEP_TOKENS = 256
"""Most tokens of a step: the integer kernels are at their peak, and other requests wait for one step at most."""


class _Sequence:
    """A request at work in a slot."""

    def __init__(self, request: Request, slot: int, reused: int) -> None:
        self.request = request
        self.slot = slot
        self.to_feed = request.prompt[reused:]
        self.produced = 0
        seed = request.sampling.seed
        self.random = np.random.Generator(np.random.PCG64(random.getrandbits(63) if seed is None else seed % (1 << 63)))


class NativeEngine:
    """A packed model that answers requests."""

    def __init__(
        self,
        packed: PackedModel,
        tokenizer: TextTokenizer,
        *,
        name: str,
        context_length: int,
        slots: int = 4,
        threads: int | None = None,
        cache: CacheType = "f16",
        end_tokens: Sequence[int] = (),
    ) -> None:
        """Take a packed model over; its cache for all slots is allocated now, and filled as used.

        Args:
            packed: The model.
            tokenizer: Its tokenizer.
            name: What /v1/models calls it.
            context_length: Most tokens of a prompt and its continuation.
            slots: Requests in progress at the same time.
            threads: CPU threads of the arithmetic; None: one for every core that this process may use.
            cache: Precision of keys and values.
            end_tokens: Tokens that end an answer, beyond those that the tokenizer names.
        """
        # A step must hold a token of every slot.
        options = NativeOptions(
            context_length,
            slots=slots,
            max_tokens=max(STEP_TOKENS, slots),
            threads=_cores() if threads is None else threads,
            cache=cache,
        )
        _warn_of_warm_up(packed, name)
        self._model = NativeModel(packed, options)
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens_of(tokenizer, end_tokens)
        self._info = EngineInfo("native", name, context_length, slots)
        self._held: list[list[int]] = [[] for _ in range(slots)]
        """Tokens whose keys and values each slot holds."""
        self._waiting: deque[Request] = deque()
        self._running: list[_Sequence] = []
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="native-engine", daemon=True)
        self._thread.start()
        close_at_exit(self)

    @property
    def info(self) -> EngineInfo:
        """Name, model and limits."""
        return self._info

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the model."""
        return self._tokenizer

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a continuation; they are not part of it."""
        return self._end_tokens

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Token]:
        """Queue a request; its tokens, as they come.

        Raises:
            ConfigError: the request cannot be answered (see `check_request`).
            EngineError: the engine is closed.
        """
        check_request(prompt, sampling, context_length=self._info.context_length, vocab_size=self._model.vocab_size)
        request = Request(prompt, sampling)
        with self._change:
            if self._closed:
                raise closed_error()
            self._waiting.append(request)
            self._change.notify()
        return TokenStream(request)

    def close(self) -> None:
        """Stop the thread and free the model; requests under way fail."""
        with self._change:
            self._closed = True
            self._change.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)

    def _serve(self) -> None:
        """The engine's thread: admit, run a step, hand its tokens out, again."""
        while self._admit():
            try:
                self._step()
            except Exception as error:  # noqa: BLE001 - the engine must survive; every reader raises it
                for sequence in self._running:
                    sequence.request.fail(error)
                    self._held[sequence.slot] = []
                self._running.clear()
        for request in [*(sequence.request for sequence in self._running), *self._waiting]:
            request.fail(closed_error())
        self._running.clear()
        self._waiting.clear()
        self._model.close()

    def _admit(self) -> bool:
        """Drop cancelled requests, fill free slots, wait while there is nothing to do; false when the engine closes."""
        with self._change:
            self._running = [sequence for sequence in self._running if not sequence.request.cancelled]
            while not (self._closed or self._waiting or self._running):
                self._change.wait()
            while self._waiting and len(self._running) < self._info.slots and not self._closed:
                request = self._waiting.popleft()
                if request.cancelled:
                    continue
                if request.sampling.max_tokens == 0:
                    request.finish()
                    continue
                self._running.append(self._place(request))
            return not self._closed

    def _place(self, request: Request) -> _Sequence:
        """Choose a free slot and reuse the longest beginning of the prompt that any slot holds."""
        busy = {sequence.slot for sequence in self._running}
        free = [slot for slot in range(self._info.slots) if slot not in busy]
        common = [_common_length(held, request.prompt) for held in self._held]
        source = max(range(self._info.slots), key=lambda slot: common[slot])
        # The last token is always fed: its logits are what is asked for.
        reused = min(common[source], len(request.prompt) - 1)
        # Of the slots without a use for this prompt, the one that loses least.
        target = source if reused and source in free else min(free, key=lambda slot: len(self._held[slot]))
        if source != target and common[target] < reused:
            self._model.copy_prefix(source, target, reused)
        self._held[target] = request.prompt[:reused]
        return _Sequence(request, target, reused)

    def _step(self) -> None:
        """One call of the model, for as many sequences and prompt tokens as fit."""
        room = self._model.options.max_tokens
        ids, slots, positions, wanted = [list[int]() for _ in range(4)]
        finished: list[_Sequence] = []
        # Those that generate feed one token each and go first, so that a prompt cannot starve them.
        for sequence in sorted(self._running, key=lambda sequence: sequence.produced == 0):
            held = self._held[sequence.slot]
            part, sequence.to_feed = sequence.to_feed[:room], sequence.to_feed[room:]
            ids += part
            slots += [sequence.slot] * len(part)
            positions += range(len(held), len(held) + len(part))
            held += part
            room -= len(part)
            if part and not sequence.to_feed:
                wanted.append(len(ids) - 1)
                finished.append(sequence)
        for sequence, logits in zip(finished, self._model.step(ids, slots, positions, wanted), strict=True):
            if not self._take(sequence, logits):
                self._running.remove(sequence)

    def _take(self, sequence: _Sequence, logits: NDArray[np.float32]) -> bool:
        """Choose a sequence's next token and hand it out; whether it goes on."""
        request = sequence.request
        try:
            token = choose(logits, request.sampling, sequence.random)
        except Exception as error:  # noqa: BLE001 - one request's failure is not the engine's; its reader raises it
            request.fail(error)
            return False
        if token.id in self._end_tokens:
            request.finish()
            return False
        request.put(token)
        sequence.produced += 1
        sequence.to_feed = [token.id]
        if sequence.produced == request.sampling.max_tokens:
            request.finish()
            return False
        return True


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _warn_of_warm_up(packed: PackedModel, name: str) -> None:
    """Inference is at lambda = 1 and full SubLN, wherever training stopped."""
    quantization, strength = packed.bitnet.quantization_lambda, packed.bitnet.subln_strength
    if quantization < 1 or strength < 1:
        logger.warning(
            "%s was saved at lambda %.3g and SubLN strength %.3g and is served at 1 and 1: finish its warm-up for "
            "answers that mean something",
            name,
            quantization,
            strength,
        )


def _common_length(held: Sequence[int], prompt: Sequence[int]) -> int:
    """How many first tokens are the same."""
    for index, (ours, theirs) in enumerate(zip(held, prompt, strict=False)):
        if ours != theirs:
            return index
    return min(len(held), len(prompt))
