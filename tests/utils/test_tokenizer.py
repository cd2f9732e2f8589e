"""Tokenizers: round trips, conventions, and what another library makes of the same folder."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from wrinklefree.utils import assets
from wrinklefree.utils.errors import CheckpointError, ConfigError
from wrinklefree.utils.gguf import read_gguf
from wrinklefree.utils.tokenizer import SpecialTokens, TextTokenizer, train_tokenizer

TEXTS = [f"The {n}th naïve cat sat on mat {n * n} … and said: 'meow'\n\tint x = {n};" for n in range(200)]


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    return train_tokenizer(TEXTS, 285)


def test_training_twice_gives_the_same_vocabulary(trained: TextTokenizer) -> None:
    again = train_tokenizer(iter(TEXTS), 285)
    assert again.fingerprint == trained.fingerprint
    assert trained.vocab_size == 285
    assert train_tokenizer(TEXTS, 280).fingerprint != trained.fingerprint


def test_text_survives_the_round_trip(trained: TextTokenizer) -> None:
    hard = [*TEXTS, "", "日本語 🦄 \x00\x07 \r\n", "   2 1"]
    assert [trained.decode(ids) for ids in trained.encode_batch(hard)] == hard
    assert trained.encode_batch(hard) == [trained.encode(text) for text in hard]


def test_digits_are_single_tokens(trained: TextTokenizer) -> None:
    assert [trained.token(index) for index in trained.encode("2024")] == ["2", "0", "2", "4"]


def test_a_document_ends_with_eos_and_opens_with_bos_only_by_convention(trained: TextTokenizer) -> None:
    text = "hello"
    assert trained.document(text) == [*trained.encode(text), trained.eos_token_id]
    assert trained.pad_token_id == trained.eos_token_id
    special = SpecialTokens(eos="<|endoftext|>", bos="a", add_bos=True)
    with_bos = TextTokenizer(Tokenizer.from_str(trained.json), special)
    assert with_bos.document(text) == [with_bos.bos_token_id, *trained.encode(text), trained.eos_token_id]
    assert with_bos.encode(text) == trained.encode(text)
    assert with_bos.fingerprint != trained.fingerprint


def test_save_and_load_change_nothing(trained: TextTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    loaded = TextTokenizer.from_folder(tmp_path)
    assert loaded.fingerprint == trained.fingerprint
    assert loaded.eos_token_id == trained.eos_token_id
    assert loaded.special == trained.special


def test_transformers_reads_the_saved_folder(trained: TextTokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    special = SpecialTokens(eos="<|endoftext|>", chat_template="{{ messages[0]['content'] }}")
    TextTokenizer(Tokenizer.from_str(trained.json), special).save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs(text)["input_ids"] for text in TEXTS] == trained.encode_batch(TEXTS)
    assert theirs.eos_token_id == trained.eos_token_id
    assert theirs.chat_template == special.chat_template


def test_conventions_are_read_from_every_place_where_models_keep_them(trained: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(trained.json)
    with pytest.raises(CheckpointError, match="names no end-of-sequence token; set eos_token"):
        TextTokenizer.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert TextTokenizer.from_folder(tmp_path).eos_token_id == 5
    settings = {
        "eos_token": {"content": "<|endoftext|>", "special": True},
        "bos_token": "b",
        "pad_token": "c",
        "add_bos_token": True,
        "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = TextTokenizer.from_folder(tmp_path)
    assert loaded.eos_token_id == 0
    assert loaded.add_bos
    assert loaded.special == SpecialTokens("<|endoftext|>", "b", "c", add_bos=True, chat_template="D")
    (tmp_path / "chat_template.jinja").write_text("J")
    assert TextTokenizer.from_folder(tmp_path).chat_template == "J"


def test_bos_is_found_in_the_post_processor(trained: TextTokenizer, tmp_path: Path) -> None:
    from tokenizers import processors

    inner = Tokenizer.from_str(trained.json)
    inner.post_processor = processors.TemplateProcessing(single="b $A", pair="b $A b $B", special_tokens=[("b", 67)])
    (tmp_path / "tokenizer.json").write_text(inner.to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "bos_token": "b"}')
    loaded = TextTokenizer.from_folder(tmp_path)
    assert loaded.add_bos
    assert loaded.encode("x") == trained.encode("x")


def test_mistakes_are_named(trained: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        TextTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not valid JSON"):
        TextTokenizer.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match="special token '<eos>' is not in the vocabulary of 285 tokens"):
        TextTokenizer(Tokenizer.from_str(trained.json), SpecialTokens(eos="<eos>"))
    with pytest.raises(ConfigError, match="vocabulary of 200 tokens cannot hold 256 bytes"):
        train_tokenizer(TEXTS, 200)
    with pytest.raises(ConfigError, match="the texts give only 25[0-9] of 5000 tokens"):
        train_tokenizer(["a"], 5000)


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_agrees_with_transformers_on_a_thousand_lines() -> None:
    import pydoc_data.topics

    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    path = assets.fetch("smollm2_135m_instruct")
    ours = TextTokenizer.from_gguf(read_gguf(path))
    assert (ours.vocab_size, ours.eos_token_id, ours.bos_token_id, ours.pad_token_id) == (49152, 2, 1, 2)
    assert not ours.add_bos
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    lines = [line for topic in pydoc_data.topics.topics.values() for line in topic.splitlines() if line.strip()][:1000]
    assert len(lines) == 1000
    encoded = ours.encode_batch(lines)
    differing = [line for line, ids in zip(lines, encoded, strict=True) if theirs(line)["input_ids"] != ids]
    # Their loader leaves out the digit splitting of `smollm`, which shows where several spaces precede a digit ...
    assert len(differing) <= 2
    # ... and with it put back there is no difference.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert [theirs(line)["input_ids"] for line in lines] == encoded
    assert [ours.decode(ids) for ids in encoded] == lines
