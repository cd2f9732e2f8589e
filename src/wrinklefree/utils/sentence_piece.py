"""SentencePiece BPE tokenizers (Llama 2's kind): as tokenizer.json, and as the scores that GGUF runtimes merge by.

tokenizer.json merges pairs by their rank in a list. A GGUF runtime merges two neighbours whenever their text is a token,
best score first. The two agree if the list holds every way to make every token, and all ways to make a better token
come before all ways to make a worse one; then a token's score is minus its place.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from wrinklefree.utils.errors import ConfigError

SENTENCE_PIECE_KEY = "wrinklefree.tokenizer.steps"
"""GGUF metadata key: which of `STEPS` the tokenizer has."""

SPACE = "\u2581"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPENDED = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, _REPLACE]}
_METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
STEPS: Mapping[str, tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]] = {
    "prepend": (_PREPENDED, None),
    "metaspace": (None, _METASPACE),
}
"""Name -> normalizer and pre_tokenizer: a space in front of every text, and in front of its first word. They differ only
behind special tokens inside a text, where runtimes do as the first."""

_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}


def steps_name(tokenizer_json: Mapping[str, Any]) -> str:
    """Which of `STEPS` a tokenizer.json has.

    Raises:
        ConfigError: none of them.
    """
    found = (tokenizer_json["normalizer"], tokenizer_json["pre_tokenizer"])
    for name, steps in STEPS.items():
        if found == steps:
            return name
    raise ConfigError(
        "the tokenizer is SentencePiece's and normalises or cuts text in a way that GGUF runtimes do not: "
        f"{json.dumps(found)}; export the model with scripts/export_hf.py instead"
    )


def scores_of(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], special: frozenset[str]
) -> dict[str, float]:
    """Scores of the tokens that merges make; 0 and below, higher merges first.

    Args:
        vocabulary: Word -> id.
        merges: Pairs, first ranks first.
        special: Words that no merge makes.

    Raises:
        ConfigError: merging by scores would not give the same tokens.
    """
    made = [left + right for left, right in merges]
    order = list(dict.fromkeys(made))
    changes = 1 + sum(before != after for before, after in pairwise(made)) if made else 0
    known = set(merges)
    plain = [word for word in vocabulary if word not in special and len(word) > 1]
    missing = next(
        (
            (word[:cut], word[cut:])
            for word in plain
            for cut in range(1, len(word))
            if word[:cut] in vocabulary and word[cut:] in vocabulary and (word[:cut], word[cut:]) not in known
        ),
        None,
    )
    if changes != len(order) or missing is not None:
        what = "merges one token's pairs at different ranks" if missing is None else f"lacks the merge {missing}"
        raise ConfigError(
            f"the tokenizer is BPE with byte fallback, but {what}, so GGUF runtimes, which merge by scores, would cut text "
            "elsewhere; export the model with scripts/export_hf.py instead"
        )
    return {word: -float(place) for place, word in enumerate(order)}


def rebuild(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], steps: str, unknown: str | None
) -> Tokenizer:
    """The tokenizer of a vocabulary and merges, without added tokens."""
    normalizer, pre_tokenizer = STEPS[steps]
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
        "vocab": dict(vocabulary), "merges": [list(pair) for pair in merges],
    }  # fmt: skip
    record: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": _DECODER, "model": model,
    }  # fmt: skip
    return Tokenizer.from_str(json.dumps(record))
