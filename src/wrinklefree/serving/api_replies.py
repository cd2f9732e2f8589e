"""What the HTTP API answers: the JSON shapes of OpenAI's completions, chat completions and errors.

A `Reply` builds one request's answers, streamed or whole, so that the two can only differ in their envelope.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from wrinklefree.serving.engine.protocol import Token
from wrinklefree.serving.text_stream import FinishReason, TokenBytes

Json = dict[str, Any]
ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, *, parameter: str | None = None, code: str | None = None) -> Json:
    """The body of an error: what happened, and which parameter was at fault."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


@dataclass
class Choice:
    """One answer as far as it is known."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list[Token])
    finish: FinishReason | None = None


class Reply:
    """The envelope of one request's answers."""

    def __init__(
        self,
        kind: Literal["chat", "completion"],
        *,
        model: str,
        fingerprint: str,
        token_bytes: TokenBytes,
        logprobs: bool,
    ) -> None:
        self._kind = kind
        self._logprobs = logprobs
        self._token_bytes = token_bytes
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        self._id = f"{prefix}-{secrets.token_hex(12)}"
        self._envelope = {"created": int(time.time()), "model": model, "system_fingerprint": fingerprint}

    def opening(self) -> Json:
        """The first event of a streamed chat answer: who speaks."""
        return self._chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}, **self._rest(None, None)}])

    def piece(self, index: int, text: str, tokens: Sequence[Token], *, offset: int) -> Json:
        """An event with some text of choice `index`, which begins `offset` characters into its answer."""
        rest = self._rest(self._logprobs_of(tokens, offset) if tokens else None, None)
        if self._kind == "chat":
            return self._chunk([{"index": index, "delta": {"content": text}, **rest}])
        return self._chunk([{"index": index, "text": text, **rest}])

    def ending(self, index: int, finish: FinishReason) -> Json:
        """The last event of choice `index`."""
        body: Json = {"delta": {}} if self._kind == "chat" else {"text": ""}
        return self._chunk([{"index": index, **body, **self._rest(None, finish)}])

    def usage(self, prompt_tokens: int, completion_tokens: int) -> Json:
        """The event after the last, where the request asked for a count."""
        return {**self._chunk([]), "usage": usage(prompt_tokens, completion_tokens)}

    def whole(self, choices: Sequence[Choice], prompt_tokens: int, completion_tokens: int) -> Json:
        """The answer in one body."""
        return {
            "id": self._id,
            "object": "chat.completion" if self._kind == "chat" else "text_completion",
            **self._envelope,
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": usage(prompt_tokens, completion_tokens),
        }

    def _choice(self, index: int, choice: Choice) -> Json:
        rest = self._rest(self._logprobs_of(choice.tokens, 0), choice.finish)
        if self._kind == "chat":
            return {"index": index, "message": {"role": "assistant", "content": choice.text, "refusal": None}, **rest}
        return {"index": index, "text": choice.text, **rest}

    def _chunk(self, choices: list[Json]) -> Json:
        name = "chat.completion.chunk" if self._kind == "chat" else "text_completion"
        return {"id": self._id, "object": name, **self._envelope, "choices": choices}

    def _rest(self, logprobs: Json | None, finish: FinishReason | None) -> Json:
        return {"logprobs": logprobs, "finish_reason": finish}

    def _logprobs_of(self, tokens: Sequence[Token], offset: int) -> Json | None:
        if not self._logprobs:
            return None
        if self._kind == "chat":
            return {"content": [self._chat_logprob(token) for token in tokens], "refusal": None}
        offsets: list[int] = []
        for token in tokens:
            offsets.append(offset)
            offset += len(self._token_bytes.text_bytes(token.id).decode(errors="ignore"))
        return {
            "tokens": [self._token_bytes.spelling(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self._token_bytes.spelling(index): logprob for index, logprob in reversed(token.alternatives)}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def _chat_logprob(self, token: Token) -> Json:
        alternatives = [self._entry(index, logprob) for index, logprob in token.alternatives]
        return {**self._entry(token.id, token.logprob), "top_logprobs": alternatives}

    def _entry(self, index: int, logprob: float | None) -> Json:
        spelling = self._token_bytes.spelling_bytes(index)
        return {"token": spelling.decode(errors="replace"), "logprob": logprob, "bytes": list(spelling)}


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    """Counts of tokens as the API writes them."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
