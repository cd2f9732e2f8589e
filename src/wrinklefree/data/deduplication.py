"""Documents that were seen before: the same text, or nearly the same.

Exact duplicates are found by a hash of the text with its white space evened out. Near duplicates are found by MinHash over
overlapping phrases of words, of characters where a script has no spaces; the library `rensa` does the hashing and the
search. The first of a group is kept. What is dropped depends on the order of the documents and on nothing else.
"""

import hashlib
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal

from wrinklefree.utils.errors import NotAvailableError

Deduplication = Literal["none", "exact", "near"]

HASH_BYTES = 16
"""Of SHA-256: two of a billion documents share them with a chance of 10^-21."""
WORDS_A_PHRASE = 5
CHARACTERS_A_PHRASE = 13
"""Where words are long, which means that nothing separates them."""
LONG_WORD = 25
PERMUTATIONS = 128


class Deduplicator:
    """Remembers documents; tells which of the next ones are new."""

    def __init__(self, kind: Deduplication, *, near_threshold: float) -> None:
        """Start with nothing seen.

        Raises:
            NotAvailableError: near duplicates are asked for and their library is not installed.
        """
        self._kind = kind
        self._seen: set[bytes] = set()
        self._near = _near_index(near_threshold) if kind == "near" else None
        self._documents = 0

    def reasons(self, texts: Sequence[str]) -> list[str | None]:
        """For each text: None where it is new, else `exact_duplicate` or `near_duplicate`."""
        if self._kind == "none":
            return [None] * len(texts)
        reasons: list[str | None] = [None if self._is_new(text) else "exact_duplicate" for text in texts]
        if self._near is not None:
            fresh = [index for index, reason in enumerate(reasons) if reason is None]
            keys = range(self._documents, self._documents + len(fresh))
            self._documents += len(fresh)
            pairs = [(str(key), phrases(texts[index])) for key, index in zip(keys, fresh, strict=True)]
            for index, is_new in zip(fresh, self._near.add_pairs(pairs), strict=True):
                reasons[index] = None if is_new else "near_duplicate"
        return reasons

    def _is_new(self, text: str) -> bool:
        even = " ".join(text.split()).encode("utf-8", "surrogatepass")
        digest = hashlib.sha256(even).digest()[:HASH_BYTES]
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True


def phrases(text: str) -> list[str]:
    """Overlapping phrases of a text, lower case: what near duplicates have in common."""
    words = text.lower().split()
    if not words or len(text) > LONG_WORD * len(words):
        even = " ".join(words)
        return [
            even[start : start + CHARACTERS_A_PHRASE] for start in range(max(1, len(even) - CHARACTERS_A_PHRASE + 1))
        ]
    count = max(1, len(words) - WORDS_A_PHRASE + 1)
    return [" ".join(words[start : start + WORDS_A_PHRASE]) for start in range(count)]


def _near_index(threshold: float) -> Any:
    try:
        rensa = import_module("rensa")
    except ImportError as error:
        raise NotAvailableError(
            "deduplicate=near needs the library rensa: uv sync --extra dedup (or pip install 'wrinklefree[dedup]'); "
            "deduplicate=exact needs nothing"
        ) from error
    return rensa.RMinHashDeduplicator(threshold=threshold, num_perm=PERMUTATIONS, use_lsh=True)
