"""What a study is: steps that build on one another, arms that end at a step, and how arms are scored. Imports no torch.

A step is what one would type after `scripts/train.py`. Steps form a tree (`source`), so arms that begin alike share their
beginning and train it once. Every step runs once a seed; a step without a source that pretrains from random weights makes
the seeds *pretraining* seeds. A step with `rates` runs once a rate on the first seed, the best on validation data is
kept, and the other seeds take that rate. Test data is read when an arm is scored, and never before.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, model_validator

from wrinklefree.composition import config_directory
from wrinklefree.utils.config import Config, decode
from wrinklefree.utils.errors import ConfigError

BASE = "base"
"""Names the pretrained model of the command where a step's source or teacher is meant."""


class StepConfig(Config):
    """One stage run, once a seed."""

    command: tuple[str, ...] = Field(min_length=1)
    """Overrides, as typed after `scripts/train.py`; the length is given in max_steps or total_tokens."""
    source: str | None = None
    """The step that it starts from; `base`: the command's pretrained model; null: random weights."""
    teacher: str | None = None
    """The step whose model teaches stage 3; `base`: the pretrained model. Stage 1.9 is always taught by the root."""
    rates: tuple[float, ...] = ()
    """Learning rates tried on the first seed; empty: the command's own."""
    rate_of: str | None = None
    """Take the rate that was chosen for this other step, where a grid of one's own would cost too much."""
    select: Literal["bits_per_byte", "task"] = "bits_per_byte"
    """Validation score that chooses the rate: the lowest bits per byte of text, or the best metric of the task (of a
    generation task, the lowest bits per byte of its reference responses)."""


class ArmConfig(Config):
    """One line of the table."""

    step: str
    """The step that it ends with."""
    meaning: str
    control: str | None = None
    """The arm in full precision that was given as many tokens and steps; null for controls and reference arms."""
    first_seeds: int | None = Field(default=None, ge=1)
    """Run only this many of the study's seeds."""
    series: str | None = None
    """Studies of a quantity: the curve that this arm is a point of."""
    at: float | None = None
    """The arm's place on the x axis."""


class ComparisonConfig(Config):
    """A claim: one arm is better than another."""

    claim: str
    better: str
    than: str


class TaskScoring(Config):
    """A task that arms are scored on."""

    name: str
    max_examples: int | None = Field(default=None, ge=1)


class ScoringConfig(Config):
    """How every arm is scored, on test data."""

    text: tuple[str, ...] = ()
    """Overrides that choose the text of bits per byte (`data=packaged`); empty: none."""
    max_tokens: int = Field(default=20_000, ge=1)
    max_seq_length: int = Field(default=128, ge=8)
    tasks: tuple[TaskScoring, ...] = ()


