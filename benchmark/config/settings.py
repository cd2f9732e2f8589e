"""What `scripts/run_benchmark.py` is told, typed. Imports neither torch nor Ax, so that mistakes are answered at once.

Overrides whose key begins with `benchmark.` or `search_space.` change the two YAML files of this folder; all others are
those of `scripts/train.py` and go to every trial.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, field_validator, model_validator

from wrinklefree.composition import compose, describe_hydra_error
from wrinklefree.utils.config import Config, decode
from wrinklefree.utils.errors import ConfigError

FOLDER = Path(__file__).resolve().parent
OPTIMIZER = "optimizer_type"
"""Name of the knob that several `benchmark.optimizers` make."""
RESERVED = {
    "training.max_steps": "benchmark.measurement_steps=200",
    "training.total_tokens": "benchmark.measurement_steps=200",
    "training.epochs": "benchmark.measurement_steps=200",
    "training.max_seq_length": "benchmark.sequence_length=512",
    "training.evaluation.max_tokens": "benchmark.validation_tokens=20000",
    "optimizer.type": "benchmark.optimizers=[muon,adamw]",
    "output_dir": "benchmark.output_dir=PATH",
    "seed": "benchmark.seed=1",
    "seeds": "benchmark.repeats=5",
    "gcs.enabled": "a local benchmark.output_dir",
    "skip_recovery": "--resume FILE",
    "dry_run": "benchmark.num_trials=1",
    "estimate": "scripts/train.py estimate=true",
    "distributed": "one process (the benchmark measures one)",
}
"""Keys of a run that the benchmark sets itself, and what to say instead."""

Value = bool | int | float | str


class Knob(Config):
    """One searched key: a range (`low`, `high`) or a list of `values`."""

    key: str
    """Key of `scripts/train.py`."""
    low: float | None = None
    high: float | None = None
    log: bool = False
    """Search the range by ratios."""
    whole: bool = False
    """Only whole numbers of the range."""
    values: tuple[Value, ...] | None = Field(default=None, min_length=2)
    needs: str | None = None
    """A true/false knob without which this one has no effect."""
    scaled: bool = False
    """Steps of a run of `benchmark.reference_steps`; a trial gets the same share of its own length, at least 1."""

    @model_validator(mode="after")
    def _range_or_values(self) -> "Knob":
        if (self.values is None) == (self.low is None or self.high is None):
            raise ValueError(f"{self.key}: give either low and high, or values (two or more)")
        if self.values is not None:
            kinds = {type(value) for value in self.values}
            if len(kinds) > 1 and not kinds <= {int, float}:
                raise ValueError(f"{self.key}: values must be of one kind, given {list(self.values)}")
            if len(set(self.values)) < len(self.values):
                raise ValueError(f"{self.key}: a value stands twice in {list(self.values)}")
            return self
        assert self.low is not None
        assert self.high is not None
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(
                f"{self.key}: low={self.low:g} must be below high={self.high:g}, and above 0 with log=true"
            )
        return self

    @property
    def numeric(self) -> bool:
        """Whether values have an order."""
        return self.values is None or not isinstance(self.values[0], str | bool)


class SlurmConfig(Config):
    """`benchmark.slurm`: what each trial's job asks for."""

    partition: str | None = None
    account: str | None = None
    constraint: str | None = None
    """Nodes of one kind: figures of different devices do not compare."""
    gpus: int = Field(default=1, ge=0)
    cpus: int = Field(default=8, ge=1)
    memory_gb: int | None = Field(default=None, ge=1)
    exclusive: bool = False
    """A node for each trial, so that neighbours do not disturb its times."""


class BenchmarkConfig(Config):
    """The keys of `benchmark.yaml`."""

    num_trials: int = Field(default=50, ge=1)
    """Configurations that Ax chooses."""
    initial_trials: int = Field(default=8, ge=1)
    """How many of them are spread evenly (Sobol) before the model of the objective chooses."""
    repeats: int = Field(default=5, ge=2)
    """Runs of the default configuration, spread over the benchmark: their spread is the noise."""
    confirmations: int = Field(default=5, ge=0)
    """At the end the best configurations and the default are measured again so many times each, in turns."""
    objectives: Literal["efficiency", "efficiency_and_loss"] = "efficiency"
    """Tokens a second for each GB of peak memory; or that and the loss after the trial, as a Pareto front."""
    optimizers: tuple[Literal["adamw", "adamw_8bit", "muon", "apollo", "apollo_mini"], ...] = Field(
        default=("muon",), min_length=1
    )
    """One: every trial uses it. Several: the optimizer is searched too, and they are compared. The default configuration
    uses the first."""
    measurement_steps: int = Field(default=200, ge=1)
    """Measured micro-batches of the default batch size. Every trial trains on the tokens of `unmeasured_steps` and
    `measurement_steps` of them, whatever its own batch and accumulation are."""
    unmeasured_steps: int = Field(default=16, ge=0)
    """Micro-batches before the measurement begins; at least one optimizer step is left out."""
    reference_steps: int = Field(default=10_000, ge=1)
    """Length of the run that `scaled` knobs and the influence interval are given for."""
    sequence_length: int = Field(default=256, ge=8)
    use_synthetic_data: bool = True
    """Generated text, which needs no download. false: the run's own `data=`."""
    validation_tokens: int = Field(default=20_000, ge=100)
    """Held-out tokens that the loss after a trial is measured on."""
    trial_timeout: float = Field(default=600.0, gt=0)
    """Seconds; a trial that takes longer is killed and counts as failed."""
    max_failures_in_a_row: int = Field(default=5, ge=1)
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of a trial; null: torch's choice."""
    seed: int = Field(default=42, ge=0)
    launcher: Literal["local", "slurm"] = "local"
    """local: trials one after the other on this machine. slurm: jobs of a cluster, through submitit."""
    parallel: int = Field(default=1, ge=1)
    """slurm: trials at once. The search learns from them in batches."""
    slurm: SlurmConfig = SlurmConfig()
    keep_runs: bool = False
    """Keep each trial's run folder (metrics, checkpoint, artifact) below `work/`."""
    output_dir: str = "benchmark_results"

    @model_validator(mode="after")
    def _one_at_a_time_here(self) -> "BenchmarkConfig":
        if self.launcher == "local" and self.parallel > 1:
            raise ValueError(
                f"parallel={self.parallel}: trials on one machine would disturb each other's times; "
                "benchmark.launcher=slurm spreads them over a cluster"
            )
        return self

    @field_validator("optimizers")
    @classmethod
    def _named_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"an optimizer stands twice in {list(names)}")
        return names


