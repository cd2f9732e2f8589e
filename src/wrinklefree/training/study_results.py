"""Rows of a study: one record an arm and seed, kept with its items so that arms can be compared pair by pair.

    studies/<name>/results/<arm>-<seed>.json    a record; replaced when the arm's fingerprint changes
    studies/<name>/results.csv, results.jsonl   the tidy table: one line a metric
    studies/<name>/rates.csv                    every learning rate tried, and which was chosen

All is written atomically as rows arrive; whoever reads it needs neither the runs nor their checkout.
"""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from wrinklefree.utils.config import Config
from wrinklefree.utils.errors import DataError
from wrinklefree.utils.storage import atomic_write

COLUMNS = (
    "study", "arm", "seed", "status", "metric", "value", "low", "high", "tokens", "steps", "seconds", "fingerprint",
    "commit", "error",
)  # fmt: skip
RATE_COLUMNS = ("study", "step", "seed", "rate", "metric", "value", "chosen", "error")


class Measure(Config):
    """A score with its interval, and the items that it is made of: value = sum(items) / sum(weights)."""

    metric: str
    lower_is_better: bool
    value: float
    low: float
    high: float
    items: tuple[float, ...] = ()
    """Empty for scores that are no mean of items (macro-F1)."""
    weights: tuple[float, ...] = ()

    @property
    def errors(self) -> tuple[float, ...]:
        """Items so turned that lower is better."""
        if self.lower_is_better:
            return self.items
        return tuple(weight - item for item, weight in zip(self.items, self.weights, strict=True))


class ArmResult(Config):
    """What is known of an arm with one seed."""

    study: str
    arm: str
    seed: int
    status: Literal["completed", "failed"]
    error: str = ""
    fingerprint: str = ""
    """Of the run that it ends with."""
    identity: str = ""
    """Of that run and of how it was scored."""
    commit: str = ""
    tokens: int = 0
    """Trained on after the root."""
    steps: int = 0
    seconds: float = 0.0
    """Training time of the whole chain after the root."""
    rates: dict[str, float] = Field(default_factory=dict)
    measures: tuple[Measure, ...] = ()

    def measure(self, metric: str) -> Measure | None:
        """The score of that name, if there is one."""
        return next((measure for measure in self.measures if measure.metric == metric), None)


class RateTrial(Config):
    """One learning rate of one step."""

    study: str
    step: str
    seed: int
    rate: float
    metric: str
    value: float | None
    """On validation data; None: the run failed."""
    chosen: bool
    error: str = ""


def result_path(folder: Path, arm: str, seed: int) -> Path:
    """Where an arm's record lies; characters that a file name cannot hold become `_`."""
    safe = "".join(character if character.isalnum() or character in "+-." else "_" for character in arm)
    return folder / "results" / f"{safe}-{seed}.json"


def write_result(folder: Path, result: ArmResult) -> None:
    """Keep a record."""
    path = result_path(folder, result.arm, result.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, result.model_dump_json() + "\n")


def read_result(path: Path) -> ArmResult | None:
    """A record, or None where there is none.

    Raises:
        DataError: it is damaged.
    """
    try:
        return ArmResult.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is no result of a study ({reason}); remove it, and run the study again") from None


def read_results(folder: Path) -> list[ArmResult]:
    """All records of a study, sorted by arm and seed."""
    found = [read_result(path) for path in sorted((folder / "results").glob("*.json"))]
    return sorted((result for result in found if result is not None), key=lambda r: (r.arm, r.seed))


def write_table(folder: Path, results: Iterable[ArmResult]) -> None:
    """Write results.csv and results.jsonl: one line an arm, seed and metric; a failed arm has one line."""
    rows: list[dict[str, Any]] = []
    for result in results:
        record = {name: value for name, value in result.model_dump(exclude={"measures"}).items() if name in COLUMNS}
        rows.extend(
            record | {"metric": m.metric, "value": m.value, "low": m.low, "high": m.high} for m in result.measures
        )
        if not result.measures:
            rows.append(record)
    _write_csv(folder / "results.csv", COLUMNS, rows)
    lines = (json.dumps({column: row.get(column) for column in COLUMNS}) + "\n" for row in rows)
    atomic_write(folder / "results.jsonl", "".join(lines))


def write_trials(folder: Path, trials: Sequence[RateTrial]) -> None:
    """Write rates.csv; trials of other steps, from runs of other arms, are kept."""
    new = {(trial.step, trial.seed) for trial in trials}
    kept = [trial for trial in read_trials(folder) if (trial.step, trial.seed) not in new]
    _write_csv(folder / "rates.csv", RATE_COLUMNS, [trial.model_dump() for trial in (*kept, *trials)])


def read_trials(folder: Path) -> list[RateTrial]:
    """The learning rates that were tried; none before the first."""
    path = folder / "rates.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            RateTrial(
                study=row["study"], step=row["step"], seed=int(row["seed"]), rate=float(row["rate"]),
                metric=row["metric"], value=float(row["value"]) if row["value"] else None,
                chosen=row["chosen"] == "True", error=row["error"],
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.getvalue())
