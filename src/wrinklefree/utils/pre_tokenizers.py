"""How byte-level BPE tokenizers cut text before merging: tokenizer.json's records and GGUF's names for them.

A GGUF file stores a name (`tokenizer.ggml.pre`) where tokenizer.json stores a program. A runtime that is given no name,
or a wrong one, splits words and digits elsewhere and silently makes a model worse, so a tokenizer is matched by what it
does, never by what its model is called, and one that matches nothing is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from wrinklefree.utils.errors import ConfigError

Record = Mapping[str, Any]

_GPT2_WORDS: Record = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES_ONLY: Record = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
_IRRELEVANT = frozenset({"trim_offsets"})
"""Fields that change offsets and no token."""


def _split(digits: str) -> Record:
    """Contractions, words, numbers of `digits`, punctuation, line ends, spaces."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    regex = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [regex, _BYTES_ONLY]}


@dataclass(frozen=True)
class PreTokenizer:
    """One row of the table."""

    name: str
    """`tokenizer.ggml.pre`."""
    steps: Record
    """tokenizer.json's `pre_tokenizer`."""
    normalizers: tuple[Record | None, ...] = (None,)
    """tokenizer.json's `normalizer`, the first as written back. GGUF runtimes do not normalise: texts in normal form NFC,
    which nearly all are, give the same tokens."""
    ignore_merges: bool = False
    """Whether a whole word that is in the vocabulary is taken without merging."""


PRE_TOKENIZERS: tuple[PreTokenizer, ...] = (
    PreTokenizer("gpt-2", _GPT2_WORDS),
    PreTokenizer(
        "smollm",
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2_WORDS]},
    ),
    PreTokenizer("qwen2", _split(r"\p{N}"), normalizers=({"type": "NFC"}, None)),
    PreTokenizer("llama-bpe", _split(r"\p{N}{1,3}"), ignore_merges=True),
)


def pre_tokenizer_of(tokenizer_json: Record) -> PreTokenizer:
    """The row that a tokenizer.json's byte-level BPE tokenizer matches.

    Raises:
        ConfigError: none does; the message shows what it has.
    """
    steps, normalizer = _reduced(tokenizer_json["pre_tokenizer"]), _reduced(tokenizer_json["normalizer"])
    ignore_merges = bool(tokenizer_json["model"].get("ignore_merges", False))
    for row in PRE_TOKENIZERS:
        if (
            _reduced(row.steps) == steps
            and normalizer in [_reduced(candidate) for candidate in row.normalizers]
            and row.ignore_merges == ignore_merges
        ):
            return row
    found = json.dumps({"normalizer": normalizer, "pre_tokenizer": steps, "ignore_merges": ignore_merges})
    known = ", ".join(row.name for row in PRE_TOKENIZERS)
    raise ConfigError(
        f"the tokenizer cuts text in a way that has no GGUF name here (known: {known}): {found}; export the model with "
        "scripts/export_hf.py instead"
    )


def pre_tokenizer_named(name: str) -> PreTokenizer | None:
    """The row of a GGUF name."""
    return next((row for row in PRE_TOKENIZERS if row.name == name), None)


def _reduced(value: Any) -> Any:
    """A record without fields that change no token; a sequence of one step is that step."""
    if isinstance(value, list):
        return [_reduced(item) for item in cast("list[Any]", value)]
    if not isinstance(value, Mapping):
        return value
    record = cast("Mapping[str, Any]", value)
    kept: dict[str, Any] = {key: _reduced(item) for key, item in record.items() if key not in _IRRELEVANT}
    steps: list[Any] = kept.get("pretokenizers") or kept.get("normalizers") or []
    return steps[0] if kept.get("type") == "Sequence" and len(steps) == 1 else kept
