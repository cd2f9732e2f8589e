"""What the server, the terminal chat and the pipeline need of an inference engine: tokens in, a stream of tokens out.

Tokenizing, chat templates, stop strings and the HTTP API stand above this line and are the same for every engine; the
forward pass, the key-value cache, sampling and the scheduling of several requests stand below it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from wrinklefree.utils.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token."""

    max_tokens: int
    """Most tokens to produce."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float | None = None
    """Keep the smallest set of tokens whose probability reaches this; None keeps all."""
    top_k: int | None = None
    """Keep this many of the likeliest tokens; None keeps all."""
    seed: int | None = None
    """The same seed, prompt and settings give the same tokens from the same engine; None draws one."""
    logprobs: int | None = None
    """None: no log-probabilities; 0: those of the chosen tokens; n: also those of the n likeliest at each place."""


@dataclass(frozen=True)
class Token:
    """One produced token."""

    id: int
    logprob: float | None = None
    """Natural logarithm of its probability before temperature and truncation, where `Sampling.logprobs` asked for it."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the likeliest tokens at this place, likeliest first."""


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says of itself."""

    engine: str
    """The name that `--engine` takes: native, llama.cpp, bitnet.cpp or torch."""
    model: str
    """The model's name, as /v1/models lists it."""
    context_length: int
    """Most tokens of a prompt and its continuation together."""
    slots: int
    """Requests that it works on at the same time; more wait."""


class Engine(Protocol):
    """A loaded model that produces tokens. Every method may be called from any thread."""

    @property
    def info(self) -> EngineInfo:
        """Name, model and limits."""
        ...

    @property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer of the model, from the same file as its weights."""
        ...

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a continuation; they are not part of it."""
        ...

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Token]:
        """Tokens after `prompt`, each as soon as it is known, until an end token or `sampling.max_tokens`.

        Closing the iterator ends the work on it and frees its slot.

        Raises:
            EngineError: the engine died or refused; the message says what it said.
        """
        ...

    def close(self) -> None:
        """Free the model; requests under way end. May be called twice."""
        ...
