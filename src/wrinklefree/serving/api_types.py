"""What the HTTP API takes: requests of OpenAI's completions and chat completions, decoded strictly.

A setting that would change the answer and that we do not have (tools, a JSON schema, penalties, several choices) is refused
unless its value asks for nothing; a misspelt setting is refused with the right spelling; anything else that clients send
along (`user`, `metadata`, `store` ...) is ignored. `null` means "not given", as in OpenAI's API.
"""

import difflib
import re
from typing import Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from wrinklefree.serving.chat_text import Message, Role
from wrinklefree.serving.engine.protocol import Sampling
from wrinklefree.utils.errors import ConfigError

MAX_STOPS = 4
MAX_PROMPTS = 16
COMPLETION_TOKENS = 16
"""Tokens of a completion that names no `max_tokens`, as in OpenAI's API; a chat answer may fill the context."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (), "best_of": (1,), "dry_multiplier": (0,), "dynatemp_range": (0,), "frequency_penalty": (0,),
    "function_call": ("none", "auto"), "functions": ([],), "grammar": ("",), "guided_choice": (), "guided_grammar": (),
    "guided_json": (), "guided_regex": (), "ignore_eos": (False,), "json_schema": (), "logit_bias": ({}, []),
    "min_p": (0,), "min_tokens": (0,), "mirostat": (0,), "mirostat_mode": (0,), "modalities": (["text"],), "n": (1,),
    "prediction": (), "presence_penalty": (0,), "prompt_logprobs": (), "reasoning_effort": (), "repeat_penalty": (1,),
    "repetition_penalty": (1,), "response_format": ({"type": "text"},), "structured_outputs": (), "suffix": ("",),
    "tool_choice": ("none", "auto"), "tools": ([],), "typical_p": (1,), "use_beam_search": (False,),
    "verbosity": (), "web_search_options": (), "xtc_probability": (0,),
}  # fmt: skip
"""Settings that we do not have, and the values of them that ask for nothing."""
_UNIONS = {
    "prompt": f"a text, at most {MAX_PROMPTS} texts, token ids, or at most {MAX_PROMPTS} lists of token ids",
    "stop": f"a text or a list of at most {MAX_STOPS} texts",
}
"""What settings of several shapes take; pydantic would explain each shape by itself."""
_SPELT_LIKE = 0.85


Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class RequestError(ConfigError):
    """A request that cannot be answered; `parameter` is the setting at fault, `code` OpenAI's name of the mistake."""

    def __init__(self, message: str, *, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.code = code


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """Settings of a streamed answer."""

    include_usage: bool | None = None


class TextPart(_Strict):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn as the API writes it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def message(self) -> Message:
        """The turn with its parts joined; `developer` is what newer clients call `system`."""
        role: Role = "system" if self.role == "developer" else self.role
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role, content)


class _Request(_Strict):
    model: str | None = None
    """Which model is meant; the one that is served when absent."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """1 when absent; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Ours and llama.cpp's extension; 0 and -1 keep all tokens."""
    seed: Seed | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _refuse_what_would_change_the_answer(self) -> Self:
        known = set(type(self).model_fields)
        for name, value in (self.model_extra or {}).items():
            if value is None or (name in NEUTRAL and value in NEUTRAL[name]):
                continue
            if name in NEUTRAL:
                raise ValueError(f"`{name}` is not supported by this server; leave it out")
            close = difflib.get_close_matches(name, known, n=1, cutoff=_SPELT_LIKE)
            if close:
                raise ValueError(f"`{name}` is unknown; did you mean `{close[0]}`?")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings; empty ones mean nothing."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a count of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def _logprobs(self) -> int | None:
        raise NotImplementedError

    def sampling(self, max_tokens: int) -> Sampling:
        """The engine's settings; seeds are folded into 31 bits, which every engine takes."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_p=None if self.top_p in (None, 1) else self.top_p,
            top_k=self.top_k if self.top_k is not None and self.top_k > 0 else None,
            seed=None if self.seed is None else self.seed % 2**31,
            logprobs=self._logprobs,
        )


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of `max_tokens`; it wins."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, bool | int | str] | None = None
    """An extension: further variables of the chat template, such as `enable_thinking`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs: true`")
        taken = {"messages", "add_generation_prompt", "bos_token", "eos_token", "pad_token"}
        if taken & set(self.chat_template_kwargs or {}):
            raise ValueError(f"`chat_template_kwargs` may not set {', '.join(sorted(taken))}")
        return self

    @property
    def token_limit(self) -> int | None:
        """Most tokens of the answer, where the request says."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def _logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[
            list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    )
    """A text, several, or token ids (of one prompt or of several)."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    """Put the prompt before the completion; not together with `logprobs`, which the engines have for new tokens only."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise ValueError("`echo` together with `logprobs` is not supported: there are none for the prompt")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [cast("list[int]", self.prompt)]
        return cast("list[str | list[int]]", self.prompt)

    @property
    def token_limit(self) -> int | None:
        """Most tokens of each completion."""
        return self.max_tokens or COMPLETION_TOKENS

    @property
    def _logprobs(self) -> int | None:
        return self.logprobs


def decode_chat(body: bytes) -> ChatRequest:
    """A chat request from JSON; every mistake is a `RequestError`."""
    return _decode(ChatRequest, body)


def decode_completion(body: bytes) -> CompletionRequest:
    """A completion request from JSON; every mistake is a `RequestError`."""
    return _decode(CompletionRequest, body)


_R = TypeVar("_R", bound=_Request)


def _decode(kind: type[_R], body: bytes) -> _R:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _explain(kind, error) from error


def _explain(kind: type[_Request], error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return RequestError(
            f"the body is not JSON in UTF-8: {reason.removeprefix('Invalid JSON: ')}", code="invalid_json"
        )
    if first["type"] == "model_type":
        return RequestError("the body is no JSON object")
    if not first["loc"]:
        named = re.match(r"`(\w+)`", reason)
        return RequestError(reason, parameter=named[1] if named else None)
    name = str(first["loc"][0])
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return RequestError(f"`{name}` is missing", parameter=name)
    if name in _UNIONS:
        return RequestError(f"`{name}`: expected {_UNIONS[name]}", parameter=name)
    if first["loc"][0] == "messages" and "content" in first["loc"]:
        expected = "expected a text or a list of text parts; images, audio and files are not supported"
        return RequestError(f"`messages[{first['loc'][1]}].content`: {expected}", parameter=name)
    # Places inside a union carry the name of its branch, which says nothing to a client.
    place = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:] if _is_place(part)
    )
    given = "" if isinstance(first["input"], dict | list) else f", given {_shortened(first['input'])}"
    return RequestError(f"`{name}{place}`: {reason}{given}", parameter=name)


def _is_place(part: int | str) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part not in {"str", "int", "bool", "float", "list"})


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
