"""Splits by hash."""

from collections import Counter

from wrinklefree.data.splits import hash_share, split_by_hash


def test_shares_are_realised() -> None:
    counts = Counter(split_by_hash(f"text {n}", validation=0.1, test=0.25) for n in range(20_000))
    assert abs(counts["validation"] / 20_000 - 0.1) < 0.01
    assert abs(counts["test"] / 20_000 - 0.25) < 0.01


def test_a_smaller_share_is_inside_a_larger_one() -> None:
    texts = [f"text {n}" for n in range(5000)]
    for split in ("validation", "test"):
        small = {text for text in texts if split_by_hash(text, validation=0.01, test=0.01) == split}
        large = {text for text in texts if split_by_hash(text, validation=0.05, test=0.05) == split}
        assert small
        assert small < large


def test_the_hash_is_pinned() -> None:
    assert hash_share("") == 0xE3B0C44298FC1C14 / 2**64


def test_lone_surrogates_have_a_split() -> None:
    assert 0 <= hash_share("\ud800") < 1
