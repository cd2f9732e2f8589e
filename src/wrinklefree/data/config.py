"""The `data` group: text to pretrain on, or a task to fine-tune on. Imports no torch."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from wrinklefree.utils.config import Config


class HubSource(Config):
    """A dataset of the Hugging Face hub, streamed."""

    kind: Literal["hub"] = "hub"
    path: str
    name: str | None = None
    """Configuration (subset) of the dataset."""
    split: str = "train"
    text_column: str = "text"
    revision: str | None = None
    weight: float = Field(default=1.0, gt=0)
    """Share of the tokens drawn from this source; see `normalize_weights`."""


class PackagedSource(Config):
    """A corpus inside a package of a public registry, pinned by version and hash (`wrinklefree.utils.assets`)."""

    kind: Literal["packaged"] = "packaged"
    name: str
    weight: float = Field(default=1.0, gt=0)


class LocalSource(Config):
    """Text files of one's own: .txt (a file is a document), .jsonl or .parquet (a row is a document)."""

    kind: Literal["local"] = "local"
    path: str
    """A file, a folder (searched recursively) or a glob."""
    text_column: str = "text"
    stream: bool = False
    """Read the files in order instead of holding them in memory; documents are then shuffled in `shuffle_buffer`."""
    weight: float = Field(default=1.0, gt=0)


class TokensSource(Config):
    """Text that `scripts/prepare_data.py` has tokenized: memory-mapped, shuffled whole, of any size."""

    kind: Literal["tokens"] = "tokens"
    path: str
    """The folder that it wrote for a source."""
    verify: bool = True
    """Check every file's SHA-256 at the start (some seconds for 10 GB); sizes are checked in any case."""
    weight: float = Field(default=1.0, gt=0)


class FactsSource(Config):
    """Generated biographies of people who do not exist: the facts that the recall task asks for."""

    kind: Literal["facts"] = "facts"
    weight: float = Field(default=1.0, gt=0)


WEIGHT_TOLERANCE = 1e-6
"""How far from 1 the sum of weights may be."""

TextSource = Annotated[
    HubSource | PackagedSource | LocalSource | TokensSource | FactsSource, Field(discriminator="kind")
]


class PretrainData(Config):
    """Text, packed into rows; every token is a target."""

    kind: Literal["pretrain"] = "pretrain"
    name: str
    sources: tuple[TextSource, ...] = Field(min_length=1)
    normalize_weights: bool = False
    """Sources' weights are relative to each other. false: they are shares, and a sum other than 1 is refused."""
    shuffle_buffer: int = Field(default=10_000, ge=0)
    """Documents shuffled together where a source is read as a stream (the hub, local files with `stream`); 0 keeps the
    stream's order. Sources that lie on this machine are shuffled whole in every epoch, whatever stands here."""
    held_out_percent: float = Field(default=2.0, ge=0, lt=50)
    """Documents kept out of training for validation, and as many again for the test, chosen by hash of the text."""
    num_workers: int = Field(default=0, ge=0)
    """Processes a rank that tokenize ahead of training; 0: a thread, with the tokenizer's own parallelism. The order of
    documents does not depend on it."""

    @model_validator(mode="after")
    def _weights_are_shares(self) -> "PretrainData":
        total = math.fsum(source.weight for source in self.sources)
        if not self.normalize_weights and abs(total - 1) > WEIGHT_TOLERANCE:
            listed = " + ".join(f"{source.weight:g}" for source in self.sources)
            raise ValueError(
                f"the weights of the {len(self.sources)} sources sum to {total:g} ({listed}), not 1; correct them, or set "
                "normalize_weights=true to take them as relative"
            )
        return self


class FinetuneData(Config):
    """A task with templates and targets; only response tokens are targets."""

    kind: Literal["finetune"] = "finetune"
    name: str
    task: str
    """A name in `wrinklefree.data.tasks`. Generated: recall, in_context_lookup. Packaged: movie_reviews, news_topic,
    boolq, xsum. From the hub: sst2, cola, mnli, qnli, rte, wnli, mrpc, qqp, cnn_dailymail. Your own: file:PATH, a .jsonl
    file with prompt and response (and choices) a line."""
    max_examples: int | None = Field(default=None, ge=1)
    """Use only the first so many training examples (after a fixed shuffle)."""
    replay: PretrainData | None = None
    """Text mixed into the fine-tuning rows, so that the model keeps its language (and stage 3 distils on it too)."""
    replay_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of rows that are replay text."""

    @model_validator(mode="after")
    def _replay_is_whole(self) -> "FinetuneData":
        if (self.replay is None) != (self.replay_share == 0):
            raise ValueError("data.replay and data.replay_share go together: set both or neither")
        return self


DataConfig = Annotated[PretrainData | FinetuneData, Field(discriminator="kind")]


class PackingConfig(Config):
    """The root key `packing`: several documents in one row, none of which sees another."""

    enabled: bool = True
    packer: Literal["concat", "best_fit"] = "concat"
    """concat: documents end to end, one cut where a row ends, no padding. best_fit: rows are filled from a block of documents
    so that only documents longer than a row are cut; a little padding. Examples of a task are never cut."""
    attention: Literal["auto", "sdpa", "varlen", "flash", "flex"] = "auto"
    """What keeps documents apart on a GPU. auto: torch's varlen or flash-attn, where it equals the masked kernel on the
    device, else sdpa (the mask); flex only when asked for. On a CPU always sdpa."""


class FilterConfig(Config):
    """Which documents `scripts/prepare_data.py` leaves out. No filter knows a language; null switches one off.

    Thresholds on repetition are those of Gopher (arXiv:2112.11446, table A1), which cleaned most web corpora since.
    """

    min_characters: int | None = Field(default=100, ge=1)
    """Shortest document that is kept."""
    max_characters: int | None = Field(default=None, ge=1)
    """Longest document that is kept."""
    max_symbol_share: float | None = Field(default=0.4, ge=0, le=1)
    """Punctuation and symbols, of the characters that are not white space."""
    max_digit_share: float | None = Field(default=0.3, ge=0, le=1)
    max_duplicate_line_share: float | None = Field(default=0.3, ge=0, le=1)
    """Lines that stood before in the document, of those that are not blank."""
    max_duplicate_line_characters: float | None = Field(default=0.2, ge=0, le=1)
    """Characters in such lines, of all characters."""
    max_top_phrase_share: float | None = Field(default=0.16, ge=0, le=1)
    """Characters covered by the most frequent phrase of four words, where it stands three times or more."""
    min_compression_ratio: float | None = Field(default=0.15, ge=0, le=1)
    """Compressed over plain bytes (zlib); finds repetition in scripts without spaces too."""
