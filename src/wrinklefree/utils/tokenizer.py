"""The one place where tokenizers are made, loaded and saved.

It is a thin layer over the `tokenizers` library: importing `transformers` takes seconds, and nothing here needs it. The
facts that a tokenizer.json does not hold (which token ends a document, whether one opens it, the chat template) travel
in tokenizer_config.json, written so that `transformers.AutoTokenizer` reads the same folder.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from wrinklefree.utils.errors import CheckpointError, ConfigError
from wrinklefree.utils.gguf import GGUFFile
from wrinklefree.utils.hub import snapshot
from wrinklefree.utils.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, pre_tokenizer_named
from wrinklefree.utils.sentence_piece import SENTENCE_PIECE_KEY, rebuild
from wrinklefree.utils.sentence_piece import STEPS as SENTENCE_PIECE_STEPS

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")
"""Files that `from_folder` reads, where they exist."""

_END_OF_TEXT = "<|endoftext|>"
_BYTES = 256
_UNKNOWN_TOKEN, _CONTROL_TOKEN, _USER_TOKEN, _UNUSED_TOKEN = 2, 3, 4, 5
"""Token types of a GGUF vocabulary."""


@dataclass(frozen=True)
class SpecialTokens:
    """What a model's convention adds around text."""

    eos: str
    bos: str | None = None
    pad: str | None = None
    """None: the end-of-sequence token pads."""
    add_bos: bool = False
    chat_template: str | None = None