class StudyConfig(Config):
    """A study: `configs/study/<name>.yaml`."""

    name: str
    question: str
    common: tuple[str, ...] = ()
    """Overrides behind every step's command."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    steps: dict[str, StepConfig]
    arms: dict[str, ArmConfig]
    baseline: str | None = None
    """The arm from which gap closure counts (BitNet-SFT)."""
    comparisons: tuple[ComparisonConfig, ...] = ()
    scoring: ScoringConfig
    x_label: str = "tokens"
    reading: str = ""
    """Written by a person, printed below the tables."""

    @model_validator(mode="after")
    def _names_are_known(self) -> "StudyConfig":
        if BASE in self.steps:
            raise ValueError(
                f"steps.{BASE}: this name means the command's own pretrained model; call the step otherwise"
            )
        for name, step in self.steps.items():
            for key in ("source", "teacher"):
                target = getattr(step, key)
                if target not in (None, BASE, *self.steps):
                    raise ValueError(f"steps.{name}.{key}={target} is no step; known: {', '.join(self.steps)}")
            self._refuse_circle(name)
            if step.rate_of is not None and (step.rates or not getattr(self.steps.get(step.rate_of), "rates", ())):
                raise ValueError(
                    f"steps.{name}.rate_of={step.rate_of} names no step with rates, or stands beside rates"
                )
        for name, arm in self.arms.items():
            if arm.step not in self.steps:
                raise ValueError(f"arms.{name}.step={arm.step} is no step; known: {', '.join(self.steps)}")
            if arm.control is not None and arm.control not in self.arms:
                raise ValueError(f"arms.{name}.control={arm.control} is no arm; known: {', '.join(self.arms)}")
        named = [self.baseline, *(n for c in self.comparisons for n in (c.better, c.than))]
        for arm_name in named:
            if arm_name is not None and arm_name not in self.arms:
                raise ValueError(f"{arm_name} is no arm; known: {', '.join(self.arms)}")
        return self

    def _refuse_circle(self, name: str) -> None:
        seen, at = [name], self.steps[name].source
        while at is not None and at != BASE:
            if at in seen:
                raise ValueError(f"steps.{name} is its own source: {' <- '.join([*seen, at])}")
            seen.append(at)
            at = self.steps[at].source

    def needed_steps(self, arms: Sequence[str], *, tuning: bool) -> list[str]:
        """Steps that the arms are made of, teachers included, every one behind those that it needs.

        With `tuning`, also the steps whose rates they borrow: the first seed has to find those.
        """
        ordered: dict[str, None] = {}

        def add(name: str | None) -> None:
            if name is None or name == BASE or name in ordered:
                return
            add(self.steps[name].source)
            add(self.steps[name].teacher)
            add(self.steps[name].rate_of if tuning else None)
            ordered[name] = None

        for arm in arms:
            add(self.arms[arm].step)
        return list(ordered)

    def chain(self, step: str) -> list[str]:
        """The steps from the root to this one."""
        names, at = [step], self.steps[step].source
        while at is not None and at != BASE:
            names.insert(0, at)
            at = self.steps[at].source
        return names

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """The seeds that an arm runs with."""
        return self.seeds[: self.arms[arm].first_seeds]


class StudyCommand(Config):
    """What `scripts/run_study.py` is told, beside overrides of the study's own keys."""

    study: str
    output_dir: str = "outputs"
    arms: tuple[str, ...] = ()
    """Run only these arms (and the steps that they need); empty: all."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; null: torch's choice."""
    dry_run: bool = False
    """List the cells with estimated tokens and time, run nothing."""
    report: bool = False
    """Run nothing; write the section and the plots from the rows that are there."""
    document: str | None = None
    """Markdown file whose lines between `<!-- study NAME: begin -->` and `end` the report replaces."""

    @property
    def folder(self) -> Path:
        """Where the study's rows, tables and plots lie."""
        return Path(self.output_dir) / "studies" / self.study

    @property
    def runs_folder(self) -> Path:
        """Where the steps of all studies run: equal steps of two studies are one run."""
        return Path(self.output_dir) / "studies" / "runs"


def parse_study(arguments: Sequence[str]) -> tuple[StudyCommand, StudyConfig]:
    """Decode a command line of `key=value`: keys of `StudyCommand`, all others override the study's YAML.

    Raises:
        ConfigError: in one line a mistake.
    """
    own, others = split_keys(arguments, StudyCommand)
    command = decode(StudyCommand, {"study": None, **own} if "study" not in own else own)
    known = studies()
    if command.study not in known:
        raise ConfigError(f"study: expected one of {', '.join(known) or 'none'}, given {command.study!r}")
    path = config_directory() / "study" / f"{command.study}.yaml"
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(others)))
        tree = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    assert isinstance(tree, dict)
    study = decode(StudyConfig, {str(key): value for key, value in tree.items()})
    for arm in command.arms:
        if arm not in study.arms:
            raise ConfigError(f"arms: study {study.name} has no arm {arm!r}; it has {', '.join(study.arms)}")
    return command, study


def studies() -> list[str]:
    """Names of the studies that come with the library."""
    return sorted(path.stem for path in (config_directory() / "study").glob("*.yaml"))


def split_keys(arguments: Sequence[str], kind: type[Config]) -> tuple[dict[str, Any], list[str]]:
    """Part `key=value` arguments into those whose key is a field of `kind`, with parsed values, and the rest.

    A single value given for a list is a list of one.

    Raises:
        ConfigError: an argument that is not key=value, or whose value cannot be read.
    """
    own: dict[str, Any] = {}
    others: list[str] = []
    for argument in arguments:
        key, equals, value = argument.lstrip("+").partition("=")
        if not equals or argument.startswith("-"):
            raise ConfigError(f"{argument!r} is not an override: write key=value")
        if key not in kind.model_fields:
            others.append(argument)
            continue
        try:
            tree = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={value}"]), resolve=True)
        except (OmegaConfBaseException, ValueError) as error:
            raise ConfigError(f"{argument!r} cannot be read: {' '.join(str(error).split())}") from error
        parsed = tree[key] if isinstance(tree, Mapping) else None
        takes_list = "tuple" in str(kind.model_fields[key].annotation)
        takes_text = kind.model_fields[key].annotation in (str, str | None)
        if takes_list and not isinstance(parsed, list):
            parsed = [] if parsed is None else [parsed]
        own[key] = value if takes_text and parsed is not None else parsed
    return own, others


def study_as_json(study: StudyConfig) -> str:
    """The study, for the record beside its rows."""
    return json.dumps(study.model_dump(mode="json"), indent=1) + "\n"
