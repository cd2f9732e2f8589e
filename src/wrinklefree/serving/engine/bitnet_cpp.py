"""BitNet.cpp's own server as an engine, where `extern/BitNet` is built.

BitNet.cpp (microsoft/BitNet) is a fork of llama.cpp with kernels for I2_S files; its build leaves `llama-server` in
`build/bin`. It runs as a process of ours on a loopback port, behind a key that only we know, with its output drained
into our log, and it dies with us (see `guard`).

This has been tested against a stand-in that speaks the same HTTP API, not against the real program, which could not be
built where this was written. Builds from before 2025 stream text without token ids: there the ids are those that our
tokenizer gives the text, and log-probabilities are refused.
"""

import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import httpx2

from wrinklefree.serving.engine import guard
from wrinklefree.serving.engine.completions import CompletionReader, Undecided, Vocabulary, completion_body, error_text
from wrinklefree.serving.engine.protocol import EngineInfo, Sampling, Token
from wrinklefree.serving.engine.requests import Request, WorkerPool, check_request, close_at_exit, end_tokens_of
from wrinklefree.utils.errors import EngineError
from wrinklefree.utils.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

BINARY_VARIABLE = "WRINKLEFREE_BITNET_SERVER"
"""Environment variable with the path of llama-server."""
START_SECONDS = 300.0
"""Longest that loading a model may take."""
SILENCE_SECONDS = 600.0
"""Longest wait for the next message of an answer: a long prompt on a slow machine."""
STOP_SECONDS = 2 * guard.GRACE_SECONDS
_POLL_SECONDS = 0.1
_LINES_KEPT = 20
_LONGEST_LINE = 1000


def find_server() -> Path | None:
    """BitNet.cpp's server: what the environment variable names, else the build in extern/BitNet of this checkout."""
    named = os.environ.get(BINARY_VARIABLE)
    roots = [Path.cwd(), Path(__file__).resolve().parents[4]]
    places = (
        [Path(named)] if named else [root / "extern" / "BitNet" / "build" / "bin" / "llama-server" for root in roots]
    )
    return next((place for place in places if place.is_file() and os.access(place, os.X_OK)), None)


def is_built() -> bool:
    """Whether there is a server to run."""
    return find_server() is not None


class ServerProcess:
    """A running llama-server: started, ready, with its last lines at hand, and gone when closed."""

    def __init__(
        self, binary: Path, model: Path, *, context_length: int, slots: int, threads: int | None, start_seconds: float
    ) -> None:
        """Start it and wait until it answers.

        Raises:
            EngineError: it does not exist, died (with its last lines), or took too long.
        """
        self.port = _free_port()
        self.key = secrets.token_urlsafe(32)
        command = [str(binary), "--model", str(model), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--ctx-size", str(context_length * slots), "--parallel", str(slots)]
        command += [] if threads is None else ["--threads", str(threads)]
        self._last_lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is for us to act on
            env=os.environ | {"LLAMA_API_KEY": self.key},  # not on the command line, where everybody could read it
        )
        assert self._process.stdout is not None
        self._drain = threading.Thread(target=self._drain_output, args=(self._process.stdout,), daemon=True)
        self._drain.start()
        self.http = httpx2.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            headers={"Authorization": f"Bearer {self.key}"},
            timeout=httpx2.Timeout(SILENCE_SECONDS, connect=5.0),
            limits=httpx2.Limits(max_connections=None),
            trust_env=False,  # a proxy has no business on loopback
        )
        try:
            self._wait_until_ready(start_seconds)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the guard."""
        return self._process.pid

    def explain(self, what: str) -> EngineError:
        """An error with the state of the process and its last lines."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)  # a broken connection is often the first sign of a death
        status = self._process.poll()
        state = "it still runs" if status is None else f"it ended with status {status}"
        if status is not None:
            self._drain.join(1.0)
        lines = " | ".join(list(self._last_lines)[-5:]) or "nothing"
        return EngineError(f"BitNet.cpp's server {what}; {state}, and said last: {lines}")

    def close(self) -> None:
        """Stop it: SIGTERM, then SIGKILL; may be called twice."""
        self.http.close()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._drain.join(1.0)

    def _wait_until_ready(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            if self._process.poll() is not None:
                raise self.explain("did not start")
            with suppress(httpx2.HTTPError):
                if self.http.get("/health", timeout=5.0).status_code == httpx2.codes.OK:
                    return
            if time.monotonic() > deadline:
                raise self.explain(f"was not ready after {seconds:.0f} s")
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_POLL_SECONDS)

    def _drain_output(self, output: IO[bytes]) -> None:
        with output:
            while line := output.readline(_LONGEST_LINE):
                text = line.decode("utf-8", errors="replace").strip()
                if text:
                    self._last_lines.append(text)
                    logger.debug("bitnet.cpp: %s", text)


