"""A run before it runs: its stage, inputs, length, fingerprint and folder. What `dry_run=true` prints."""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import wrinklefree
from wrinklefree.data.config import FinetuneData
from wrinklefree.data.pretrain_dataset import data_fingerprint
from wrinklefree.data.sources import source_fingerprint
from wrinklefree.models.hf import identity
from wrinklefree.training.cached_teacher import checked_digest
from wrinklefree.training.config import (
    MIXING_STAGES,
    PretrainConfig,
    RunConfig,
    Stage1Config,
    Stage3Config,
    StageConfig,
)
from wrinklefree.training.inputs import StageInput, find_input, find_task_teacher
from wrinklefree.training.stage import Stage
from wrinklefree.training.stages import STAGES, teacher_kind
from wrinklefree.utils.errors import ConfigError, NetworkError
from wrinklefree.utils.run_fingerprint import Fingerprint, fingerprint

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"
"""Stands for the identity of what a dry run could not reach."""
FROM_SCRATCH = StageInput(stage="base", fingerprint="from-scratch", path=None, reason="random weights")


@dataclass(frozen=True)
class StagePlan:
    """Everything that is decided before a run starts."""

    config: RunConfig
    tree: Mapping[str, Any]
    stage: Stage
    base: StageInput
    source: StageInput
    teacher: StageInput | None
    fingerprint: Fingerprint
    data_fingerprint: str

    @property
    def output_dir(self) -> Path:
        """Where all stages of this command write."""
        return Path(self.config.output_dir)

    @property
    def stage_folder(self) -> Path:
        """The seed's folder of this stage and model."""
        return self.output_dir / self.stage.folder_name(self.config.model.name)

    @property
    def run_folder(self) -> Path:
        """Where this run writes: named by its fingerprint, so that no two runs share a folder."""
        return self.stage_folder / "runs" / self.fingerprint.value[:8]

    @property
    def artifact(self) -> Path:
        """What the run leaves behind."""
        return self.run_folder / "artifact"

    @property
    def pointer(self) -> Path:
        """The seed's path, a link to the newest completed artifact."""
        return self.stage_folder / self.stage.pointer

    def as_input(self, reason: str) -> StageInput:
        """The planned artifact as the input of a later stage."""
        return StageInput(
            stage=self.stage.name,
            fingerprint=self.fingerprint.value,
            path=self.artifact,
            reason=reason,
            ancestors=(*self.source.ancestors, (self.stage.name, self.fingerprint.value)),
        )

    @property
    def task(self) -> str:
        """The task's name, or the text collection's."""
        return data_name(self.config)

    def lines(self, total_steps: int | None, total_tokens: int | None) -> list[tuple[str, str]]:
        """What `dry_run` prints, as (key, value)."""
        model = self.config.model
        where = {"hub": model.pretrained, "package": model.package, "path": model.path}[model.source]
        length = "no training" if total_steps is None else f"{total_steps:,} steps, {total_tokens:,} tokens"
        lines = [
            ("stage", f"{self.stage.name} ({self.stage.title})"),
            ("model", f"{model.name} from {model.source}: {where}"),
            ("data", self.task),
            ("length", length),
            ("reads", self.source.describe()),
            ("fingerprint", self.fingerprint.value),
            ("writes", str(self.run_folder)),
            ("points", str(self.pointer)),
        ]
        if self.teacher is not None:
            lines.insert(5, ("teacher", self.teacher.describe()))
        return lines


def data_name(config: RunConfig) -> str:
    """The task of fine-tuning data, the name of pretraining text."""
    return config.data.task if isinstance(config.data, FinetuneData) else config.data.name


def base_input(config: RunConfig) -> StageInput:
    """The pretrained model as an input; its fingerprint is the identity of its weights."""
    if isinstance(config.training, PretrainConfig) and config.training.from_scratch:
        if config.training.init_from is not None:
            raise ConfigError("training.from_scratch=true starts from random weights; leave training.init_from out")
        return FROM_SCRATCH
    known = _unless_dry(config, lambda: identity(config.model))
    return StageInput(stage="base", fingerprint=known, path=None, reason="the pretrained model")


