"""llama.cpp inside this process, through the package xllamacpp: whatever upstream llama.cpp runs.

The package holds llama.cpp's own server: it batches the requests of its slots continuously and reuses prompt prefixes.
Requests wait here, not there, because only here can a waiting one be cancelled; a running one is cancelled at its next
token or chunk of the prompt. As batches mix and prefixes are reused, an answer's last bits depend on the load: the same
seed gives the same tokens except where two candidates are nearly tied.

Its HTTP listener cannot be turned off. It is bound to a socket file in a folder of ours that nobody else may enter.
Where a token ends inside a UTF-8 character, see `completions`.
"""

import ctypes
import importlib
import importlib.util
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from wrinklefree.serving.engine import llama_cpp_probe
from wrinklefree.serving.engine.completions import CompletionReader, Undecided, Vocabulary, completion_body, error_text
from wrinklefree.serving.engine.protocol import EngineInfo, Sampling, Token
from wrinklefree.serving.engine.requests import Request, WorkerPool, check_request, close_at_exit, end_tokens_of
from wrinklefree.utils.errors import EngineError
from wrinklefree.utils.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

PROMPT_CHUNK = 512
"""Prompt tokens a batch: the longest that cancelling takes to be seen."""
PROBE_SECONDS = 300.0
"""Longest that mapping a file and building a small context may take."""
_ERRORS_ONLY, _EVERYTHING = 1, 4
"""llama.cpp's verbosity; errors go to standard error."""
_LONGEST_SOCKET = 100
"""Characters of a socket file's path that every system takes."""
_OVERWHELMING = 1e4
"""A logit bias that decides the token."""


def is_installed() -> bool:
    """Whether the package is there, without importing it."""
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCppEngine:
    """A GGUF file in llama.cpp, in process."""

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
    ) -> None:
        """Load the file; returns when it is ready.

        Args:
            path: A GGUF file. A process of its own tries it first, because llama.cpp aborts on some broken ones.
            tokenizer: The file's tokenizer.
            name: What /v1/models calls it.
            context_length: Most tokens of a prompt and its continuation; memory for it is taken for every slot at once.
            slots: Requests in progress at the same time.
            threads: CPU threads; None is one for each physical core.
            end_tokens: Tokens that end an answer, beyond those that the tokenizer names.

        Raises:
            EngineError: the package is missing, or llama.cpp does not load the file.
        """
        if not is_installed():
            raise EngineError("the package xllamacpp is not installed; install it, or take --engine torch")
        _try_to_load(path)
        self._tokenizer = tokenizer
        self._vocabulary = Vocabulary(tokenizer)
        self._end_tokens = end_tokens_of(tokenizer, end_tokens)
        self._info = EngineInfo("llama.cpp", name, context_length, slots)
        self._folder = Path(tempfile.mkdtemp(prefix="wrinklefree-"))
        try:
            self._server: Any = _start(path, self._folder, context_length, slots, threads)
        except RuntimeError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise EngineError(
                f"llama.cpp does not load {path} with {slots} slots of {context_length} tokens, though it does with "
                f"little memory ({_one_line(error)}); ask for fewer slots or a shorter context"
            ) from error
        self._closing = threading.Lock()
        self._pool = WorkerPool(slots, self._work, name="llama.cpp")
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
        """Tokens that end a continuation; llama.cpp also stops at a few more that it knows by name (FIM padding)."""
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
        """End requests, unload the model and remove the socket."""
        self._pool.close()
        with self._closing:
            if self._pool.stuck:
                logger.warning("llama.cpp is still busy with a request; its memory is freed when that ends")
            self._server = None
            shutil.rmtree(self._folder, ignore_errors=True)

    def _work(self, request: Request) -> None:
        """Stream a request; after tokens that cannot be told from the text, ask for them and go on from there."""
        server, produced = self._server, list[int]()
        while not request.cancelled and len(produced) < request.sampling.max_tokens:
            left = replace(request.sampling, max_tokens=request.sampling.max_tokens - len(produced))
            if produced and left.seed is not None:
                left = replace(left, seed=left.seed + len(produced))
            prefix = [*request.prompt, *produced]
            undecided = self._stream_from(server, request, prefix, left, produced)
            if undecided == 0 or request.cancelled:
                return
            again = replace(left, max_tokens=undecided, seed=left.seed)
            prefix = [*request.prompt, *produced]
            reply = self._ask(server, completion_body(prefix, again, stream=False))
            for index in reply["__verbose"]["tokens"]:
                if not self._deliver(server, request, produced, Token(int(index))):
                    return

    def _stream_from(
        self, server: Any, request: Request, prefix: list[int], sampling: Sampling, produced: list[int]
    ) -> int:
        """Stream from a prefix until the end (0), or until tokens must be asked for again (their number)."""
        reader = CompletionReader(self._vocabulary, sampling)
        undecided, failure, over = 0, None, False

        def receive(message: Mapping[str, Any]) -> bool:
            # Called by native code, which would drop an exception. True cancels.
            nonlocal undecided, failure, over
            try:
                for token in reader.read(message.get("__verbose", message)):
                    over = not self._deliver(server, request, produced, token)
                    if over:
                        return True
            except Undecided as question:
                undecided = question.count
                return True
            except BaseException as error:  # noqa: BLE001 - raised below, outside of native code
                failure = error
                return True
            return request.cancelled

        server.handle_completions(completion_body(prefix, sampling) | {"verbose": True}, receive)
        if failure is not None:
            raise failure
        if over:
            return 0
        return undecided or reader.missing

    def _deliver(self, server: Any, request: Request, produced: list[int], token: Token) -> bool:
        """Hand a token on, with the log-probabilities it lacks; whether the answer goes on."""
        if token.id in self._end_tokens or request.cancelled:
            return False
        if request.sampling.logprobs is not None and token.logprob is None:
            token = self._score(server, [*request.prompt, *produced], token.id, request.sampling.logprobs)
        produced.append(token.id)
        request.put(token)
        return len(produced) < request.sampling.max_tokens

    def _score(self, server: Any, prefix: list[int], index: int, alternatives: int) -> Token:
        """The log-probability of a token after a prefix.

        Probabilities come only with a token whose text is whole, so a harmless one is forced; the reported
        probabilities are those before the force.
        """
        body = completion_body(prefix, Sampling(max_tokens=1, temperature=0), stream=False)
        body["logit_bias"] = [[self._vocabulary.ids[b"0"], _OVERWHELMING]]
        wanted = max(64, alternatives)
        while True:
            reply = self._ask(server, body | {"n_probs": wanted})
            best = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            logprobs = {int(entry["id"]): float(entry["logprob"]) for entry in best}
            if index in logprobs or wanted >= self._tokenizer.vocab_size:
                return Token(index, logprobs.get(index), tuple(list(logprobs.items())[:alternatives]))
            wanted *= 16

    def _ask(self, server: Any, body: dict[str, Any]) -> Any:
        """A reply at once."""
        reply = server.handle_completions(body | {"verbose": True})
        if "error" in reply or "choices" not in reply:
            raise EngineError(f"llama.cpp refused the request: {error_text(reply.get('error', json.dumps(reply)))}")
        return reply


