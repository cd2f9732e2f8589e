"""What this layer asks of a tokenizer, and how a text becomes the tokens of a document.

A document is a start token, the text, and the end token. The start token is the model's BOS where its convention adds
one, else its EOS. It makes the first token of a text a target like any other, and it is what bits per byte condition
on, so scoring looks to the model as training did.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


class Tokenizer(Protocol):
    """The part of `wrinklefree.utils.tokenizer.TextTokenizer` that data needs."""

    @property
    def eos_token_id(self) -> int:
        """Id of the end-of-document token."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """Id of the beginning-of-document token, if there is one."""
        ...

    @property
    def pad_token_id(self) -> int:
        """Id that fills positions without a document."""
        ...

    @property
    def add_bos(self) -> bool:
        """Whether the model was trained with a BOS before each document."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identity of vocabulary and rules."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts, without special tokens."""
        ...


def start_token_id(tokenizer: Tokenizer) -> int:
    """The token that opens every document and prompt: BOS where the model's convention adds it, else EOS."""
    if tokenizer.add_bos and tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    return tokenizer.eos_token_id


def encode_documents(texts: Sequence[str], tokenizer: Tokenizer) -> list[Tokens]:
    """Start token, text, end token: one array a text."""
    start, end = start_token_id(tokenizer), tokenizer.eos_token_id
    return [np.asarray([start, *ids, end], dtype=np.int32) for ids in tokenizer.encode_batch(list(texts))]
