"""The Python client: typed answers of a WrinkleFree server, or of any other that speaks OpenAI's API (BitNet.cpp's does).

    with BitNetClient() as client:
        print(client.chat("What is 2 + 2?").text)

`serve` starts a server for the length of a `with` block, so that a script needs no second terminal.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from wrinklefree.utils.errors import ConfigError, CredentialsError, EngineError, NetworkError, WrinkleFreeError

DEFAULT_URL = "http://127.0.0.1:8080"
STOP_SECONDS = 40.0
POLL_SECONDS = 0.1
_KEY_VARIABLE = "WRINKLEFREE_API_KEY"

Conversation = str | Sequence[Mapping[str, str]]
"""One question, or messages with `role` and `content`."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer and its natural log-probability, with the likeliest alternatives."""

    token: str
    logprob: float
    alternatives: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens that a request cost."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    finish_reason: str | None
    """stop: the model ended, or a stop string came; length: it reached the limit."""
    model: str
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Delta:
    """A bit of a streamed answer; the last one has a `finish_reason` and, where the server counts, a `usage`."""

    text: str
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    usage: Usage | None = None


@dataclass(frozen=True)
class Model:
    """A model that a server offers."""

    name: str
    engine: str | None
    context_length: int | None


@dataclass(frozen=True)
class Health:
    """A server's state."""

    ready: bool
    status: str
    """ok, loading, stopping, or what the server says."""


