"""The `data` group: text to pretrain on, or a task to fine-tune on. Imports no torch."""

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
    """Share of the tokens drawn from this source, relative to the other sources' weights."""


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
    weight: float = Field(default=1.0, gt=0)


class FactsSource(Config):
    """Generated biographies of people who do not exist: the facts that the recall task asks for."""

    kind: Literal["facts"] = "facts"
    weight: float = Field(default=1.0, gt=0)


TextSource = Annotated[HubSource | PackagedSource | LocalSource | FactsSource, Field(discriminator="kind")]


class PretrainData(Config):
    """Text, packed into rows; every token is a target."""

    kind: Literal["pretrain"] = "pretrain"
    name: str
    sources: tuple[TextSource, ...] = Field(min_length=1)
    shuffle_buffer: int = Field(default=10_000, ge=1)
    """Documents shuffled together when a source is streamed from the hub; others are shuffled whole."""
    held_out_percent: float = Field(default=2.0, ge=0, lt=50)
    """Documents kept out of training for validation, and as many again for the test, chosen by hash of the text."""


class FinetuneData(Config):
    """A task with templates and targets; only response tokens are targets."""

    kind: Literal["finetune"] = "finetune"
    name: str
    task: str
    """A name in `wrinklefree.data.tasks`. Generated: recall, in_context_lookup. Packaged: movie_reviews, news_topic,
    boolq, xsum. From the hub: sst2, cola, mnli, qnli, rte, wnli, mrpc, qqp, cnn_dailymail."""
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
