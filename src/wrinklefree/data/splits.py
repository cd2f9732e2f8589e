"""Which documents and examples are kept out of training: decided by a hash of the text, so the same everywhere."""

import hashlib
from typing import Literal

Split = Literal["train", "validation", "test"]

_HASH_RANGE = 1 << 64


def hash_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, uniform over texts."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / _HASH_RANGE


def split_by_hash(text: str, *, validation: float, test: float) -> Split:
    """The split of a text, given the shares of validation and test.

    Test takes the low end and validation the high end, so the sets of a smaller share are inside those of a larger one:
    changing a share never moves a text from validation to test or back.
    """
    share = hash_share(text)
    if share < test:
        return "test"
    return "validation" if share >= 1 - validation else "train"
