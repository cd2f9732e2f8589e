"""llama.cpp's completion API, as its server speaks it in process and over HTTP: the request, and tokens out of the reply.

The server streams text, and holds a token back while the text ends inside a UTF-8 character; the ids and probabilities
of held-back tokens are never sent. `CompletionReader` finds their ids again: the text of a message is the bytes of the
tokens held back and of the one whose id it names, so the split of the bytes before that one into as many tokens as were
counted is the answer wherever it is unique. Where it is not, `Undecided` says so and the caller asks again without
streaming, which returns every id.
"""

import json
import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from wrinklefree.serving.engine.protocol import Sampling, Token
from wrinklefree.utils.errors import EngineError
from wrinklefree.utils.tokenizer import TextTokenizer

_RANDOM_SEED = 2**32 - 1
"""Seeds are 32 bits; this one means: draw one."""
_REPLACEMENT = "\ufffd"
_MAX_SPLITS = 2


def completion_body(prompt: Sequence[int], sampling: Sampling, *, stream: bool = True) -> dict[str, Any]:
    """A completion request that samples as our own engine does.

    Temperature comes before top-k and top-p, and everything else that could bend the distribution is off.
    """
    seed = random.randrange(_RANDOM_SEED) if sampling.seed is None else sampling.seed % _RANDOM_SEED
    body: dict[str, Any] = {
        "prompt": list(prompt),
        "n_predict": sampling.max_tokens,
        "stream": stream,
        "return_tokens": True,
        "return_progress": stream,  # a message for each chunk of the prompt: a chance to cancel
        "cache_prompt": True,
        "seed": seed,
        "temperature": sampling.temperature,
        "top_k": 0 if sampling.top_k is None else sampling.top_k,
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        "samplers": ["temperature", "top_k", "top_p"],
        "min_p": 0.0,
        "typical_p": 1.0,
        "top_n_sigma": -1.0,
        "xtc_probability": 0.0,
        "dynatemp_range": 0.0,
        "mirostat": 0,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "dry_multiplier": 0.0,
        "ignore_eos": False,
        "post_sampling_probs": False,
    }
    if sampling.logprobs is not None:
        body["n_probs"] = max(1, sampling.logprobs)
    return body


class Vocabulary:
    """Tokens as bytes, of byte-level BPE and of SentencePiece with byte fallback."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self.tokenizer.json)["decoder"])

    @cached_property
    def ids(self) -> Mapping[bytes, int]:
        """The id of each distinct byte string; of two tokens with the same bytes, the first."""
        ids: dict[bytes, int] = {}
        for index in range(self.tokenizer.vocab_size):
            if word := self.bytes_of(index):
                ids.setdefault(word, index)
        return ids

    def bytes_of(self, index: int) -> bytes:
        """What a token adds to a text; nothing for an id without a token."""
        word = self.tokenizer.token(index) or ""
        if self._is_byte_level:
            try:
                return bytes(_BYTE_OF_LETTER[letter] for letter in word)
            except KeyError:  # an added token is spelled as it is
                return word.encode()
        if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            return bytes([int(word[3:5], 16)])
        return word.replace("\u2581", " ").encode()

    def splits(self, text: bytes, count: int) -> list[list[int]]:
        """Ways to write bytes as exactly `count` tokens, at most two of them: enough to see whether it is one."""
        if count == 0:
            return [[]] if not text else []
        found: list[list[int]] = []
        for end in range(len(text) - count + 1, 0, -1):
            first = self.ids.get(text[:end])
            if first is None:
                continue
            found.extend([first, *rest] for rest in self.splits(text[end:], count - 1))
            if len(found) >= _MAX_SPLITS:
                break
        return found[:_MAX_SPLITS]


def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE writes printable bytes as themselves and the others, in order, as the letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_of_letter()


class Undecided(Exception):  # noqa: N818 - not a failure: a question for the caller
    """The ids of held-back tokens do not follow from the text."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} tokens were held back and their text has several spellings")
        self.count = count
        """Tokens to ask for again, after those already returned; the one named in the message is among them."""


class CompletionReader:
    """Turns the messages of one streamed completion into tokens."""

    def __init__(self, vocabulary: Vocabulary, sampling: Sampling) -> None:
        self._vocabulary = vocabulary
        self._sampling = sampling
        self.counted = 0
        """Tokens returned so far, ended or not."""
        self.finished = False
        """Whether the last message has come."""
        self.missing = 0
        """Tokens that were held back at the end and never sent."""

    def read(self, message: Mapping[str, Any]) -> list[Token]:
        """Tokens that a message brings, in order; held-back ones come without log-probabilities.

        Raises:
            EngineError: the message is an error, or not one of this API.
            Undecided: tokens were held back and cannot be told from the text.
        """
        if "error" in message:
            raise EngineError(f"llama.cpp refused the request: {error_text(message['error'])}")
        try:
            return self._read(message)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise EngineError(f"the server sent a message that is not of its API ({error!r})") from error

    def _read(self, message: Mapping[str, Any]) -> list[Token]:
        if "prompt_progress" in message:
            return []
        total: int | None = message.get("tokens_predicted")
        if message["stop"]:
            self.finished = True
        if "tokens" not in message:
            # Servers of 2024 stream text only: the ids are those of our own tokenizer.
            ids = self._vocabulary.tokenizer.encode(message["content"])
            self.counted += len(ids)
            return [Token(index) for index in ids]
        ids = [int(index) for index in message["tokens"]]
        if self.finished:
            self.missing = 0 if total is None else max(0, total - self.counted - len(ids))
            if not ids:
                return []
        content = str(message["content"]).encode()
        own = b"".join(map(self._vocabulary.bytes_of, ids))
        held_back: list[int] = []
        if total is not None and total > self.counted + len(ids):
            held_back = self._held_back(content, own, total - self.counted - len(ids), total)
        self.counted += len(held_back) + len(ids)
        return [*map(Token, held_back), *self._with_logprobs(ids, message)]

    def _held_back(self, content: bytes, own: bytes, count: int, total: int) -> list[int]:
        if not content.endswith(own) or _REPLACEMENT.encode() in content:
            raise Undecided(total - self.counted)
        splits = self._vocabulary.splits(content[: len(content) - len(own)], count)
        if len(splits) != 1:
            raise Undecided(total - self.counted)
        return splits[0]

    def _with_logprobs(self, ids: list[int], message: Mapping[str, Any]) -> list[Token]:
        if self._sampling.logprobs is None:
            return [Token(index) for index in ids]
        entries = {int(entry["id"]): entry for entry in message.get("completion_probabilities", ()) if "id" in entry}
        tokens: list[Token] = []
        for index in ids:
            if index not in entries:
                tokens.append(Token(index))
                continue
            best = entries[index]["top_logprobs"][: self._sampling.logprobs]
            alternatives = tuple((int(other["id"]), float(other["logprob"])) for other in best)
            tokens.append(Token(index, float(entries[index]["logprob"]), alternatives))
        return tokens


def error_text(error: Any) -> str:
    """The message inside an error of the API."""
    text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())
