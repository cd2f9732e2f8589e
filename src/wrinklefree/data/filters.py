"""Quality filters that need no language: lengths, kinds of characters, and repetition.

Each is a figure of a document and a limit for it (`FilterConfig`). They are meant for text of the web, where boilerplate,
tables of numbers and repetition are what hurts most; curated text should lose next to nothing to them.
"""

import re
import sys
import unicodedata
import zlib
from collections import Counter
from functools import cache

from wrinklefree.data.config import FilterConfig

PHRASE_WORDS = 4
_SAMPLE_BYTES = 1 << 16
"""Beginning of a document that is compressed: zlib's window is smaller anyhow."""


def reason_to_drop(text: str, limits: FilterConfig) -> str | None:
    """The key of the first limit that a document breaks, or None where it keeps to all of them."""
    checks = (
        ("min_characters", limits.min_characters, lambda limit: len(text) < limit),
        ("max_characters", limits.max_characters, lambda limit: len(text) > limit),
        ("max_symbol_share", limits.max_symbol_share, lambda limit: symbol_share(text) > limit),
        ("max_digit_share", limits.max_digit_share, lambda limit: digit_share(text) > limit),
        (
            "max_duplicate_line_share",
            limits.max_duplicate_line_share,
            lambda limit: duplicate_lines(text)[0] > limit,
        ),
        (
            "max_duplicate_line_characters",
            limits.max_duplicate_line_characters,
            lambda limit: duplicate_lines(text)[1] > limit,
        ),
        ("max_top_phrase_share", limits.max_top_phrase_share, lambda limit: top_phrase_share(text) > limit),
        ("min_compression_ratio", limits.min_compression_ratio, lambda limit: compression_ratio(text) < limit),
    )
    return next((name for name, limit, breaks in checks if limit is not None and breaks(limit)), None)


def symbol_share(text: str) -> float:
    """Punctuation and symbols of any script, of the characters that are not white space."""
    return _share(_symbols().findall(text), text)


def digit_share(text: str) -> float:
    """Decimal digits of any script, of the characters that are not white space."""
    return _share(re.findall(r"\d+", text), text)


def duplicate_lines(text: str) -> tuple[float, float]:
    """Lines that stood before, as a share of the lines that are not blank and as a share of their characters."""
    lines = [line for raw in text.splitlines() if (line := raw.strip())]
    if not lines:
        return 0.0, 0.0
    repeats = {line: count - 1 for line, count in Counter(lines).items() if count > 1}
    characters = sum(len(line) * count for line, count in repeats.items())
    return sum(repeats.values()) / len(lines), characters / sum(map(len, lines))


def top_phrase_share(text: str) -> float:
    """Characters covered by the most frequent phrase of four words, of all characters; 0 where none comes three times."""
    words = text.split()
    phrases = Counter(zip(*(words[start:] for start in range(PHRASE_WORDS)), strict=False))
    # Among equally frequent phrases the longest counts.
    best = max(((count, sum(map(len, phrase))) for phrase, count in phrases.items()), default=(0, 0))
    count, characters = best
    return count * characters / sum(map(len, words)) if count > 2 else 0.0


def compression_ratio(text: str) -> float:
    """Compressed over plain bytes of the beginning of a text."""
    sample = text.encode("utf-8", "replace")[:_SAMPLE_BYTES]
    return len(zlib.compress(sample, 6)) / len(sample) if sample else 1.0


def _share(found: list[str], text: str) -> float:
    solid = len(text) - sum(map(len, re.findall(r"\s+", text)))
    return sum(map(len, found)) / solid if solid else 0.0


@cache
def _symbols() -> re.Pattern[str]:
    """Runs of characters of the Unicode categories P and S; "not a word character" would count vowel signs of Indic scripts."""
    ranges: list[tuple[int, int]] = []
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code))[0] in "PS":
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1] = (ranges[-1][0], code)
            else:
                ranges.append((code, code))
    return re.compile("[" + "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges) + "]+")
