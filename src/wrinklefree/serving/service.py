"""What stands behind the HTTP API: one engine, its state, its line of requests, and how a request becomes its work.

Nothing here knows about routes; failures are `ApiError`s, which carry the status and body that a client gets.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from fastapi.responses import JSONResponse, Response

from wrinklefree.serving.api_replies import error_body
from wrinklefree.serving.api_types import ChatRequest, RequestError, decode_chat, decode_completion
from wrinklefree.serving.chat_text import ChatPrompt, encode_prompt
from wrinklefree.serving.engine.protocol import Engine, Sampling
from wrinklefree.serving.generations import QueueFullError, Slots, StoppingError, Work
from wrinklefree.serving.metrics import Metrics
from wrinklefree.serving.text_stream import Finish, Piece, TokenBytes, stream_text
from wrinklefree.utils.errors import ConfigError, DataError, EngineError

LOADING_RETRY_SECONDS = 2
BUSY_RETRY_SECONDS = 1
PLANNING_AT_ONCE = 2
"""Requests that are decoded and tokenized at the same time: a large one takes memory and a core."""
Kind = Literal["chat", "completion"]
State = Literal["loading", "ready", "stopping"]
Event = tuple[int, Piece | Finish]

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        parameter: str | None = None,
        code: str | None = None,
        retry: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(status, message, parameter=parameter, code=code)
        self.headers = {} if retry is None else {"retry-after": str(retry)}

    def response(self) -> Response:
        """The error as an answer."""
        return JSONResponse(self.body, self.status, self.headers)


@dataclass(frozen=True)
class ServiceSettings:
    """Bounds on what the engine is asked to do."""

    max_tokens: int | None = None
    """Most tokens of one answer; None: what the context holds."""
    max_queue: int = 64
    """Requests that may wait for a slot; the next one is told to come back."""
    request_seconds: float = 600.0
    """Longest time from a request's arrival to its last token."""


@dataclass(frozen=True)
class Loaded:
    """A model that is ready, and what the API derives from it once."""

    engine: Engine
    token_bytes: TokenBytes
    chat: ChatPrompt
    fingerprint: str
    created: int

    @classmethod
    def of(cls, engine: Engine) -> "Loaded":
        """Prepare a loaded engine.

        Raises:
            CheckpointError: its tokenizer cannot be streamed.
        """
        token_bytes = TokenBytes(engine.tokenizer)
        version = metadata.version("wrinklefree")
        identity = f"{version} {engine.info} {engine.tokenizer.fingerprint}"
        fingerprint = f"fp_{hashlib.sha256(identity.encode()).hexdigest()[:10]}"
        return cls(engine, token_bytes, ChatPrompt(engine.tokenizer, token_bytes), fingerprint, int(time.time()))


@dataclass(frozen=True)
class Plan:
    """A request that was found right, ready for the engine."""

    kind: Kind
    prompts: list[list[int]]
    echoes: list[str]
    """What is put before each completion."""
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))


