"""Tokenizers as GGUF metadata: back again, and in llama.cpp on real lines."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.trainers import BpeTrainer

import wrinklefree
from wrinklefree.models.artifact import write_artifact
from wrinklefree.models.config import Architecture
from wrinklefree.models.llama import CausalLM
from wrinklefree.serving.converter import ConversionOptions, convert
from wrinklefree.serving.gguf_tokenizer import tokenizer_metadata
from wrinklefree.serving.gguf_writer import TensorPlan, write_gguf
from wrinklefree.serving.runtime_probe import ask_llama_cpp
from wrinklefree.utils.errors import ConfigError
from wrinklefree.utils.gguf import read_gguf
from wrinklefree.utils.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from wrinklefree.utils.sentence_piece import SPACE, rebuild
from wrinklefree.utils.tokenizer import SpecialTokens, TextTokenizer

TINY = Path(wrinklefree.__file__).parent / "assets" / "tiny"
REAL_LINES = [line for text in topics.values() for line in text.splitlines() if line.strip()]
ODD_LINES = [
    "  two  spaces\tand\ttabs \n\n\n next",
    "I'LL say it's they've WE'RE don't",
    "12 1234 1234567 ½ ² Ⅷ ١٢٣",
    "naïve café ÅÄÖ straße ﬁ река 川 🙂👍🏽 e\u0301",
    "x=a[1]+b['k']//2 ** 3 -> {y!r:>10}\r\nz",
    "\u00a0non\u2009breaking\u3000spaces\u200b",
    " ",
    "\n",
]


@cache
def sentence_piece(*, steps: str = "prepend") -> TextTokenizer:
    """A tokenizer of Llama 2's kind: learnt pieces, and every way to make each of them, better pieces first."""
    learnt = Tokenizer(BPE())
    learnt.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    learnt.pre_tokenizer = Split(SPACE, "merged_with_next")
    learnt.train_from_iterator(REAL_LINES[::7], BpeTrainer(vocab_size=600, show_progress=False))
    pieces = sorted(learnt.get_vocab(), key=learnt.get_vocab().get)  # type: ignore[arg-type]
    characters = [piece for piece in pieces if len(piece) == 1]
    longer = [piece for piece in pieces if len(piece) > 1]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *longer, *characters]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in longer
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = rebuild(vocabulary, merges, steps, "<unk>")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return TextTokenizer(tokenizer, SpecialTokens(eos="</s>", bos="<s>", add_bos=True))


ROWS = [pytest.param(row, id=row.name) for row in PRE_TOKENIZERS]


