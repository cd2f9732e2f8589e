"""What `scripts/prepare_data.py` and `scripts/inspect_data.py` are told. Imports no torch."""

import difflib
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from omegaconf import OmegaConf
from pydantic import Field

from wrinklefree.composition import compose, groups
from wrinklefree.data.config import FilterConfig, PretrainData
from wrinklefree.training.config import RunConfig
from wrinklefree.training.study_config import split_keys
from wrinklefree.utils.config import Config, decode
from wrinklefree.utils.errors import ConfigError

FILTERS = "filters."
TEXT_DEFAULTS = ("training=fp_pretrain", "data=packaged")


class PrepareCommand(Config):
    """Keys of `prepare_data.py`; all others compose as for training: `data=` says what to read, `model=` the tokenizer."""

    output: str | None = None
    """Folder that gets a folder for each source."""
    verify: str | None = None
    """Check a prepared folder instead: every file's SHA-256."""
    filters: FilterConfig = FilterConfig()
    deduplicate: Literal["none", "exact", "near"] = "exact"
    near_threshold: float = Field(default=0.8, gt=0, le=1)
    """Estimated share of common phrases from which two documents count as the same."""
    max_documents: int | None = Field(default=None, ge=1)
    """Documents read of each source."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens written of each source, rounded up to a block."""
    held_out_documents: int = Field(default=10_000, ge=0)
    """Texts kept of each of validation and test."""


class InspectCommand(Config):
    """Keys of `inspect_data.py`; all others compose as for training."""

    rows: int = Field(default=3, ge=1)
    skip: int = Field(default=0, ge=0)
    """Rows passed over."""
    tokenizer: str | None = None
    """Folder with a tokenizer, an artifact for example; null: that of `model=`."""


Command = TypeVar("Command", PrepareCommand, InspectCommand)


def parse_prepare(arguments: Sequence[str]) -> tuple[PrepareCommand, RunConfig | None]:
    """Decode a command line of `key=value`; no run config where a folder is to be verified.

    Raises:
        ConfigError: in one line a mistake.
    """
    filters = [argument.removeprefix(FILTERS) for argument in arguments if argument.startswith(FILTERS)]
    own, others = split_keys([a for a in arguments if not a.startswith(FILTERS)], PrepareCommand)
    if filters:
        own["filters"] = OmegaConf.to_container(OmegaConf.from_dotlist(filters))
    command = _decode(PrepareCommand, own, others)
    if command.verify is not None:
        return command, None
    if command.output is None:
        raise ConfigError("output: missing; give output=<folder for the tokens>")
    config = compose([*TEXT_DEFAULTS, *others]).config
    if not isinstance(config.data, PretrainData):
        raise ConfigError(
            f"data={config.data.name} is a task; only text is prepared: data=packaged, data=local, data=fineweb"
        )
    return command, config


def parse_inspect(arguments: Sequence[str]) -> tuple[InspectCommand, RunConfig]:
    """Decode a command line of `key=value`.

    Raises:
        ConfigError: in one line a mistake.
    """
    own, others = split_keys(arguments, InspectCommand)
    return _decode(InspectCommand, own, others), compose([*TEXT_DEFAULTS, *others]).config


def _decode(kind: type[Command], own: dict[str, Any], others: Sequence[str]) -> Command:
    known = {*RunConfig.model_fields, *groups()}
    for argument in others:
        key = argument.lstrip("+~").partition("=")[0].partition(".")[0]
        if key not in known and key != "hydra":
            close = difflib.get_close_matches(key, [*kind.model_fields, *sorted(known)], n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{key}: unknown key; --help lists the command's own{meant}")
    return decode(kind, own)
