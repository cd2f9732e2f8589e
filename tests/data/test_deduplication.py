"""Exact duplicates by hash, near ones by MinHash; the first one stays."""

import random
import sys

import pytest

from wrinklefree.data.deduplication import Deduplicator, phrases
from wrinklefree.utils.errors import NotAvailableError


def words(seed: int, count: int = 200) -> list[str]:
    generator = random.Random(seed)
    return [f"w{int(generator.random() * 5000)}" for _ in range(count)]


def test_exact_duplicates_but_for_white_space() -> None:
    seen = Deduplicator("exact", near_threshold=0.8)
    assert seen.reasons(["a b", "a  b\n", "A b"]) == [None, "exact_duplicate", None]
    assert seen.reasons(["a b", "c"]) == ["exact_duplicate", None]


def test_none_drops_nothing() -> None:
    assert Deduplicator("none", near_threshold=0.8).reasons(["a", "a"]) == [None, None]


def test_near_duplicates_across_calls() -> None:
    pytest.importorskip("rensa", reason="near duplicates need the extra dedup (rensa)")
    seen = Deduplicator("near", near_threshold=0.8)
    first = words(1)
    changed = [*first[:100], "other", *first[101:]]
    half = [*first[:100], *words(2, 100)]
    assert seen.reasons([" ".join(first)]) == [None]
    found = seen.reasons([" ".join(changed), " ".join(half), " ".join(words(3)), " ".join(first)])
    assert found == ["near_duplicate", None, None, "exact_duplicate"]


def test_near_duplicates_without_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(NotAvailableError, match="needs the library rensa: uv sync --extra dedup"):
        Deduplicator("near", near_threshold=0.8)


def test_phrases_of_words_and_of_characters() -> None:
    assert phrases("A b c d e F") == ["a b c d e", "b c d e f"]
    assert phrases("a b") == ["a b"]
    text = "".join(chr(0x4E00 + number) for number in range(40))
    assert phrases(text) == [text[start : start + 13] for start in range(28)]
    assert phrases("") == [""]
