"""What `scripts/prepare_data.py` and `scripts/inspect_data.py` do."""

from contextlib import closing
from pathlib import Path

from rich.console import Console

from wrinklefree.data.config import PretrainData, TokensSource
from wrinklefree.data.inspection import show_row
from wrinklefree.data.preparation import PreparationOptions, describe, prepare
from wrinklefree.data.token_shards import open_tokens, read_record
from wrinklefree.models.hf import load_tokenizer
from wrinklefree.training.config import RunConfig, StageConfig
from wrinklefree.training.data_config import InspectCommand, PrepareCommand
from wrinklefree.training.run import open_stream
from wrinklefree.utils.errors import ConfigError
from wrinklefree.utils.tokenizer import TextTokenizer


def run_prepare(command: PrepareCommand, config: RunConfig | None) -> str:
    """Write folders of tokens, or check one; returns the summary.

    Raises:
        ConfigError: a source that cannot be prepared.
        DataError: a source, or the folder to check, is missing or damaged.
        StorageError: the output exists, or the disk is full.
    """
    if command.verify is not None:
        record = read_record(command.verify)
        documents = open_tokens(TokensSource(path=command.verify), held_out_percent=record.held_out_percent)
        return f"{command.verify}: intact; {len(documents):,} documents, {record.tokens:,} tokens of {record.source}"
    assert config is not None
    assert command.output is not None
    assert isinstance(config.data, PretrainData)
    options = PreparationOptions(
        output=Path(command.output).expanduser(),
        filters=command.filters,
        deduplicate=command.deduplicate,
        near_threshold=command.near_threshold,
        max_documents=command.max_documents,
        max_tokens=command.max_tokens,
        held_out_documents=command.held_out_documents,
    )
    return describe(prepare(config.data, load_tokenizer(config.model), options), config.data)


def run_inspect(command: InspectCommand, config: RunConfig, console: Console) -> None:
    """Show rows of the stream that a run with this config would train on.

    Raises:
        ConfigError: a stage that reads no rows.
    """
    if not isinstance(config.training, StageConfig):
        raise ConfigError(
            f"training.stage={config.training.stage} reads no rows; choose a stage such as stage2_pretrain"
        )
    tokenizer = load_tokenizer(config.model)
    if command.tokenizer is not None:
        tokenizer = TextTokenizer.from_folder(Path(command.tokenizer).expanduser())
    with closing(open_stream(config, tokenizer)) as stream:
        left, skip = command.rows, command.skip
        while left:
            batch = stream.next_batch()
            size = batch.input_ids.shape[0]
            for row in range(min(skip, size), size):
                if left:
                    console.print(show_row(batch, row, tokenizer))
                    left -= 1
            skip = max(0, skip - size)
        console.print(f"padding so far: {stream.padding_share:.2%} of all positions", style="dim")
