"""What one trial is told: overrides of `scripts/train.py`, and what to measure.

Every trial trains on about the same number of tokens, whatever its batch and accumulation are: the length is given in
micro-batches of the default batch size, and a trial makes as many optimizer steps as hold them.
"""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmark.config.settings import OPTIMIZER, Settings, Value
from wrinklefree.composition import compose
from wrinklefree.training.config import RunConfig, StageConfig
from wrinklefree.utils.errors import ConfigError
from wrinklefree.utils.storage import atomic_write

ACCUMULATION = "training.gradient_accumulation_steps"
BATCH = "training.batch_size"
INFLUENCE = "influence.enabled"
DOCUMENTS = 4000
WORDS = 400
SOURCES = ("ordered", "shuffled")
"""Two kinds of generated text, so that the influence of sources has something to weigh."""


@dataclass(frozen=True)
class Job:
    """A trial, as its process reads it."""

    overrides: tuple[str, ...]
    unmeasured_tokens: int
    """Tokens of the steps before the window; the window begins with the step after them."""
    threads: int | None
    mixture_share: float = 1.0
    """What an update of the data mixture costs here, over what it costs in a run of the reference length: a trial makes as many
    updates in far fewer steps."""

    def write(self, path: Path) -> None:
        """Store it for the process."""
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Job":
        """What `write` stored."""
        tree = json.loads(path.read_text(encoding="utf-8"))
        return cls(tuple(tree["overrides"]), tree["unmeasured_tokens"], tree["threads"], tree["mixture_share"])


def spelled(value: Value | None) -> str:
    """A value as an override spells it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def effective(settings: Settings, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that have an effect: those whose `needs` is on."""
    knobs = settings.knobs
    return {
        name: value
        for name, value in parameters.items()
        if (needs := knobs[name].needs) is None or bool(parameters.get(needs))
    }


def make_job(settings: Settings, parameters: Mapping[str, Any], *, seed: int, folder: Path, source: Path | None) -> Job:
    """The job of a configuration.

    Args:
        settings: Of the benchmark.
        parameters: Knob -> value; a knob that is missing keeps the default of the stage.
        seed: Of the run.
        folder: Where the run writes.
        source: The stage-1 artifact that all trials start from; None: the run finds its own input.

    Raises:
        ConfigError: the overrides do not fit together.
    """
    told = settings.benchmark
    chosen = effective(settings, parameters)
    values = {settings.knobs[name].key: value for name, value in chosen.items()}
    rows = default_rows(settings)
    micro_batches = told.unmeasured_steps + told.measurement_steps
    accumulation, batch = int(values.get(ACCUMULATION, default_accumulation(settings))), int(values.get(BATCH, rows))
    a_step = accumulation * batch / rows  # in micro-batches of the default size
    skipped = max(1, math.ceil(told.unmeasured_steps / a_step))
    steps = skipped + max(1, math.ceil((micro_batches - told.unmeasured_steps) / a_step))
    for name in chosen:
        knob = settings.knobs[name]
        if knob.scaled:
            values[knob.key] = min(steps, max(1, round(float(values[knob.key]) / told.reference_steps * steps)))
    if OPTIMIZER not in chosen:
        values["optimizer.type"] = told.optimizers[0]
    overrides = [
        *settings.training_overrides,
        f"training.max_seq_length={told.sequence_length}",
        f"training.max_steps={steps}",
        "training.total_tokens=null",
        "training.epochs=null",
        f"training.evaluation.max_tokens={told.validation_tokens}",
        f"training.evaluation.interval={steps}",
        f"training.checkpoint.save_interval={steps}",
        f"output_dir={folder}",
        f"seed={seed}",
        "audit.enabled=false",
        "allow_slow=true",
        *(f"{key}={spelled(value)}" for key, value in values.items()),
    ]
    if source is not None:
        overrides.append(f"training.init_from={source}")
    if values.get(INFLUENCE):
        # As often, in shares of the run, as a run of the reference length would.
        interval = default_interval(settings)
        overrides.append(f"influence.update_interval={max(1, round(interval / told.reference_steps * steps))}")
    return Job(
        overrides=tuple(overrides),
        unmeasured_tokens=skipped * accumulation * batch * told.sequence_length,
        threads=told.threads,
        mixture_share=min(1.0, steps / told.reference_steps),
    )


@lru_cache(maxsize=4)
def _config(overrides: tuple[str, ...]) -> RunConfig:
    """What all trials have in common: composed once, not for every trial."""
    return compose(overrides).config


def _defaults(settings: Settings) -> StageConfig:
    training = _config(tuple(settings.training_overrides)).training
    if not isinstance(training, StageConfig):
        raise ConfigError("a trial is one stage that trains: give training=stage2_pretrain, stage3_distill or the like")
    return training


def default_rows(settings: Settings) -> int:
    """Rows of a micro-batch."""
    return _defaults(settings).batch_size


def default_accumulation(settings: Settings) -> int:
    """Micro-batches of a step."""
    return _defaults(settings).gradient_accumulation_steps


def default_interval(settings: Settings) -> int:
    """Steps between updates of the data mixture, in a run of the reference length."""
    return _config(tuple(settings.training_overrides)).influence.update_interval


def write_synthetic_text(folder: Path, seed: int) -> list[str]:
    """Generated documents of two kinds, and the overrides that read them: no download, same text for every trial."""
    generator = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(WORDS)]
    folder.mkdir(parents=True, exist_ok=True)
    for kind in SOURCES:
        lines = []
        for _ in range(DOCUMENTS):
            at = generator.randrange(WORDS)
            if kind == "ordered":  # a word is mostly followed by its neighbour in the list
                text = []
                for _ in range(generator.randint(20, 120)):
                    at = (at + 1) % WORDS if generator.random() < 0.8 else generator.randrange(WORDS)
                    text.append(words[at])
            else:
                text = generator.choices(words, k=generator.randint(20, 120))
            lines.append(json.dumps({"text": " ".join(text)}))
        atomic_write(folder / f"{kind}.jsonl", "\n".join(lines) + "\n")
    sources = ",".join(
        f"{{kind: local, path: {folder / f'{kind}.jsonl'}, text_column: text, weight: 0.5}}" for kind in SOURCES
    )
    return ["data=local", f"data.sources=[{sources}]", "data.normalize_weights=true"]