def _try_to_load(path: Path) -> None:
    """Load a file in another process.

    Raises:
        EngineError: that process died or refused; with what llama.cpp said.
    """
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    # Isolated: this folder must not be on its path, where `requests` would be ours.
    command = [sys.executable, "-I", llama_cpp_probe.__file__, str(path), str(Path(spec.origin).parents[1])]
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    with tempfile.TemporaryDirectory(prefix="wrinklefree-") as folder:
        try:
            result = subprocess.run(
                [*command, folder],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=PROBE_SECONDS,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"llama.cpp has not loaded {path} in {PROBE_SECONDS:.0f} s; is its disk slow?") from error
    if result.returncode == 0:
        return
    lines = result.stderr.decode("utf-8", errors="replace").splitlines()
    telling = [line for line in lines if "error loading model:" in line or "GGML_ASSERT" in line] or lines[-1:]
    said = telling[0].rpartition("error loading model:")[2].strip() if telling else "it said nothing"
    what = f"died of signal {-result.returncode} on" if result.returncode < 0 else "does not load"
    raise EngineError(f"llama.cpp {what} {path} ({said}); write the file again, or take --engine torch")


def _start(path: Path, folder: Path, context_length: int, slots: int, threads: int | None) -> Any:
    """Load a model and start its loop."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.verbosity = _EVERYTHING if logger.isEnabledFor(logging.DEBUG) else _ERRORS_ONLY
    socket = str(folder / "http.sock")  # this ending makes it a socket file
    if len(socket) > _LONGEST_SOCKET:
        params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [secrets.token_urlsafe(32)]
    else:
        params.hostnames = [socket]
    params.n_threads_http = 1
    params.ui = False
    params.n_parallel = slots
    params.n_ctx = context_length * slots  # divided among the slots
    params.kv_unified = False
    params.n_batch = params.n_ubatch = PROMPT_CHUNK
    params.cache_ram_mib = 0
    params.cache_idle_slots = False
    params.ctx_shift = False
    params.fit_params = False
    params.use_jinja = False
    params.chat_template = "chatml"  # templates are rendered above this engine; a broken one must not stop loading
    if threads is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    with _signal_handlers_kept():
        server = xllamacpp.Server(params)
    # Destroying a server whose loop has not begun waits for ever; after one answer it has.
    server.handle_completions({"prompt": [0], "n_predict": 1})
    return server


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Undo that the library takes SIGINT and SIGTERM for itself; works in any thread, as `signal.signal` does not."""
    kept: list[tuple[int, int | None]] = []
    get: Callable[..., int | None] = ctypes.pythonapi.PyOS_getsig
    put: Callable[..., int | None] = ctypes.pythonapi.PyOS_setsig
    get.restype = put.restype = ctypes.c_void_p  # pyright: ignore[reportFunctionMemberAccess]
    get.argtypes, put.argtypes = [ctypes.c_int], [ctypes.c_int, ctypes.c_void_p]  # pyright: ignore[reportFunctionMemberAccess]
    if os.name == "posix":
        kept = [(number, get(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in kept:
            with suppress(ValueError):
                put(number, handler)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