def trained(row: PreTokenizer, *, vocab_size: int = 700) -> TextTokenizer:
    """A vocabulary learnt from part of the lines, cut as the row says."""
    tokenizer = Tokenizer(BPE(ignore_merges=row.ignore_merges))
    record = json.loads(tokenizer.to_str()) | {"pre_tokenizer": row.steps, "normalizer": row.normalizers[0]}
    record["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    tokenizer = Tokenizer.from_str(json.dumps(record))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*REAL_LINES[::7], *ODD_LINES], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return TextTokenizer(tokenizer, SpecialTokens(eos="<|endoftext|>", bos="<|im_start|>", chat_template="{{ x }}"))


def written(tokenizer: TextTokenizer, path: Path, *, rows: int) -> Path:
    table = np.zeros(rows * 4, dtype=np.uint8)
    write_gguf(
        path, tokenizer_metadata(tokenizer, rows), [TensorPlan("token_embd.weight", (rows, 1), "F32", lambda: table)]
    )
    return path


@pytest.mark.parametrize("row", ROWS)
def test_a_tokenizer_comes_back_from_its_metadata(row: PreTokenizer, tmp_path: Path) -> None:
    tokenizer = trained(row)
    back = TextTokenizer.from_gguf(read_gguf(written(tokenizer, tmp_path / "t.gguf", rows=720)))
    lines = [*REAL_LINES[:300], *ODD_LINES, "a<|im_end|>b<tool> c"]
    assert back.encode_batch(lines) == tokenizer.encode_batch(lines)
    assert back.special == tokenizer.special
    assert back.vocab_size == tokenizer.vocab_size == 701
    assert [back.decode(back.encode(line)) for line in ODD_LINES[:3]] == ODD_LINES[:3]


def test_metadata_of_every_key(tmp_path: Path) -> None:
    tokenizer = trained(PRE_TOKENIZERS[1])
    file = read_gguf(written(tokenizer, tmp_path / "t.gguf", rows=704))
    assert file.text("tokenizer.ggml.model") == "gpt2"
    assert file.text("tokenizer.ggml.pre") == "smollm"
    assert file.texts("tokenizer.ggml.tokens")[-3:] == ["[PAD701]", "[PAD702]", "[PAD703]"]
    types = file.integers("tokenizer.ggml.token_type")
    assert (types[0], types[3], types[700], types[701]) == (3, 1, 4, 5)
    ids = {key: file.integer(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "bos", "padding", "eot")}
    assert ids == {"eos": 0, "bos": 1, "padding": 0, "eot": 2}
    assert file.metadata["tokenizer.ggml.add_bos_token"] is False
    assert file.text("tokenizer.chat_template") == "{{ x }}"


@pytest.mark.parametrize("steps", ["prepend", "metaspace"])
def test_a_sentence_piece_tokenizer_comes_back_from_its_metadata(steps: str, tmp_path: Path) -> None:
    tokenizer = sentence_piece(steps=steps)
    rows = tokenizer.vocab_size + 2
    file = read_gguf(written(tokenizer, tmp_path / "t.gguf", rows=rows))
    back = TextTokenizer.from_gguf(file)
    assert back.fingerprint == tokenizer.fingerprint
    assert (file.text("tokenizer.ggml.model"), file.metadata["tokenizer.ggml.add_bos_token"]) == ("llama", True)
    types = file.integers("tokenizer.ggml.token_type")
    assert types[:4] == [2, 3, 3, 6]
    assert types[-2:] == [5, 5]
    assert back.decode(back.encode("naïve 🙂 x")) == "naïve 🙂 x"


def test_a_list_of_merges_that_scores_do_not_follow_is_refused() -> None:
    def late(record: dict[str, Any]) -> None:
        merges = record["model"]["merges"]
        by_word = [left + right for left, right in merges]
        twice = next(index for index, word in enumerate(by_word) if by_word.count(word) > 1)
        merges.append(merges.pop(twice))

    record = json.loads(sentence_piece().json)
    late(record)
    tokenizer = TextTokenizer(Tokenizer.from_str(json.dumps(record)), SpecialTokens(eos="</s>"))
    with pytest.raises(ConfigError, match="merges one token's pairs at different ranks, so GGUF runtimes"):
        tokenizer_metadata(tokenizer, tokenizer.vocab_size)
    record = json.loads(sentence_piece().json) | {"normalizer": {"type": "NFKC"}}
    tokenizer = TextTokenizer(Tokenizer.from_str(json.dumps(record)), SpecialTokens(eos="</s>"))
    with pytest.raises(ConfigError, match="SentencePiece's and normalises or cuts text in a way"):
        tokenizer_metadata(tokenizer, tokenizer.vocab_size)


def changed(change: Callable[[dict[str, Any]], None]) -> TextTokenizer:
    record = json.loads(TextTokenizer.from_folder(TINY).json)
    change(record)
    return TextTokenizer(Tokenizer.from_str(json.dumps(record)), SpecialTokens(eos="<|endoftext|>"))


def add_prefix_space(record: dict[str, Any]) -> None:
    record["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def lower_case(record: dict[str, Any]) -> None:
    record["normalizer"] = {"type": "Lowercase"}


def byte_fallback(record: dict[str, Any]) -> None:
    record["model"]["byte_fallback"] = True


def word_suffix(record: dict[str, Any]) -> None:
    record["model"]["end_of_word_suffix"] = "</w>"


def swallowing_token(record: dict[str, Any]) -> None:
    extra = dict(record["added_tokens"][0], id=4096, content="<x>", special=False, lstrip=True)
    record["added_tokens"].append(extra)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            add_prefix_space,
            r"has no GGUF name here \(known: gpt-2, smollm, qwen2, llama-bpe\).*add_prefix_space\": true",
        ),
        (lower_case, r"has no GGUF name here .*Lowercase"),
        (byte_fallback, r"is BPE with byte fallback, but lacks the merge"),
        (word_suffix, "sets end_of_word_suffix='</w>'"),
        (swallowing_token, "added token '<x>' swallows spaces"),
    ],
)
def test_other_tokenizers_are_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tokenizer_metadata(changed(change), 4200)


def test_another_algorithm_and_too_few_rows_are_refused() -> None:
    pieces = Tokenizer(WordPiece({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    with pytest.raises(ConfigError, match="of type WordPiece"):
        tokenizer_metadata(TextTokenizer(pieces, SpecialTokens(eos="<|endoftext|>")), 2)
    with pytest.raises(ConfigError, match="token id 4095 and the model's embedding 4000 rows"):
        tokenizer_metadata(TextTokenizer.from_folder(TINY), 4000)


@pytest.mark.parametrize("row", [*PRE_TOKENIZERS, "tiny", "sentence piece"], ids=lambda row: getattr(row, "name", row))
def test_llama_cpp_cuts_a_thousand_lines_into_the_same_tokens(row: PreTokenizer | str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="needs the package xllamacpp")
    if isinstance(row, PreTokenizer):
        tokenizer = trained(row)
    else:
        tokenizer = TextTokenizer.from_folder(TINY) if row == "tiny" else sentence_piece()
    architecture = Architecture(
        family="llama",
        vocab_size=tokenizer.vocab_size + 3,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    write_artifact(tmp_path / "artifact", CausalLM(architecture), tokenizer, {"stage": "base"})
    made = convert(ConversionOptions(tmp_path / "artifact", tmp_path / "m.gguf", verify=False))
    # GGUF runtimes do not normalise: Qwen's NFC joins what they keep apart.
    keeps_forms = not isinstance(row, PreTokenizer) or row.name != "qwen2"
    odd = [line for line in ODD_LINES if keeps_forms or "\u0301" not in line]
    lines = [*REAL_LINES[3 : 3 + 1000 * 7 : 7], *odd, "a<|im_end|>b", "<tool>x"]
    assert len(lines) > 1000
    answer = ask_llama_cpp(made.path, [[1, 2]], lines, vocab_size=architecture.vocab_size, plain_token=70)
    different = [
        (line, theirs, ours)
        for line, theirs, ours in zip(lines, answer.tokens, tokenizer.encode_batch(lines), strict=True)
        if theirs != ours
    ]
    assert different == []