class Service:
    """One engine behind the API: its state, its line of requests, its counters."""

    def __init__(self, settings: ServiceSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.state: State = "loading"
        self.slots = Slots(0, settings.max_queue)
        self.planning = asyncio.Semaphore(PLANNING_AT_ONCE)
        self._loaded: Loaded | None = None
        metrics.watch(
            waiting=lambda: self.slots.waiting,
            slots_in_use=lambda: self.slots.used,
            ready=lambda: self.state == "ready",
        )

    def ready(self, loaded: Loaded) -> None:
        """Serve this model from now on; called in the event loop's thread."""
        self._loaded = loaded
        self.slots = Slots(loaded.engine.info.slots, self.settings.max_queue)
        if self.state == "loading":
            self.state = "ready"
        else:
            self.slots.stop()

    def stop(self) -> None:
        """Refuse new work and turn away what waits; what runs goes on."""
        self.state = "stopping"
        self.slots.stop()

    def close(self) -> None:
        """Free the engine."""
        if self._loaded is not None:
            self._loaded.engine.close()

    @property
    def loaded(self) -> Loaded:
        """The model.

        Raises:
            ApiError: 503, it is not there yet or any more.
        """
        if self.state == "stopping":
            raise ApiError(503, "the server is stopping", code="stopping", retry=LOADING_RETRY_SECONDS)
        if self._loaded is None:
            raise ApiError(503, "the model is loading; try again soon", code="loading", retry=LOADING_RETRY_SECONDS)
        return self._loaded

    def plan(self, kind: Kind, body: bytes) -> Plan:
        """Decode a request and prepare its prompts; takes processor time, so it runs in a thread.

        Raises:
            RequestError, DataError: the request is wrong.
            ApiError: it names another model, or more tokens than there is room for.
        """
        loaded = self.loaded
        request = decode_chat(body) if kind == "chat" else decode_completion(body)
        name = loaded.engine.info.model
        if request.model is not None and request.model != name:
            message = f"the model {request.model[:200]!r} is not served here; the one that is: {name!r}"
            raise ApiError(404, message, parameter="model", code="model_not_found")
        echoes: list[str] = []
        if isinstance(request, ChatRequest):
            messages = [message.message() for message in request.messages]
            self._check_size(loaded, [message.content for message in messages], "messages")
            prompts = [loaded.chat.encode(messages, request.chat_template_kwargs)]
            stops = (*request.stops, *loaded.chat.stops)
        else:
            for prompt in request.prompts:
                self._check_size(loaded, [prompt] if isinstance(prompt, str) else [], "prompt")
            prompts = [self._completion_prompt(loaded, prompt) for prompt in request.prompts]
            stops = request.stops
            echoes = [self._echo(loaded, prompt) for prompt in request.prompts] if request.echo else []
        max_tokens = self._max_tokens(loaded, max(map(len, prompts)), request.token_limit, kind)
        return Plan(
            kind, prompts, echoes, request.sampling(max_tokens), stops, request.stream is True, request.include_usage
        )

    def events(self, loaded: Loaded, plan: Plan, work: Work) -> Iterator[Event]:
        """All choices of a request, one after another: (index, piece or finish)."""
        for index, prompt in enumerate(plan.prompts):
            if plan.echoes:
                yield index, Piece(plan.echoes[index])
            tokens = work.watch(loaded.engine.stream(prompt, plan.sampling))
            text = stream_text(tokens, loaded.token_bytes, max_tokens=plan.sampling.max_tokens, stops=plan.stops)
            for item in text:
                yield index, item

    def _check_size(self, loaded: Loaded, texts: list[str], parameter: str) -> None:
        """Refuse what cannot fit before it is tokenized, which takes a hundred times its size."""
        least = sum(len(text.encode()) for text in texts) // loaded.token_bytes.longest
        context = loaded.engine.info.context_length
        if least >= context:
            message = f"the prompt has at least {least} tokens; the context of {context} must also hold the answer"
            raise ApiError(400, message, parameter=parameter, code="context_length_exceeded")

    def _completion_prompt(self, loaded: Loaded, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return encode_prompt(loaded.engine.tokenizer, prompt)
        size = loaded.engine.tokenizer.vocab_size
        if max(prompt) >= size:
            raise RequestError(f"`prompt` holds token {max(prompt)}; the vocabulary has {size}", parameter="prompt")
        return prompt

    def _echo(self, loaded: Loaded, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else loaded.engine.tokenizer.decode(prompt)

    def _max_tokens(self, loaded: Loaded, prompt_tokens: int, asked: int | None, kind: Kind) -> int:
        context = loaded.engine.info.context_length
        parameter = "messages" if kind == "chat" else "prompt"
        code = "context_length_exceeded"
        if prompt_tokens >= context:
            message = f"the prompt has {prompt_tokens} tokens; the context of {context} must also hold the answer"
            raise ApiError(400, message, parameter=parameter, code=code)
        most = context - prompt_tokens
        if asked is None:
            return min(most, self.settings.max_tokens or most)
        if self.settings.max_tokens is not None and asked > self.settings.max_tokens:
            message = f"{asked} tokens were asked for; this server gives at most {self.settings.max_tokens} an answer"
            raise ApiError(400, message, parameter="max_tokens")
        if asked > most:
            message = (
                f"the context holds {context} tokens: {prompt_tokens} of the prompt and {asked} asked for are more"
            )
            raise ApiError(400, message, parameter="max_tokens", code=code)
        return asked


def explain(error: BaseException, service: Service) -> ApiError:
    """The answer to a failure; one that nobody foresaw is logged and kept from the client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), parameter=error.parameter, code=error.code)
    if isinstance(error, ConfigError | DataError):
        return ApiError(400, str(error))
    if isinstance(error, QueueFullError):
        message = f"{service.slots.max_waiting} requests are waiting already; try again later"
        return ApiError(429, message, code="queue_full", retry=BUSY_RETRY_SECONDS)
    if isinstance(error, StoppingError) or (isinstance(error, EngineError) and service.state == "stopping"):
        return ApiError(503, "the server is stopping", code="stopping", retry=LOADING_RETRY_SECONDS)
    if isinstance(error, TimeoutError):
        message = f"the answer was not complete after {service.settings.request_seconds:g} s"
        return ApiError(504, message, code="timeout")
    if isinstance(error, EngineError):
        logger.error("the engine failed: %s", error)
        return ApiError(500, f"the engine failed: {error}", code="engine_error")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; the server's log says more", code="internal_error")
