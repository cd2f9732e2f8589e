"""The state of a benchmark: settings, one record a trial, and Ax's own state; one file, replaced after every trial."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.config.settings import Settings
from benchmark.core.metrics import TrialKind, TrialRecord
from wrinklefree.utils.config import decode
from wrinklefree.utils.errors import CheckpointError, ConfigError, StorageError
from wrinklefree.utils.storage import atomic_write

FILE = "experiment.json"
FORMAT = 1


@dataclass
class Experiment:
    """What is known so far."""

    settings: Settings
    records: list[TrialRecord] = field(default_factory=list)
    ax: dict[str, Any] | None = None
    """Ax's snapshot; None before the first trial that it chose."""

    def of(self, kind: TrialKind) -> list[TrialRecord]:
        """The trials of a kind, in the order they were run."""
        return [record for record in self.records if record.kind == kind]

    def failures_in_a_row(self) -> int:
        """How many trials at the end have failed."""
        count = 0
        for record in reversed(self.records):
            if record.failure is None:
                break
            count += 1
        return count

    def save(self, folder: Path) -> None:
        """Replace the file atomically.

        Raises:
            StorageError: the folder cannot be written.
        """
        tree = {
            "format": FORMAT,
            "settings": self.settings.model_dump(mode="json"),
            "records": [record.as_json() for record in self.records],
            "ax": self.ax,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{folder} cannot be made: {error.strerror}; choose another benchmark.output_dir"
            ) from error
        atomic_write(folder / FILE, json.dumps(tree))


def load_experiment(path: Path) -> Experiment:
    """Read what `Experiment.save` wrote.

    Raises:
        ConfigError: there is no such file.
        CheckpointError: it is not one of ours, or damaged.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist; give the experiment.json of a benchmark, or begin one without --resume"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {tree['format']}, and this version reads {FORMAT}")
        settings = decode(Settings, tree["settings"])
        records = [TrialRecord.from_json(record) for record in tree["records"]]
        return Experiment(settings, records, tree["ax"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no experiment of this benchmark, or damaged ({type(error).__name__})"
        ) from error


def completed(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Those with figures."""
    return [record for record in records if record.metrics is not None]
