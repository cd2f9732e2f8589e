"""Text in a terminal: one prompt continued, or a conversation.

The answer is written as it comes to standard output, everything else to standard error, so that a pipe gets the text
alone. The engine runs in a thread: Ctrl-C reaches only this module, which ends the answer and never the engine's work in an
undefined place.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from wrinklefree.serving.chat_text import ChatPrompt, Message, encode_prompt
from wrinklefree.serving.engine.protocol import Engine, Sampling
from wrinklefree.serving.generations import Work
from wrinklefree.serving.text_stream import Finish, Piece, TokenBytes, stream_text
from wrinklefree.utils.errors import ConfigError

HELP = "Ctrl-C stops an answer, /reset forgets the conversation, /exit or Ctrl-D leaves"
INTERRUPTED_CODE = 130


@dataclass(frozen=True)
class Request:
    """What to do with a prompt."""

    max_tokens: int | None = None
    """Refused where the context has no room for so many; None: `usual_tokens`, or what there is room for."""
    usual_tokens: int | None = None
    """None fills the context."""
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Statistics:
    """What an answer took."""

    prompt_tokens: int
    tokens: int
    first_seconds: float
    """From the start to the first text."""
    seconds: float
    reason: str
    """stop, length, or interrupted."""

    def line(self) -> str:
        """One line for people."""
        after = self.seconds - self.first_seconds
        rate = f", {(self.tokens - 1) / after:.1f} tokens/s" if self.tokens > 1 and after > 0 else ""
        return (
            f"[{self.prompt_tokens} prompt tokens, first text after {self.first_seconds:.2f} s; "
            f"{self.tokens} tokens in {self.seconds:.2f} s{rate}; {self.reason}]"
        )


class Terminal:
    """Writes an engine's answers to standard output."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._token_bytes = TokenBytes(engine.tokenizer)
        self._chat = ChatPrompt(engine.tokenizer, self._token_bytes)

    def complete(self, prompt: str, request: Request) -> int:
        """Continue a text; returns the exit code.

        Raises:
            ConfigError: the prompt leaves no room in the context.
        """
        _, statistics = self._answer(encode_prompt(self._engine.tokenizer, prompt), request)
        sys.stderr.write(f"{statistics.line()}\n")
        return INTERRUPTED_CODE if statistics.reason == "interrupted" else 0

    def converse(self, request: Request, *, system: str | None = None, first: str | None = None) -> int:
        """Talk until the end of the input; returns the exit code.

        Args:
            request: Settings of each answer.
            system: Instruction before the conversation.
            first: The first question, asked without waiting for the keyboard.
        """
        opening = [Message("system", system)] if system else []
        history = list(opening)
        info = self._engine.info
        template = "" if self._chat.has_template else "; it has no chat template, so it gets a plain script"
        sys.stderr.write(f"{info.model} with {info.engine}, context {info.context_length} tokens{template}\n{HELP}\n")
        for question in _questions(first):
            if question == "/reset":
                history = list(opening)
                sys.stderr.write("[forgotten]\n")
                continue
            asked = [*history, Message("user", question)]
            try:
                stops = (*request.stops, *self._chat.stops)
                text, statistics = self._answer(self._chat.encode(asked), request, stops)
            except ConfigError as error:
                sys.stderr.write(f"[{error}; /reset starts anew]\n")
                continue
            sys.stderr.write(f"{statistics.line()}\n")
            history = [*asked, Message("assistant", text.strip())]
        return 0

    def _answer(
        self, prompt: list[int], request: Request, stops: Sequence[str] | None = None
    ) -> tuple[str, Statistics]:
        sampling = self._sampling(len(prompt), request)
        started = time.monotonic()
        first: float | None = None
        parts: list[str] = []
        tokens = 0
        reason = "interrupted"
        stopped = request.stops if stops is None else stops

        def start(work: Work) -> Iterator[Piece | Finish]:
            tokens = work.watch(self._engine.stream(prompt, sampling))
            return stream_text(tokens, self._token_bytes, max_tokens=sampling.max_tokens, stops=stopped)

        answer = _Background(start)
        try:
            answer.start()
            for item in answer:
                if isinstance(item, Finish):
                    reason, tokens = item.reason, item.tokens
                    break
                first = time.monotonic() if first is None else first
                tokens += len(item.tokens)
                parts.append(item.text)
                sys.stdout.write(item.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            pass
        finally:
            answer.close()
        ended = time.monotonic()
        sys.stdout.write("\n")
        sys.stdout.flush()
        statistics = Statistics(len(prompt), tokens, (first or ended) - started, ended - started, reason)
        return "".join(parts), statistics

    def _sampling(self, prompt_tokens: int, request: Request) -> Sampling:
        room = self._engine.info.context_length - prompt_tokens
        asked = min(room, request.usual_tokens or room) if request.max_tokens is None else request.max_tokens
        if room < 1 or asked > room:
            wanted = "an answer" if request.max_tokens is None else f"{asked} more"
            raise ConfigError(
                f"the prompt's {prompt_tokens} tokens and {wanted} do not fit into the context of "
                f"{self._engine.info.context_length}; shorten the prompt, lower --max-tokens or raise --context-length"
            )
        return Sampling(asked, request.temperature, request.top_p, request.top_k, request.seed)


class _Background:
    """Runs an iterator in a thread; closing ends its work and waits for it."""

    def __init__(self, start: Callable[[Work], Iterator[Piece | Finish]]) -> None:
        self._items: SimpleQueue[Piece | Finish | BaseException] = SimpleQueue()
        self._work = Work()
        self._start = start
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    def start(self) -> None:
        """Begin the work."""
        self._thread.start()

    def __iter__(self) -> Iterator[Piece | Finish]:
        while True:
            item = self._items.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if isinstance(item, Finish):
                return

    def close(self) -> None:
        """End the work."""
        self._work.abandon()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._start(self._work):
                self._items.put(item)
                if self._work.abandoned:
                    return
        except BaseException as error:  # noqa: BLE001 - raised where it is read
            self._items.put(error)


def _questions(first: str | None) -> Iterator[str]:
    """What the user types, line by line, until the end of the input or /exit; empty lines ask nothing."""
    if first is not None:
        yield first
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            sys.stderr.write(f"\n{HELP}\n")
            continue
        if line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()