class BitNetClient:
    """A connection to a server; use it in a `with` block, or call `close`. Threads may share one."""

    def __init__(self, base_url: str = DEFAULT_URL, api_key: str | None = None, *, timeout: float = 600.0) -> None:
        """Prepare a client; nothing is sent.

        Args:
            base_url: Where the server listens, without /v1.
            api_key: The server's key; WRINKLEFREE_API_KEY when absent.
            timeout: Longest wait for the next bytes of an answer, in seconds.

        Raises:
            ConfigError: the address is not an http URL.
        """
        key = api_key or os.environ.get(_KEY_VARIABLE)
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        try:
            url = httpx2.URL(self.base_url)
        except httpx2.InvalidURL as error:
            raise ConfigError(f"{base_url!r} is not an address such as {DEFAULT_URL} ({error})") from error
        if url.scheme not in {"http", "https"} or not url.host:
            raise ConfigError(f"{base_url!r} is not an address such as {DEFAULT_URL}")
        self._client = httpx2.Client(
            base_url=url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0)),
            trust_env=not url.host.startswith("127.") and url.host not in {"localhost", "::1"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def chat(self, conversation: Conversation, **options: Any) -> Answer:
        """Answer a question, or the last message of a conversation.

        Args:
            conversation: A question, or messages.
            **options: Settings of the API: max_tokens, temperature, top_p, top_k, seed, stop, logprobs, top_logprobs ...

        Raises:
            ConfigError: the server refuses the request as wrong.
            CredentialsError: it asks for another API key.
            NetworkError: it cannot be reached, or broke off.
            EngineError: it failed, is full, loading or too slow.
        """
        return _answer(self._post("/v1/chat/completions", {"messages": _messages(conversation), **options}))

    def complete(self, prompt: str | Sequence[int], **options: Any) -> Answer:
        """Continue a text, or token ids; settings and errors as in `chat`."""
        return _answer(self._post("/v1/completions", {"prompt": _prompt(prompt), **options}))

    def stream_chat(self, conversation: Conversation, **options: Any) -> Iterator[Delta]:
        """As `chat`, in pieces as they come. Closing the iterator ends the server's work."""
        return self._stream("/v1/chat/completions", {"messages": _messages(conversation), **options})

    def stream_complete(self, prompt: str | Sequence[int], **options: Any) -> Iterator[Delta]:
        """As `complete`, in pieces as they come."""
        return self._stream("/v1/completions", {"prompt": _prompt(prompt), **options})

    def models(self) -> list[Model]:
        """The models that the server offers."""
        with self._explained():
            body = _json(self._client.get("/v1/models"))
        try:
            return [Model(card["id"], card.get("engine"), card.get("context_length")) for card in body["data"]]
        except (KeyError, TypeError) as error:
            raise self._strange(error) from error

    def health(self) -> Health:
        """The server's state.

        Raises:
            NetworkError: it cannot be reached.
        """
        with self._explained():
            response = self._client.get("/health")
        try:
            status = str(response.json()["status"])
        except (ValueError, KeyError, TypeError):
            status = f"HTTP {response.status_code}"
        return Health(response.status_code == httpx2.codes.OK, status)

    def wait_until_ready(self, timeout: float = 300.0) -> None:
        """Wait until the server's model is loaded.

        Raises:
            NetworkError: it is not within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                health = self.health()
                state = health.status
                if health.ready:
                    return
            except NetworkError as error:
                state = str(error)
            if time.monotonic() > deadline:
                raise NetworkError(
                    f"{self.base_url} is not ready after {timeout:g} s ({state}); look at the server's log"
                )
            time.sleep(POLL_SECONDS)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._explained():
            return _json(self._client.post(path, json={**body, "stream": False}))

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[Delta]:
        request = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with self._explained(), self._client.stream("POST", path, json=request) as response:
            if response.status_code != httpx2.codes.OK:
                response.read()
                _json(response)
            last: Delta | None = None
            complete = False
            for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    complete = True
                    break
                delta = _delta(json.loads(event.data))
                if delta.usage is not None and last is not None:
                    last = Delta(last.text, last.finish_reason, last.logprobs, delta.usage)
                elif delta.finish_reason is not None:
                    last = delta  # kept until the count is there
                elif delta.text or delta.logprobs:
                    yield delta
            if not complete:
                raise NetworkError(f"{self.base_url} broke off in the middle of an answer; look at the server's log")
            if last is not None:
                yield last

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except httpx2.TimeoutException as error:
            raise NetworkError(f"{self.base_url} did not answer in time; raise timeout=, or look at its log") from error
        except httpx2.TransportError as error:
            reason = str(error) or type(error).__name__
            raise NetworkError(f"{self.base_url} cannot be reached ({reason}); is the server running?") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise self._strange(error) from error

    def _strange(self, error: Exception) -> NetworkError:
        return NetworkError(f"{self.base_url} answers something else than OpenAI's API ({error!r}); check the address")


@contextmanager
def serve(model: str | Path, *, ready_seconds: float = 300.0, arguments: Sequence[str] = ()) -> Iterator[BitNetClient]:
    """Run a server for a model in a process of its own, with a key of its own, for the length of a `with` block.

    Args:
        model: A GGUF file or a checkpoint folder.
        ready_seconds: Longest wait for the model.
        arguments: Further flags of scripts/serve.py, such as ["--slots", "1"].

    Raises:
        EngineError: the server ended before it was ready; the message is its own.
    """
    key = secrets.token_urlsafe(24)
    program = "import sys; from wrinklefree.cli import serve_main; sys.exit(serve_main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--model", str(model), "--port", "0", *arguments],
        env={**os.environ, _KEY_VARIABLE: key},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    log = _Log(process)
    try:
        deadline = time.monotonic() + ready_seconds
        while log.address is None:
            _check_alive(process, log, deadline)
            time.sleep(POLL_SECONDS / 5)
        with BitNetClient(log.address, key) as client:
            while not _is_ready(client):
                _check_alive(process, log, deadline)
                time.sleep(POLL_SECONDS)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


class _Log:
    """Reads a server's log as it comes, or the server would stand still once its pipe is full."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stderr is not None
        self._stream = process.stderr
        self.address: str | None = None
        self.lines: deque[str] = deque(maxlen=50)
        self._thread = threading.Thread(target=self._read, name="server-log", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait for the end of a server that has ended."""
        self._thread.join(STOP_SECONDS)
        self._stream.close()

    def _read(self) -> None:
        for line in self._stream:
            self.lines.append(line.rstrip())
            found = re.search(r"listening on (http://\S+?);", line)
            if found and self.address is None:
                self.address = found[1]


def _check_alive(process: "subprocess.Popen[str]", log: _Log, deadline: float) -> None:
    if process.poll() is not None:
        log._thread.join(STOP_SECONDS)  # pyright: ignore[reportPrivateUsage] - the last lines say why
        said = next((line for line in reversed(log.lines) if line.startswith("error: ")), "; ".join(log.lines))
        raise EngineError(f"the server ended with exit code {process.returncode}: {said.removeprefix('error: ')}")
    if time.monotonic() > deadline:
        raise EngineError(f"the server is not ready in time; its last words: {'; '.join(list(log.lines)[-3:])}")


def _is_ready(client: BitNetClient) -> bool:
    try:
        return client.health().ready
    except NetworkError:
        return False


def _messages(conversation: Conversation) -> list[dict[str, str]]:
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    return [dict(message) for message in conversation]


def _prompt(prompt: str | Sequence[int]) -> str | list[int]:
    return prompt if isinstance(prompt, str) else list(prompt)


def _json(response: httpx2.Response) -> dict[str, Any]:
    """The body of a good answer; an error's becomes an exception of its kind."""
    if response.status_code == httpx2.codes.OK:
        body = response.json()
        if not isinstance(body, dict):
            raise TypeError("a JSON object was expected")
        return body
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = " ".join(response.text.split())[:200] or "no message"
    raise _refusal(response.status_code, message)


def _refusal(status: int, message: str) -> WrinkleFreeError:
    kinds: dict[int, type[WrinkleFreeError]] = {401: CredentialsError, 403: CredentialsError, 429: EngineError}
    kind = kinds.get(status, ConfigError if 400 <= status < 500 else EngineError)
    return kind(
        f"the server refused with status {status}: {message}" if status < 500 else f"status {status}: {message}"
    )


def _answer(body: dict[str, Any]) -> Answer:
    try:
        choice = body["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        usage = Usage(body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"])
        return Answer(text or "", choice.get("finish_reason"), body.get("model", ""), usage, _logprobs(choice))
    except (KeyError, TypeError, IndexError) as error:
        raise NetworkError(
            f"the server answers something else than OpenAI's API ({error!r}); check the address"
        ) from error


def _delta(chunk: dict[str, Any]) -> Delta:
    if "error" in chunk:
        raise EngineError(f"the server broke off: {chunk['error']['message']}")
    counted = chunk.get("usage")
    usage = None if counted is None else Usage(counted["prompt_tokens"], counted["completion_tokens"])
    if not chunk["choices"]:
        return Delta("", usage=usage)
    choice = chunk["choices"][0]
    text = choice["delta"].get("content") if "delta" in choice else choice["text"]
    return Delta(text or "", choice.get("finish_reason"), _logprobs(choice), usage)


def _logprobs(choice: dict[str, Any]) -> tuple[TokenLogprob, ...]:
    found = choice.get("logprobs")
    if not found:
        return ()
    if "content" in found:
        return tuple(
            TokenLogprob(
                entry["token"],
                entry["logprob"],
                tuple((other["token"], other["logprob"]) for other in entry.get("top_logprobs", ())),
            )
            for entry in found["content"] or ()
        )
    alternatives = found.get("top_logprobs") or [{}] * len(found["tokens"])
    return tuple(
        TokenLogprob(token, logprob, tuple(sorted(others.items(), key=lambda item: -item[1])))
        for token, logprob, others in zip(found["tokens"], found["token_logprobs"], alternatives, strict=True)
    )