class BitNetCppEngine:
    """A GGUF file in BitNet.cpp's server."""

    def __init__(
        self,
        path: Path,
        tokenizer: TextTokenizer,
        *,
        name: str,
        context_length: int,
        slots: int = 4,
        threads: int | None = None,
        end_tokens: Sequence[int] = (),
        start_seconds: float = START_SECONDS,
    ) -> None:
        """Start the server on a file; returns when it is ready.

        Args:
            path: The file.
            tokenizer: The file's tokenizer.
            name: What /v1/models calls it.
            context_length: Most tokens of a prompt and its continuation.
            slots: Requests in progress at the same time.
            threads: CPU threads; None leaves the server's choice.
            end_tokens: Tokens that end an answer, beyond those that the tokenizer names.
            start_seconds: Longest that loading may take.

        Raises:
            EngineError: there is no server, or it did not start; its last lines are in the message.
        """
        binary = find_server()
        if binary is None:
            raise EngineError(
                "there is no llama-server in extern/BitNet/build/bin; build BitNet.cpp there, or name the program in "
                f"{BINARY_VARIABLE}"
            )
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._end_tokens = end_tokens_of(tokenizer, end_tokens)
        self._info = EngineInfo("bitnet.cpp", name, context_length, slots)
        self._server = ServerProcess(
            binary, path, context_length=context_length, slots=slots, threads=threads, start_seconds=start_seconds
        )
        self._pool = WorkerPool(slots, self._work, name="bitnet.cpp")
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
        vocab_size = self._tokenizer.vocab_size
        check_request(prompt, sampling, context_length=self._info.context_length, vocab_size=vocab_size)
        return self._pool.submit(Request(prompt, sampling))

    def close(self) -> None:
        """End requests and stop the server."""
        self._pool.close()
        self._server.close()

    def _work(self, request: Request) -> None:
        """Stream a request; after tokens that cannot be told from the text, ask for them and go on from there."""
        produced: list[int] = []
        while not request.cancelled and len(produced) < request.sampling.max_tokens:
            left = replace(request.sampling, max_tokens=request.sampling.max_tokens - len(produced))
            undecided = self._stream_from(request, left, produced)
            if undecided == 0 or request.cancelled:
                return
            again = replace(left, max_tokens=undecided)
            reply = self._post(completion_body([*request.prompt, *produced], again, stream=False))
            for index in reply["tokens"]:
                if not self._deliver(request, produced, Token(int(index))):
                    return

    def _stream_from(self, request: Request, sampling: Sampling, produced: list[int]) -> int:
        """Stream from what is there until the end (0), or until tokens must be asked for again (their number)."""
        reader = CompletionReader(self._vocabulary, sampling)
        body = completion_body([*request.prompt, *produced], sampling)
        try:
            with self._server.http.stream("POST", "/completion", json=body) as response:
                request.on_cancel(lambda: _interrupt(response))
                if response.status_code != httpx2.codes.OK:
                    raise EngineError(f"BitNet.cpp's server refused the request: {_refusal(response.read())}")
                for message in _messages(response):
                    for token in reader.read(message):
                        if not self._deliver(request, produced, token):
                            return 0
                    if reader.finished:
                        return reader.missing
        except Undecided as question:
            return question.count
        except (httpx2.HTTPError, OSError) as error:
            if request.cancelled:
                return 0
            raise self._server.explain(f"broke off an answer ({type(error).__name__}: {error})") from error
        finally:
            request.on_cancel(None)
        if request.cancelled:
            return 0
        raise self._server.explain("ended an answer without its last message")

    def _deliver(self, request: Request, produced: list[int], token: Token) -> bool:
        """Hand a token on; whether the answer goes on."""
        if token.id in self._end_tokens or request.cancelled:
            return False
        if request.sampling.logprobs is not None and token.logprob is None:
            raise EngineError("this build of BitNet.cpp gives no log-probabilities; ask without, or use --engine torch")
        produced.append(token.id)
        request.put(token)
        return len(produced) < request.sampling.max_tokens

    def _post(self, body: dict[str, Any]) -> Mapping[str, Any]:
        try:
            response = self._server.http.post("/completion", json=body)
        except httpx2.HTTPError as error:
            raise self._server.explain(f"broke off an answer ({type(error).__name__}: {error})") from error
        reply = _parse(response.content)
        if response.status_code != httpx2.codes.OK or "tokens" not in reply:
            raise EngineError(f"BitNet.cpp's server refused the request: {_refusal(response.content)}")
        return reply


def _messages(response: httpx2.Response) -> Iterator[Mapping[str, Any]]:
    """The JSON objects of an event stream.

    Raises:
        EngineError: a line that is neither an event nor empty, or holds no JSON object.
    """
    for line in response.iter_lines():
        kind, colon, payload = line.partition(":")
        if not line or not kind:  # a comment keeps the connection alive
            continue
        if not colon or kind not in ("data", "error"):
            raise EngineError(f"BitNet.cpp's server sent a line that is no event: {line[:80]!r}")
        if payload.strip() == "[DONE]":
            return
        message = _parse(payload.encode())
        yield {"error": message.get("error", message)} if kind == "error" else message


def _parse(text: bytes) -> Mapping[str, Any]:
    try:
        message = json.loads(text)
    except ValueError as error:
        raise EngineError(f"BitNet.cpp's server sent no JSON: {text[:80]!r}") from error
    if not isinstance(message, dict):
        raise EngineError(f"BitNet.cpp's server sent no JSON object: {text[:80]!r}")
    return message


def _refusal(text: bytes) -> str:
    try:
        message = json.loads(text)
        return error_text(message["error"])
    except (ValueError, KeyError, TypeError):
        return repr(text[:200])


def _interrupt(response: httpx2.Response) -> None:
    """Wake a thread that reads from a response: end its connection, which also tells the server to stop."""
    stream = response.extensions.get("network_stream")
    connection = None if stream is None else stream.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def _free_port() -> int:
    """A port that was free a moment ago; should another program take it, the server does not start and says so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
