"""What a stage eats: found by lineage, never by time.

The input is the artifact of the furthest earlier stage whose lineage leads back to the *current* stage-1 artifact. A
stage-2 output made from another stage-1 output is a stale chain, and an error that names both.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wrinklefree.training.stage import Stage
from wrinklefree.training.stages import STAGES
from wrinklefree.utils.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageInput:
    """The base model, or an artifact of an earlier stage."""

    stage: str
    """`base`, or the name of the stage that wrote it."""
    fingerprint: str
    path: Path | None
    """None for the base model."""
    reason: str
    """Why this one; printed at the start of the run."""
    ancestors: tuple[tuple[str, str], ...] = ()
    """(stage, fingerprint) of everything it was made from, itself included, oldest first."""

    def describe(self) -> str:
        """One line for the plan."""
        return self.reason if self.path is None else f"{self.path} ({self.reason})"


def read_lineage(artifact: Path) -> Mapping[str, Any]:
    """The lineage record of an artifact folder.

    Raises:
        CheckpointError: when the folder has none, so nobody knows what it was made from.
    """
    path = artifact / "lineage.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{artifact} has no lineage.json: it was not written by a stage. Pass a stage's output folder, or load a "
            "plain model with model.source=path model.path=..."
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the artifact is damaged") from None


def artifact_input(artifact: Path, reason: str) -> StageInput:
    """An artifact folder as a stage's input."""
    lineage = read_lineage(artifact)
    try:
        return StageInput(
            stage=lineage["stage"],
            fingerprint=lineage["fingerprint"],
            path=artifact,
            reason=reason,
            ancestors=tuple((stage, fingerprint) for stage, fingerprint in lineage["ancestors"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{artifact / 'lineage.json'} is no lineage of a stage ({type(error).__name__}: {error}); was it written by "
            "another program or version?"
        ) from error


def stage_pointer(output_dir: Path, model_name: str, stage: Stage) -> Path:
    """The seed's path of a stage's newest completed artifact."""
    return output_dir / stage.folder_name(model_name) / stage.pointer


def resolve_given(path: str, key: str = "training.init_from") -> Path:
    """A path given by `key` as an artifact folder: the artifact itself, or a stage's folder.

    Raises:
        CheckpointError: when nothing is there.
    """
    folder = Path(path).expanduser()
    if (folder / "lineage.json").is_file():
        return folder.resolve()
    for pointer in sorted({stage.pointer for stage in STAGES.values()}):
        if (folder / pointer / "lineage.json").is_file():
            return (folder / pointer).resolve()
    if not folder.exists():
        raise CheckpointError(f"{key}={path}: no such folder")
    raise CheckpointError(
        f"{key}={path}: neither an artifact (no lineage.json) nor a stage's output folder; pass for "
        "example outputs/bitdistill_<model>_continue_pretrain/stage2_checkpoint"
    )


def find_input(
    stage: Stage, *, model_name: str, output_dir: Path, init_from: str | None, base: StageInput
) -> StageInput:
    """The input of `stage`.

    Raises:
        ConfigError: when an earlier stage has not run, or `init_from` is of the wrong kind.
        CheckpointError: when the chain is stale.
    """
    if init_from is not None:
        given = artifact_input(resolve_given(init_from), "training.init_from")
        _check_kind(stage, given)
        return given
    if not stage.reads:
        return base
    current = stage_pointer(output_dir, model_name, STAGES["stage1"])
    if not current.exists():
        raise ConfigError(
            f"{stage.title} needs stage 1, and {current} does not exist. Run training=stage1_subln model={model_name} "
            "first, or pass training.init_from=<artifact>."
        )
    stage1 = artifact_input(current.resolve(), "the current stage 1 output")
    for name in stage.reads:
        pointer = stage_pointer(output_dir, model_name, STAGES[name])
        if pointer.is_symlink() and not pointer.exists():
            raise CheckpointError(
                f"{pointer} leads to {pointer.readlink()}, which is gone. Run {name} again, remove the link to do without "
                f"{name}, or choose with training.init_from=<artifact>."
            )
        if not pointer.exists():
            continue
        candidate = artifact_input(pointer.resolve(), f"furthest earlier stage made from the current stage 1 ({name})")
        if ("stage1", stage1.fingerprint) in candidate.ancestors:
            return candidate
        made_from = dict(candidate.ancestors).get("stage1", "none")
        raise CheckpointError(
            f"stale chain: {pointer} ({name}, {candidate.fingerprint[:8]}) was made from stage 1 {made_from[:8]}, but "
            f"the current stage 1 is {stage1.fingerprint[:8]} ({current}). Run {name} again, or choose with "
            f"training.init_from={stage1.path} (skips {name}) or training.init_from={candidate.path}."
        )
    raise AssertionError(f"{stage.name} reads {stage.reads}, which does not end with stage1")


def _check_kind(stage: Stage, given: StageInput) -> None:
    source = STAGES.get(given.stage)
    if source is None or source.ternary == stage.ternary or stage.name == "stage1":
        return
    kind = {True: "a ternary model", False: "a full-precision model"}
    raise ConfigError(
        f"{stage.title} starts from {kind[stage.ternary]}, but training.init_from={given.path} is "
        f"{kind[source.ternary]} (written by {given.stage})."
    )


def find_task_teacher(*, source: str, model_name: str, output_dir: Path, task: str, base: StageInput) -> StageInput:
    """The teacher of stage 3 (`training.teacher.source`).

    `auto` takes this model's fp_sft artifact for this task, made from the same pretrained weights; else the base with
    a warning, since a model that never saw the task gives noise at the label words.

    Raises:
        ConfigError: when several artifacts fit equally well.
        CheckpointError: when a given path holds no artifact.
    """
    if source == "base":
        return base
    if source != "auto":
        return artifact_input(resolve_given(source, "training.teacher.source"), "training.teacher.source")
    stage = STAGES["fp_sft"]
    folder = output_dir / stage.folder_name(model_name)
    fitting = [
        artifact.resolve()
        for artifact in sorted(folder.glob("runs/*/artifact"))
        if _fits(read_lineage(artifact), task, base.fingerprint)
    ]
    pointer = (folder / stage.pointer).resolve()
    if pointer in fitting:
        return artifact_input(pointer, f"newest fp_sft of task {task}")
    if len(fitting) == 1:
        return artifact_input(fitting[0], f"fp_sft of task {task}")
    if fitting:
        raise ConfigError(
            f"{len(fitting)} fp_sft artifacts fit task {task} (first: {fitting[0]}); choose one with "
            "training.teacher.source=<artifact>"
        )
    logger.warning(
        "TEACHER: no fp_sft artifact of model %s for task %s; the base model teaches, and it has never seen the task. "
        "Run training=fp_sft data=... first for a tuned teacher.",
        model_name,
        task,
    )
    return base


def _fits(lineage: Mapping[str, Any], task: str, base_fingerprint: str) -> bool:
    """Tuned on this task, straight from these weights (a control has more pretraining behind it)."""
    return (
        lineage.get("data", {}).get("name") == task
        and lineage.get("base", {}).get("fingerprint") == base_fingerprint
        and [parent["stage"] for parent in lineage.get("parents", [])] == ["base"]
    )
