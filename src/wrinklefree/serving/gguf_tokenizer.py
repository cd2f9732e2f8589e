"""A tokenizer as GGUF metadata: vocabulary, token types, merges, pre-tokenizer, special tokens, chat template."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from wrinklefree.serving.gguf_writer import MetadataValue
from wrinklefree.utils.errors import ConfigError
from wrinklefree.utils.pre_tokenizers import pre_tokenizer_of
from wrinklefree.utils.tokenizer import TextTokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""`tokenizer.ggml.token_type`."""

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
"""Special tokens that end a turn of a chat; models are trained to stop at them too."""

_OTHER_ALGORITHMS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")


def tokenizer_metadata(tokenizer: TextTokenizer, rows: int) -> dict[str, MetadataValue]:
    """`tokenizer.*` keys for a model whose embedding has this many rows; rows without a token get unused ones.

    Raises:
        ConfigError: the tokenizer is of a kind that GGUF runtimes do not reproduce, or has more tokens than there are rows.
    """
    record: dict[str, Any] = json.loads(tokenizer.json)
    model: Mapping[str, Any] = record["model"]
    _check_kind(model)
    row = pre_tokenizer_of(record)
    words, types = _vocabulary(model["vocab"], record["added_tokens"], rows)
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": row.name,
        "tokenizer.ggml.tokens": list(words),
        "tokenizer.ggml.token_type": list(types),
        "tokenizer.ggml.merges": [_merge(entry) for entry in model["merges"]],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
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
    """Refuse what is not plain byte-level BPE."""
    if model["type"] != "BPE":
        raise ConfigError(
            f"the tokenizer is of type {model['type']} and GGUF files are written with byte-level BPE only; export the "
            "model with scripts/export_hf.py instead"
        )
    if model.get("byte_fallback", False):
        raise ConfigError(
            "the tokenizer is SentencePiece's (BPE with byte fallback, as Llama 2's) and GGUF files are written with "
            "byte-level BPE only; export the model with scripts/export_hf.py instead"
        )
    unusual = [key for key in _OTHER_ALGORITHMS if model.get(key)]
    if unusual:
        raise ConfigError(
            f"the tokenizer sets {unusual[0]}={model[unusual[0]]!r}, which GGUF runtimes do not reproduce; export the "
            "model with scripts/export_hf.py instead"
        )


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