class TextTokenizer:
    """Text to token ids and back, with the conventions of one model."""

    def __init__(self, tokenizer: Tokenizer, special: SpecialTokens) -> None:
        """Wrap a tokenizer.

        Raises:
            CheckpointError: a special token is not in the vocabulary.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        # Written out, so that a saved and loaded tokenizer has the same fingerprint.
        self.special = special = replace(special, pad=special.eos if special.pad is None else special.pad)
        self.eos_token_id = self._id_of(special.eos)
        self.bos_token_id = None if special.bos is None else self._id_of(special.bos)
        self.pad_token_id = self._id_of(special.pad or special.eos)
        if special.add_bos and special.bos is None:
            raise CheckpointError("the tokenizer is to open documents with a bos token and names none; set bos_token")

    @classmethod
    def from_folder(cls, path: str | Path) -> "TextTokenizer":
        """Read tokenizer.json and its companions.

        Raises:
            CheckpointError: a file is missing or broken, or no end-of-sequence token is named.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json; give a folder that holds a fast tokenizer")
        text = file.read_text(encoding="utf-8")
        _parse_json(file, text)
        tokenizer = Tokenizer.from_str(text)
        return cls(tokenizer, _special_tokens(folder, tokenizer))

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None) -> "TextTokenizer":
        """Fetch a hub repository's tokenizer files and read them."""
        alternatives = "give a local folder instead"
        return cls.from_folder(snapshot(repo_id, TOKENIZER_FILES, alternatives=alternatives, revision=revision))

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> "TextTokenizer":
        """Rebuild the BPE tokenizer that a GGUF file carries.

        Raises:
            CheckpointError: the vocabulary is of another kind (Unigram, WordPiece ...).
        """
        words = file.texts("tokenizer.ggml.tokens")
        types = file.integers("tokenizer.ggml.token_type")
        if len(words) != len(types) or len(set(words)) != len(words):
            raise CheckpointError(f"{file.path}: {len(words)} tokens, {len(set(words))} distinct, {len(types)} types")
        vocabulary = {word: index for index, word in enumerate(words) if types[index] != _UNUSED_TOKEN}
        tokenizer = _without_added_tokens(file, vocabulary)
        added = {_CONTROL_TOKEN: True, _UNKNOWN_TOKEN: True, _USER_TOKEN: False}
        tokenizer.add_tokens(  # pyright: ignore[reportUnknownMemberType] - a bare list in the library's stub
            [AddedToken(w, special=added[t], normalized=False) for w, t in zip(words, types, strict=True) if t in added]
        )

        def word(key: str) -> str | None:
            if key not in file.metadata:
                return None
            index = file.integer(key)
            if not 0 <= index < len(words):
                raise CheckpointError(f"{file.path}: {key} is {index}, outside of the {len(words)} tokens")
            return words[index]

        eos = word("tokenizer.ggml.eos_token_id")
        if eos is None:
            raise CheckpointError(f"{file.path} names no tokenizer.ggml.eos_token_id")
        template = file.text("tokenizer.chat_template") if "tokenizer.chat_template" in file.metadata else None
        return cls(
            tokenizer,
            SpecialTokens(
                eos=eos,
                bos=word("tokenizer.ggml.bos_token_id"),
                pad=word("tokenizer.ggml.padding_token_id"),
                add_bos=file.metadata.get("tokenizer.ggml.add_bos_token", False) is True,
                chat_template=template,
            ),
        )

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into an existing folder."""
        special = self.special
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": special.eos,
            "bos_token": special.bos,
            "pad_token": special.pad,
            "add_bos_token": special.add_bos,
            "chat_template": special.chat_template,
            "clean_up_tokenization_spaces": False,
        }
        text = json.dumps({key: value for key, value in config.items() if value is not None}, indent=2, sort_keys=True)
        (Path(folder) / "tokenizer.json").write_text(self.json, encoding="utf-8")
        (Path(folder) / "tokenizer_config.json").write_text(f"{text}\n", encoding="utf-8")

    @property
    def json(self) -> str:
        """The content of tokenizer.json."""
        return self._tokenizer.to_str()

    @property
    def vocab_size(self) -> int:
        """Number of tokens; a model's embedding may have more rows."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def add_bos(self) -> bool:
        """Whether the model's convention opens every document with the bos token."""
        return self.special.add_bos

    @property
    def chat_template(self) -> str | None:
        """Jinja template of a conversation."""
        return self.special.chat_template

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which ids a text becomes."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        special = self.special
        rest = [special.eos, special.bos, special.pad, special.add_bos, special.chat_template]
        canonical = json.dumps([json.loads(self.json), rest], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, nothing added; uses all cores where `TOKENIZERS_PARALLELISM` allows it."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def document(self, text: str) -> list[int]:
        """Ids of a whole document: bos where the convention adds it, the text, eos."""
        opening = [self.bos_token_id] if self.add_bos and self.bos_token_id is not None else []
        return [*opening, *self.encode(text), self.eos_token_id]

    def token(self, index: int) -> str | None:
        """The vocabulary's spelling of an id (bytes shown as the printable letters of byte-level BPE)."""
        return self._tokenizer.id_to_token(index)

    def _id_of(self, word: str) -> int:
        index = self._tokenizer.token_to_id(word)
        if index is None:
            raise CheckpointError(f"the special token {word!r} is not in the vocabulary of {self.vocab_size} tokens")
        return index


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Learn a byte-level BPE vocabulary (single digits, as SmolLM2's) from texts; the same texts give the same one.

    The vocabulary holds one special token, which ends and pads; every byte is a token, so nothing is ever unknown.

    Raises:
        ConfigError: `vocab_size` has no room for the bytes, or the texts are too few to fill it.
    """
    if vocab_size <= _BYTES + 1:
        raise ConfigError(f"a vocabulary of {vocab_size} tokens cannot hold 256 bytes and {_END_OF_TEXT}; ask for more")
    tokenizer = _byte_level(BPE())
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ConfigError(f"the texts give only {tokenizer.get_vocab_size()} of {vocab_size} tokens; use more text")
    return TextTokenizer(tokenizer, SpecialTokens(eos=_END_OF_TEXT))


def _byte_level(model: BPE) -> Tokenizer:
    """Digits one by one, then GPT-2's splitting into words, then bytes: what GGUF calls the pre-tokenizer smollm."""
    tokenizer = Tokenizer(model)
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _without_added_tokens(file: GGUFFile, vocabulary: Mapping[str, int]) -> Tokenizer:
    """Vocabulary, merges and the steps around them."""
    kind, flavour = file.text("tokenizer.ggml.model"), file.text("tokenizer.ggml.pre")
    row = pre_tokenizer_named(flavour)
    steps = file.metadata.get(SENTENCE_PIECE_KEY)
    if kind == "llama" and isinstance(steps, str) and steps in SENTENCE_PIECE_STEPS:
        words = {index: word for word, index in vocabulary.items()}
        unknown = file.metadata.get("tokenizer.ggml.unknown_token_id")
        merges = [_merge(line) for line in file.texts("tokenizer.ggml.merges")]
        return rebuild(vocabulary, merges, steps, words.get(unknown) if isinstance(unknown, int) else None)
    if kind != "gpt2" or row is None:
        known = ", ".join(f"gpt2/{row.name}" for row in PRE_TOKENIZERS)
        raise CheckpointError(
            f"{file.path} has the tokenizer {kind}/{flavour}; readable are {known}, and SentencePiece's in this library's files"
        )
    merges = [_merge(line) for line in file.texts("tokenizer.ggml.merges")]
    return _with_steps(BPE(dict(vocabulary), merges, ignore_merges=row.ignore_merges), row)


def _with_steps(model: BPE, row: PreTokenizer) -> Tokenizer:
    """A byte-level tokenizer that normalises and cuts text as a row of the table says."""
    bare = Tokenizer(model)
    bare.decoder = decoders.ByteLevel()
    record = json.loads(bare.to_str()) | {"pre_tokenizer": row.steps, "normalizer": row.normalizers[0]}
    return Tokenizer.from_str(json.dumps(record))


def _merge(line: str) -> tuple[str, str]:
    left, space, right = line.partition(" ")
    if not space or " " in right:
        raise CheckpointError(f"the merge {line!r} is not two tokens with a space between them")
    return left, right


def _special_tokens(folder: Path, tokenizer: Tokenizer) -> SpecialTokens:
    settings = _read_json(folder / "tokenizer_config.json")
    model = _read_json(folder / "config.json")
    eos = _token_text(settings.get("eos_token")) or _token_at(tokenizer, model.get("eos_token_id"))
    bos = _token_text(settings.get("bos_token")) or _token_at(tokenizer, model.get("bos_token_id"))
    if eos is None:
        raise CheckpointError(
            f"{folder} names no end-of-sequence token; set eos_token in its tokenizer_config.json to the token that ends a text"
        )
    return SpecialTokens(
        eos=eos,
        bos=bos,
        pad=_token_text(settings.get("pad_token")),
        add_bos=_opens_with_bos(settings, tokenizer, bos),
        chat_template=_chat_template(folder, settings),
    )


def _opens_with_bos(settings: Mapping[str, Any], tokenizer: Tokenizer, bos: str | None) -> bool:
    """What tokenizer_config.json says, else what the post-processor does to a text."""
    said = settings.get("add_bos_token")
    if isinstance(said, bool):
        return said and bos is not None
    return bos is not None and tokenizer.encode("a").tokens[:1] == [bos]


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template: str | list[dict[str, str]] | None = settings.get("chat_template")
    if isinstance(template, list):
        # Several named templates; the others (tools, retrieval) have no use here.
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _token_text(entry: str | Mapping[str, Any] | None) -> str | None:
    """A token is written as its text or as a record with `content`."""
    return entry if isinstance(entry, str) or entry is None else str(entry["content"])


def _token_at(tokenizer: Tokenizer, index: int | list[int] | None) -> str | None:
    first = index[0] if isinstance(index, list) else index
    return None if first is None else tokenizer.id_to_token(first)


def _read_json(file: Path) -> dict[str, Any]:
    return _parse_json(file, file.read_text(encoding="utf-8")) if file.is_file() else {}


def _parse_json(file: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); write or fetch it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object; write or fetch it again")
    return cast("dict[str, Any]", content)
