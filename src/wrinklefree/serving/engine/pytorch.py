"""Our decoder in PyTorch as an engine: every model that we train, exactly as training computes it.

One thread does all the arithmetic. It takes a step of each request in turn (a chunk of a prompt, or one token), each
with a key-value cache of its own. Batching the requests into one forward pass would be faster; it would also make an
answer depend on who else is asking, because a row's last bits, and so the rounding of its activations, depend on the
shape of the batch. Here the same seed gives the same tokens whatever the load. For the same reason no prompt prefix is
kept between requests.
"""

import logging
import random
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from wrinklefree.models import gguf_weights
from wrinklefree.models.artifact import read_artifact
from wrinklefree.models.attention import KVCache
from wrinklefree.models.bitlinear import quantization_of, set_quantization
from wrinklefree.models.generate import choose_token
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import IGNORE, Batch
from wrinklefree.models.subln import set_subln_strength, subln_strength_of
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
from wrinklefree.utils.errors import EngineError
from wrinklefree.utils.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

PROMPT_CHUNK = 512
"""Prompt tokens a step: the longest that another request waits, or that cancelling takes to be seen."""


class _Sequence:
    """A request in progress: its cache, the tokens still to be fed, its random numbers."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.to_feed = request.prompt
        self.fed = 0
        self.produced = 0
        self.cache = KVCache(1, len(request.prompt) + request.sampling.max_tokens)
        seed = request.sampling.seed
        self.generator = torch.Generator().manual_seed(random.getrandbits(63) if seed is None else seed % (1 << 63))


class TorchEngine:
    """A `CausalLM` on the CPU, or on a GPU where there is one (bfloat16 there, float32 on the CPU)."""

    def __init__(
        self,
        model: CausalLM,
        tokenizer: TextTokenizer,
        *,
        name: str,
        context_length: int,
        slots: int = 4,
        threads: int | None = None,
        end_tokens: Sequence[int] = (),
    ) -> None:
        """Take a model over: it is set to full quantization and full SubLN.

        Args:
            model: On the device where it is to run.
            tokenizer: Its tokenizer.
            name: What /v1/models calls it.
            context_length: Most tokens of a prompt and its continuation.
            slots: Requests in progress at the same time.
            threads: CPU threads of the arithmetic; None leaves PyTorch's choice.
            end_tokens: Tokens that end an answer, beyond those that the tokenizer names.
        """
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens_of(tokenizer, end_tokens)
        self._info = EngineInfo("torch", name, context_length, slots)
        self._threads = threads
        self._device = model.head_weight.device
        self._vocab_size = model.architecture.vocab_size
        self._waiting: deque[Request] = deque()
        self._running: deque[_Sequence] = deque()
        self._change = threading.Condition()
        self._closed = False
        _make_fully_ternary(model, name)
        self._thread = threading.Thread(target=self._serve, name="torch-engine", daemon=True)
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
        check_request(prompt, sampling, context_length=self._info.context_length, vocab_size=self._vocab_size)
        request = Request(prompt, sampling)
        with self._change:
            if self._closed:
                raise closed_error()
            self._waiting.append(request)
            self._change.notify()
        return TokenStream(request)

    def close(self) -> None:
        """Stop the thread and let go of the model; requests under way fail."""
        with self._change:
            self._closed = True
            self._change.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)

    def _serve(self) -> None:
        """The engine's thread: admit, step each running request once, again."""
        if self._threads is not None:
            # OpenMP keeps this number per thread: it counts in the thread that computes.
            torch.set_num_threads(self._threads)
        while self._admit():
            for _ in range(len(self._running)):
                sequence = self._running.popleft()
                if self._step(sequence):
                    self._running.append(sequence)
        for request in [*(sequence.request for sequence in self._running), *self._waiting]:
            request.fail(closed_error())
        self._running.clear()
        self._waiting.clear()
        del self._model

    def _admit(self) -> bool:
        """Fill free slots from the queue, waiting while there is nothing to do; false when the engine closes."""
        with self._change:
            while not (self._closed or self._waiting or self._running):
                self._change.wait()
            while self._waiting and len(self._running) < self._info.slots and not self._closed:
                request = self._waiting.popleft()
                if request.cancelled:
                    continue
                if request.sampling.max_tokens == 0:
                    request.finish()
                    continue
                self._running.append(_Sequence(request))
            return not self._closed

    def _step(self, sequence: _Sequence) -> bool:
        """One chunk of the prompt, or one token; whether there is more to do."""
        request = sequence.request
        if request.cancelled:
            return False
        try:
            logits = self._forward(sequence)
            if logits is None:
                return True
            token = _choose(logits, request.sampling, sequence.generator)
        except torch.OutOfMemoryError:
            request.fail(EngineError("the device ran out of memory for this request; ask for fewer tokens or slots"))
            return False
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

    @torch.inference_mode()
    def _forward(self, sequence: _Sequence) -> Tensor | None:
        """Feed the next chunk; logits [1, V] in float32 on the CPU after the last token, None before."""
        chunk, sequence.to_feed = sequence.to_feed[:PROMPT_CHUNK], sequence.to_feed[PROMPT_CHUNK:]
        ids = torch.tensor([chunk], device=self._device)
        positions = torch.arange(sequence.fed, sequence.fed + len(chunk), device=self._device)[None]
        batch = Batch(ids, torch.full_like(ids, IGNORE), positions, torch.ones_like(ids))
        sequence.fed += len(chunk)
        on_gpu = self._device.type == "cuda"
        with torch.autocast("cuda", dtype=torch.bfloat16) if on_gpu else nullcontext():
            output = self._model(batch, cache=sequence.cache)
            if sequence.to_feed:
                return None
            return (output.hidden[:, -1] @ output.head_weight.to(output.hidden.dtype).T).float().cpu()


def load(path: Path) -> tuple[CausalLM, TextTokenizer]:
    """Model and tokenizer of a GGUF file, an artifact, or the newest artifact of a stage's folder."""
    if path.is_file():
        model, tokenizer = gguf_weights.load_gguf_model(path)
    else:
        artifact = read_artifact(path)
        model, tokenizer = artifact.load_model(), artifact.load_tokenizer()
    return model.to("cuda") if torch.cuda.is_available() else model, tokenizer


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Token:
    """The next token from logits [1, V], with the log-probabilities that were asked for."""
    chosen = int(
        choose_token(
            logits,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            generator=generator,
        )
    )
    if sampling.logprobs is None:
        return Token(chosen)
    logprobs = logits[0].log_softmax(dim=-1)
    best = logprobs.topk(sampling.logprobs)
    alternatives = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(chosen, float(logprobs[chosen]), alternatives)


def _make_fully_ternary(model: CausalLM, name: str) -> None:
    """Inference is at lambda = 1 and full SubLN; a model that has not come so far is served with a warning."""
    if model.bitnet is None:
        return
    quantization, strength = quantization_of(model), subln_strength_of(model)
    if quantization < 1 or strength < 1:
        logger.warning(
            "%s was saved at lambda %.3g and SubLN strength %.3g and is served at 1 and 1: finish its warm-up for "
            "answers that mean something",
            name,
            quantization,
            strength,
        )
    set_quantization(model, 1.0)
    set_subln_strength(model, 1.0)