def _unless_dry(config: RunConfig, identify: Callable[[], str]) -> str:
    """What `identify` finds; a dry run goes on without it where there is no network, with a provisional fingerprint."""
    try:
        return identify()
    except NetworkError as error:
        if not config.dry_run:
            raise
        logger.warning("dry run: fingerprints and folders are provisional, as %s", error)
        return UNKNOWN


def repository_root() -> Path | None:
    """The checkout that this code runs from, or None for an installed wheel (even inside another project's checkout)."""
    package = Path(wrinklefree.__file__).resolve().parent
    root = package.parents[1]
    return root if package.parent.name == "src" and (root / ".git").exists() else None


def plan_stage(
    config: RunConfig,
    tree: Mapping[str, Any],
    *,
    source: StageInput | None = None,
    teacher: StageInput | None = None,
    base: StageInput | None = None,
) -> StagePlan:
    """Resolve inputs and identity of one stage. Inputs given by a pipeline are taken as they are."""
    stage = STAGES[config.training.stage]
    base = base or base_input(config)
    training = config.training
    output_dir = Path(config.output_dir)
    assert isinstance(training, StageConfig | Stage1Config)
    if source is None:
        source = find_input(
            stage, model_name=config.model.name, output_dir=output_dir, init_from=training.init_from, base=base
        )
    taught_by = teacher_kind(config)
    if taught_by == "base":
        teacher = base
    elif taught_by == "task" and teacher is None:
        assert isinstance(training, Stage3Config)
        teacher = find_task_teacher(
            source=training.teacher.source,
            model_name=config.model.name,
            output_dir=output_dir,
            task=data_name(config),
            base=base,
        )
    reader = source.fingerprint if source is FROM_SCRATCH else base.fingerprint
    data = _unless_dry(config, lambda: data_fingerprint(config.data, reader))
    inputs = {"source": source.fingerprint, "data": data}
    if teacher is not None:
        inputs["teacher"] = teacher.fingerprint
        cached = checked_digest(config, teacher=teacher.fingerprint, data=data)
        if cached is not None:
            inputs["teacher_cache"] = cached
    if config.influence.enabled and config.training.stage in MIXING_STAGES:
        # Paths say nothing of contents; without probes of its own the run is judged by its data.
        for index, probe in enumerate(config.influence.probes):
            inputs[f"probe_{index}"] = _unless_dry(config, partial(source_fingerprint, probe))
    return StagePlan(
        config=config,
        tree=tree,
        stage=stage,
        base=base,
        source=source,
        teacher=teacher,
        fingerprint=fingerprint(tree, sections=stage.sections, inputs=inputs, repository=repository_root()),
        data_fingerprint=data,
    )


def steps_for(training: StageConfig, batches_per_epoch: int | None) -> int:
    """Optimizer steps of a run: `max_steps`, else `total_tokens` or `epochs` rounded up to whole steps."""
    if training.max_steps is not None:
        return training.max_steps
    if training.total_tokens is not None and training.epochs is not None:
        raise ConfigError(
            f"training.total_tokens={training.total_tokens} and training.epochs={training.epochs:g} both give a length; "
            "set one of them to null"
        )
    accumulation = training.gradient_accumulation_steps
    if training.total_tokens is not None:
        return math.ceil(training.total_tokens / (training.batch_size * training.max_seq_length * accumulation))
    assert training.epochs is not None
    if batches_per_epoch is None:
        raise ConfigError(
            "training.epochs counts passes over a task, and this data is a text stream; give training.total_tokens=..."
        )
    return max(1, math.ceil(training.epochs * batches_per_epoch / accumulation))


def combined_fingerprint(plans: Mapping[str, StagePlan]) -> str:
    """Identity of a pipeline: of its parts, in order."""
    digest = hashlib.sha256()
    for name, plan in plans.items():
        digest.update(f"{name}={plan.fingerprint.value}\n".encode())
    return digest.hexdigest()