class Settings(Config):
    """Everything a benchmark is told; stored with its results."""

    benchmark: BenchmarkConfig = BenchmarkConfig()
    search_space: dict[str, Knob | None] = Field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    """Those of `scripts/train.py`, for every trial."""

    @property
    def knobs(self) -> dict[str, Knob]:
        """What is searched, by name; several optimizers among it."""
        found = {name: knob for name, knob in self.search_space.items() if knob is not None}
        if len(self.benchmark.optimizers) > 1:
            found[OPTIMIZER] = Knob(key="optimizer.type", values=self.benchmark.optimizers)
        return found

    @property
    def training_overrides(self) -> list[str]:
        """The overrides, with stage 2 where none chooses a stage."""
        chosen = any(_key(override) == "training" for override in self.overrides)
        return [*self.overrides] if chosen else ["training=stage2_pretrain", *self.overrides]

    def without(self, names: Sequence[str]) -> "Settings":
        """The same with fewer knobs."""
        kept = {name: knob for name, knob in self.search_space.items() if name not in names}
        return self.model_copy(update={"search_space": kept})

    @model_validator(mode="after")
    def _fit_together(self) -> "Settings":
        knobs = self.knobs
        if not knobs:
            raise ValueError(
                "nothing is searched: every knob of search_space is null, and benchmark.optimizers names one"
            )
        for name, knob in knobs.items():
            if knob.needs is not None and (knobs.get(knob.needs) is None or knobs[knob.needs].values is None):
                raise ValueError(f"search_space.{name} needs {knob.needs}, which is not searched; leave it out as well")
        keys = [knob.key for knob in knobs.values()]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key} is searched by more than one knob")
        for override in self.overrides:
            key = _key(override)
            if key in keys:
                name = next(name for name, knob in knobs.items() if knob.key == key)
                raise ValueError(f"{key} is searched: leave {override} out, or add search_space.{name}=null")
            if key in RESERVED:
                raise ValueError(f"{key} is the benchmark's to set: leave {override} out; see {RESERVED[key]}")
        return self


def read_settings(arguments: Sequence[str]) -> Settings:
    """Decode `key=value` arguments over the two YAML files.

    Raises:
        ConfigError: in one line a mistake, of a trial's overrides too.
    """
    tree = OmegaConf.merge(*(OmegaConf.load(FOLDER / name) for name in ("benchmark.yaml", "search_space.yaml")))
    return _decode(tree, arguments)


def change_settings(settings: Settings, arguments: Sequence[str]) -> Settings:
    """Settings of a resumed benchmark: those that were stored, with what may change.

    Raises:
        ConfigError: a key that would make earlier and later trials incomparable.
    """
    changed = _decode(OmegaConf.create(settings.model_dump(mode="json", exclude={"overrides"})), arguments, settings)
    may_change = {
        "parallel",
        "num_trials",
        "confirmations",
        "trial_timeout",
        "max_failures_in_a_row",
        "keep_runs",
        "output_dir",
    }
    before, after = settings.benchmark.model_dump(), changed.benchmark.model_dump()
    refused = [f"benchmark.{key}" for key in before if before[key] != after[key] and key not in may_change]
    if settings.search_space != changed.search_space:
        refused.append("search_space")
    if settings.overrides != changed.overrides:
        refused.append("overrides of the trials")
    if before["output_dir"] != after["output_dir"]:
        raise ConfigError("--resume writes beside its FILE: leave benchmark.output_dir out")
    if refused:
        raise ConfigError(
            f"--resume keeps what the trials so far were made with; {', '.join(refused)} differ(s): leave it out, or begin "
            "anew with benchmark.output_dir=<another folder>"
        )
    return changed


def _decode(tree: Any, arguments: Sequence[str], before: Settings | None = None) -> Settings:
    own = [a for a in arguments if _key(a).split(".")[0] in {"benchmark", "search_space"}]
    others = [a for a in arguments if a not in own]
    try:
        for override in OverridesParser.create().parse_overrides(own):
            path = str(override.key_or_group)
            if override.is_delete():
                OmegaConf.update(tree, path, None)
            elif override.is_sweep_override():
                raise ConfigError(f"{override.input_line!r}: a list is written in brackets, [1,2]")
            else:
                OmegaConf.update(tree, path, override.value(), merge=True, force_add=True)
        plain = OmegaConf.to_container(tree, resolve=True)
    except OverrideParseException as error:
        raise ConfigError(describe_hydra_error(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    assert isinstance(plain, dict)
    tree = {str(key): value for key, value in plain.items()}
    stored = before.overrides if before is not None and not others else tuple(others)
    settings = decode(Settings, {**tree, "overrides": list(stored)})
    # A trial's own mistakes are answered here too, not by the first trial.
    compose(settings.training_overrides)
    return settings


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]
