"""A tokenizer as GGUF metadata: vocabulary, token types, merges, pre-tokenizer, special tokens, chat template."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from wrinklefree.serving.gguf_writer import MetadataValue
from wrinklefree.utils.errors import ConfigError
from wrinklefree.utils.pre_tokenizers import pre_tokenizer_of
from wrinklefree.utils.sentence_piece import SENTENCE_PIECE_KEY, scores_of, steps_name
from wrinklefree.utils.tokenizer import TextTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""`tokenizer.ggml.token_type`."""

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
"""Special tokens that end a turn of a chat; models are trained to stop at them too."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_OTHER_ALGORITHMS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")


def tokenizer_metadata(tokenizer: TextTokenizer, rows: int) -> dict[str, MetadataValue]:
    """`tokenizer.*` keys for a model whose embedding has this many rows; rows without a token get unused ones.

    Raises:
        ConfigError: the tokenizer is of a kind that GGUF runtimes do not reproduce, or has more tokens than there are rows.
    """
    record: dict[str, Any] = json.loads(tokenizer.json)
    model: Mapping[str, Any] = record["model"]
    _check_kind(model)
    words, types = _vocabulary(model["vocab"], record["added_tokens"], rows)
    kind = _sentence_piece(record, words, types) if model.get("byte_fallback", False) else _byte_level(record)
    metadata: dict[str, MetadataValue] = {
        **kind,
        "tokenizer.ggml.tokens": list(words),
        "tokenizer.ggml.token_type": list(types),
        "tokenizer.ggml.merges": [_merge(entry) for entry in model["merges"]],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
        "tokenizer.ggml.add_eos_token": False,
    }
    if tokenizer.bos_token_id is not None:
        metadata["tokenizer.ggml.bos_token_id"] = tokenizer.bos_token_id
    specials = {entry["content"]: entry["id"] for entry in record["added_tokens"] if entry["special"]}
    turn_ends = [specials[word] for word in TURN_ENDS if word in specials and specials[word] != tokenizer.eos_token_id]
    if turn_ends:
        metadata["tokenizer.ggml.eot_token_id"] = turn_ends[0]
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _check_kind(model: Mapping[str, Any]) -> None:
    """Refuse what is neither byte-level nor SentencePiece BPE."""
    if model["type"] != "BPE":
        raise ConfigError(
            f"the tokenizer is of type {model['type']} and GGUF files are written with BPE only; export the model with "
            "scripts/export_hf.py instead"
        )
    usual = ("unk_token",) if model.get("byte_fallback", False) else ()
    unusual = [key for key in _OTHER_ALGORITHMS if model.get(key) and key not in usual]
    if unusual:
        raise ConfigError(
            f"the tokenizer sets {unusual[0]}={model[unusual[0]]!r}, which GGUF runtimes do not reproduce; export the "
            "model with scripts/export_hf.py instead"
        )


def _byte_level(record: Mapping[str, Any]) -> dict[str, MetadataValue]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer_of(record).name,
        "tokenizer.ggml.add_space_prefix": False,
    }


def _sentence_piece(record: Mapping[str, Any], words: Sequence[str], types: list[int]) -> dict[str, MetadataValue]:
    """Keys of Llama 2's kind of tokenizer; marks byte tokens and the unknown token in `types`."""
    model = record["model"]
    vocabulary, unknown = model["vocab"], model["unk_token"]
    for index, word in enumerate(words):
        if types[index] == NORMAL and _BYTE.fullmatch(word):
            types[index] = BYTE
    special = frozenset(word for word, kind in zip(words, types, strict=True) if kind != NORMAL)
    merges = [(left, right) for left, right in (_merge(entry).split(" ") for entry in model["merges"])]
    scores = scores_of(vocabulary, merges, special)
    lowest = -float(len(merges) + 1)
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [
            scores.get(word, lowest if kind == NORMAL else 0.0) for word, kind in zip(words, types, strict=True)
        ],
        "tokenizer.ggml.add_space_prefix": True,
        SENTENCE_PIECE_KEY: steps_name(record),
    }
    if unknown is not None:
        types[vocabulary[unknown]] = UNKNOWN
        metadata["tokenizer.ggml.unknown_token_id"] = vocabulary[unknown]
    return metadata


def _vocabulary(
    vocabulary: Mapping[str, int], added: Sequence[Mapping[str, Any]], rows: int
) -> tuple[list[str], list[int]]:
    """Words and types by id; ids that nothing uses, inside or behind the vocabulary, become unused tokens."""
    by_id = {index: (word, NORMAL) for word, index in vocabulary.items()}
    for entry in added:
        if not entry["special"] and (entry["lstrip"] or entry["rstrip"] or entry["single_word"]):
            raise ConfigError(
                f"the added token {entry['content']!r} swallows spaces or matches whole words only, which GGUF runtimes do "
                "not reproduce; export the model with scripts/export_hf.py instead"
            )
        by_id[entry["id"]] = (entry["content"], CONTROL if entry["special"] else USER_DEFINED)
    if max(by_id) >= rows:
        raise ConfigError(
            f"the tokenizer has the token id {max(by_id)} and the model's embedding {rows} rows; give the tokenizer that "
            "the model was trained with"
        )
    taken = {word for word, _ in by_id.values()}
    words: list[str] = []
    types: list[int] = []
    for index in range(rows):
        word, kind = by_id.get(index, (f"[PAD{index}]", UNUSED))
        while kind == UNUSED and word in taken:
            word = f"[{word}]"
        words.append(word)
        types.append(kind)
    return words, types


def _merge(entry: str | Sequence[str]) -> str:
    """A merge as two words with a space between them; tokenizer.json has this form or a pair."""
    return entry if isinstance(entry, str) else " ".join(entry)
