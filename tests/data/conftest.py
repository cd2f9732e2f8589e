"""A tokenizer whose tokens are bytes: token counts and texts can be checked by hand."""

from collections.abc import Sequence

import pytest


class ByteTokenizer:
    """Ids 0-255 are bytes, 256 ends a document, 257 pads."""

    eos_token_id = 256
    bos_token_id: int | None = None
    pad_token_id = 257
    add_bos = False
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(index for index in ids if index < 256).decode()


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()
