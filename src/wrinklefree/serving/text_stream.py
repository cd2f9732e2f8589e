"""From a stream of tokens to a stream of text: whole characters only, stop strings cut, at a constant cost a token.

A token is a run of bytes; where it ends inside a character, or inside what may become a stop string, the rest is held back
until it is known. Bytes are looked up per token, so that nothing is ever decoded twice: byte-level BPE spells a byte as a
printable letter, SentencePiece spells a space as ▁ and single bytes as <0x0A>. Other kinds of tokenizer are refused.
"""

import codecs
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from wrinklefree.serving.engine.protocol import Token
from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.tokenizer import TextTokenizer

FinishReason = Literal["stop", "length"]
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Piece:
    """A bit of text that is final, and the tokens that it completes."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Finish:
    """The end of a text."""

    reason: FinishReason
    """stop: an end token or a stop string; length: as many tokens as were allowed."""
    tokens: int
    """Tokens produced, with those that a stop string cut off."""


class TokenBytes:
    """The bytes that each token of a vocabulary stands for."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        """Read the decoder's kind and the special tokens.

        Raises:
            CheckpointError: the tokenizer is neither byte-level BPE nor SentencePiece with bytes.
        """
        description: dict[str, Any] = json.loads(tokenizer.json)
        kinds = set(_decoder_kinds(description["decoder"]))
        if "ByteLevel" not in kinds and "ByteFallback" not in kinds:
            raise CheckpointError(
                f"the tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) is neither byte-level nor SentencePiece "
                "with bytes; such a model cannot be streamed"
            )
        self._tokenizer = tokenizer
        self._letters = _bytes_of_letters() if "ByteLevel" in kinds else None
        self.special = {entry["id"]: entry["content"] for entry in description["added_tokens"] if entry["special"]}
        """Control tokens: id -> spelling. They have no text."""
        self._added = {entry["id"]: entry["content"] for entry in description["added_tokens"]}
        self.longest = max(len(self.spelling_bytes(index)) for index in range(tokenizer.vocab_size))
        """Bytes of the longest token: a text of n bytes has at least n / longest tokens."""

    def text_bytes(self, index: int) -> bytes:
        """What a token adds to a text; nothing for a control token, or an id beyond the vocabulary."""
        return b"" if index in self.special else self.spelling_bytes(index)

    def spelling_bytes(self, index: int) -> bytes:
        """A token's bytes, a control token's being its name."""
        if index in self._added:
            return self._added[index].encode()
        spelling = self._tokenizer.token(index)
        if spelling is None:
            return b""
        if self._letters is None:
            byte = _BYTE_TOKEN.fullmatch(spelling)
            return bytes([int(byte[1], 16)]) if byte else spelling.replace("▁", " ").encode()
        try:
            return bytes(self._letters[letter] for letter in spelling)
        except KeyError:  # a word that was added to the vocabulary as it is
            return spelling.encode()

    def spelling(self, index: int) -> str:
        """A token as text, for people; half a character is shown as �."""
        return self.spelling_bytes(index).decode(errors="replace")


class StopStrings:
    """Holds back text that may become a stop string; finds the first that does."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that is certain not to be part of a stop string; after one was found, nothing."""
        if self.found:
            return ""
        held = self._held + text
        starts = [start for stop in self._stops if (start := held.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return held[: min(starts)]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        held, self._held = self._held, ""
        return held


def stream_text(
    tokens: Iterable[Token], token_bytes: TokenBytes, *, max_tokens: int, stops: Sequence[str] = ()
) -> Iterator[Piece | Finish]:
    """Pieces of text as soon as they are certain, then one `Finish`.

    A token comes with the piece that completes its text, so that tokens cut off by a stop string never appear. Closing
    this iterator, or a stop string, closes `tokens`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    stop_strings = StopStrings(stops)
    waiting: deque[tuple[int, int, Token]] = deque()  # (start, end) of a token's text, in characters
    decoded = sent = produced = 0

    def release(text: str, *, cut: bool = False) -> Piece:
        nonlocal sent
        sent += len(text)
        done: list[Token] = []
        while waiting and (waiting[0][1] <= sent or (cut and waiting[0][0] < sent)):
            done.append(waiting.popleft()[2])
        return Piece(text, tuple(done))

    source = iter(tokens)
    try:
        for token in source:
            produced += 1
            text = decoder.decode(token_bytes.text_bytes(token.id))
            waiting.append((decoded, decoded + len(text), token))
            decoded += len(text)
            piece = release(stop_strings.push(text), cut=stop_strings.found)
            if piece.text or piece.tokens:
                yield piece
            if stop_strings.found or produced >= max_tokens:
                break
        if not stop_strings.found:
            rest = stop_strings.push(decoder.decode(b"", final=True))
            if not stop_strings.found:
                rest += stop_strings.flush()
                decoded = sent + len(rest)
                waiting = deque((min(start, decoded), min(end, decoded), token) for start, end, token in waiting)
            piece = release(rest, cut=stop_strings.found)
            if piece.text or piece.tokens:
                yield piece
    finally:
        close = getattr(source, "close", None)
        if close is not None:
            close()
    yield Finish("length" if produced >= max_tokens and not stop_strings.found else "stop", produced)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


def _decoder_kinds(decoder: dict[str, Any] | None) -> Iterator[str]:
    if decoder is not None:
        yield decoder["type"]
        for inner in decoder.get("decoders", ()):
            yield from _decoder_kinds(inner)


def _bytes_of_letters() -> dict[str, int]:
    """The letter that byte-level BPE writes for each byte: itself where it is printable, else the next from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}
