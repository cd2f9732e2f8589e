"""All of BitDistill with its controls: teacher, stages 1, 1.9, 2 and 3, evaluation and a report.

A pipeline is a list of commands. Each step is composed from the overrides that a user could type himself (they stand in
`training.steps`), so a step has the same configuration, fingerprint and folder rules as a stage run by hand.
What the pipeline adds is the wiring (which step eats which), the control's token count, and the table.

The arms:
  full precision   the base model fine-tuned on the task (`teacher`)
  control          the same after the tokens of 1.9 and 2 in full precision: what those tokens alone are worth
  naive ternary    the fine-tuned model rounded to ternary, no training
  BitNet-SFT       stage 1, then the task with cross-entropy only
  BitDistill       stages 1, 1.9, 2 and 3
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wrinklefree.composition import compose_step
from wrinklefree.data.config import FinetuneData
from wrinklefree.training.config import PipelineConfig, RunConfig, StageConfig
from wrinklefree.training.device import REFERENCE_GPU
from wrinklefree.training.inputs import StageInput
from wrinklefree.training.plan import StagePlan, base_input, combined_fingerprint, plan_stage, steps_for
from wrinklefree.utils.errors import ConfigError, WrinkleFreeError
from wrinklefree.utils.manifest import MANIFEST
from wrinklefree.utils.run_manager import point

if TYPE_CHECKING:
    from wrinklefree.training.export import Export

logger = logging.getLogger(__name__)

WIRING: dict[str, tuple[str, str | None]] = {
    "teacher": ("base", None),
    "stage1": ("base", None),
    "bitnet_sft": ("stage1", None),
    "stage1_9": ("stage1", None),
    "stage2": ("stage1_9", None),
    "stage3": ("stage2", "teacher"),
    "control_pretrain": ("base", None),
    "control": ("control_pretrain", None),
}
"""Step -> (the step it starts from, the step that teaches it), in the order in which they run."""

CONTROL_STEPS = ("bitnet_sft", "control_pretrain", "control")
OPTIONAL_STEPS = ("stage1_9",)
"""Steps that an empty list leaves out: what would start from one starts from its own start."""
GGUF = "model.gguf"
TASK_STEPS = ("teacher", "bitnet_sft", "stage3", "control")
TEXT_STEPS = ("stage1_9", "stage2", "control_pretrain")


@dataclass(frozen=True)
class PipelinePlan:
    """The steps of one seed."""

    seed: int
    steps: dict[str, StagePlan]

    @property
    def fingerprint(self) -> str:
        """Identity of the whole."""
        return combined_fingerprint(self.steps)


def pipeline_folder(config: RunConfig) -> Path:
    """Where a pipeline's steps write, apart from stages run by hand."""
    return Path(config.output_dir) / f"pipeline_{config.model.name}"


def plan_pipeline(config: RunConfig, overrides: Sequence[str], seed: int) -> PipelinePlan:
    """Plan every step; each later step eats the planned artifact of an earlier one.

    Raises:
        ConfigError: when `training.steps` lacks a step, or gives one the wrong kind of data.
    """
    training = config.training
    assert isinstance(training, PipelineConfig)
    plans: dict[str, StagePlan] = {}
    base: StageInput | None = None
    tokens = 0
    left_out = {name: WIRING[name][0] for name in OPTIONAL_STEPS if training.steps.get(name) == ()}
    for name, (wired_to, taught_by) in WIRING.items():
        starts_from = left_out.get(wired_to, wired_to)
        if name in left_out or (name in CONTROL_STEPS and not training.controls):
            continue
        if name not in training.steps:
            raise ConfigError(f"training.steps has no step {name}; a pipeline needs {', '.join(WIRING)}")
        command = [*overrides, f"seed={seed}", f"output_dir='{pipeline_folder(config)}'"]
        command.append(f"dry_run={str(config.dry_run).lower()}")
        if name == "control_pretrain":
            command.append(f"training.total_tokens={tokens}")
        composed = compose_step(training.steps[name], command)
        _check_data(name, composed.config)
        base = base or base_input(composed.config)
        plans[name] = plan_stage(
            composed.config,
            composed.tree,
            base=base,
            source=base if starts_from == "base" else plans[starts_from].as_input(f"the pipeline's {starts_from}"),
            teacher=plans[taught_by].as_input(f"the pipeline's {taught_by}") if taught_by else None,
        )
        if name in {"stage1_9", "stage2"}:
            tokens += _planned_tokens(composed.config)
    return PipelinePlan(seed, plans)


def _check_data(name: str, config: RunConfig) -> None:
    """Refuse text where the table needs a task's answers, and a task where stages read text."""
    kind = "a task" if isinstance(config.data, FinetuneData) else "text"
    needed = {**dict.fromkeys(TASK_STEPS, "a task"), **dict.fromkeys(TEXT_STEPS, "text")}.get(name, kind)
    if kind != needed:
        raise ConfigError(
            f"training.steps.{name} needs {needed} (for example data={'downstream' if needed == 'a task' else 'packaged'}), "
            f"and its data is {kind}"
        )


def _planned_tokens(config: RunConfig) -> int:
    training = config.training
    assert isinstance(training, StageConfig)
    rows = training.batch_size * training.gradient_accumulation_steps
    return steps_for(training, None) * rows * training.max_seq_length


def run_pipeline(config: RunConfig, tree: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Run all steps of all seeds, evaluate every arm, write the report, and print the table."""
    assert isinstance(config.training, PipelineConfig)
    plans = [plan_pipeline(config, overrides, config.seed + number) for number in range(config.seeds)]
    if config.dry_run:
        from wrinklefree.training.run import show_plan

        hours = 0.0
        for name, plan in plans[0].steps.items():
            logger.info("-- step %s", name)
            hours += show_plan(plan)
        logger.info("-- all steps: about %.1f GPU hours a seed, estimated for one %s", hours, REFERENCE_GPU)
        return
    identity = "".join(plan.fingerprint for plan in plans)
    folder = pipeline_folder(config) / "reports" / combined_identity(identity, config)[:8]
    summary = folder / "report.json"
    final = Path(config.output_dir) / "checkpoint-final"
    last = plans[-1].steps["stage3"]
    whole = summary.is_file() and all(
        (step.artifact / MANIFEST).is_file() for plan in plans for step in plan.steps.values()
    )
    if whole and _is_exported(config, folder) and config.resume.skip_completed and not config.skip_recovery:
        point(final, last.artifact)
        point(pipeline_folder(config) / "report", folder)
        if config.training.export:
            point(pipeline_folder(config) / GGUF, folder / GGUF)
        logger.info("the whole job is already complete; its report is %s", folder / "report.md")
        logger.info("%s", (folder / "table.txt").read_text())
        return
    from wrinklefree.training.report import Report, evaluate_arms, write_report
    from wrinklefree.training.run import StageResult, run_stage
    from wrinklefree.training.run_report_pipeline import page_if_it_stops, write_pipeline_page

    _refuse_endless_cpu_job(config, plans)

    outcomes = []
    seconds: dict[str, float] = {}
    with page_if_it_stops(folder, tree, plans):
        for plan in plans:
            results: dict[str, StageResult] = {}
            for number, (name, step) in enumerate(plan.steps.items(), start=1):
                logger.info("== seed %d, step %d of %d: %s", plan.seed, number, len(plan.steps), name)
                results[name] = run_stage(step)
                seconds[name] = seconds.get(name, 0.0) + results[name].seconds
            evaluation_started = time.perf_counter()
            logger.info("== seed %d: evaluating every arm on held-out data", plan.seed)
            outcomes.append(evaluate_arms(config, plan.steps, {name: r.tokens for name, r in results.items()}))
            seconds["evaluation"] = seconds.get("evaluation", 0.0) + time.perf_counter() - evaluation_started
    point(final, last.artifact)
    export: Export | None = None
    problem: WrinkleFreeError | None = None
    if config.training.export:
        logger.info("== writing the ternary model as a GGUF file")
        export_started = time.perf_counter()
        prompts = [prompt for arm, prompt, _ in outcomes[-1].samples if arm == "BitDistill"]
        try:
            export = _export(config, last.artifact, folder, prompts)
        except WrinkleFreeError as error:
            # Hours of training end in a report whatever becomes of the file; the error comes after it.
            problem = error
        seconds["export"] = time.perf_counter() - export_started
    report = Report(
        config=config,
        outcomes=outcomes,
        seconds=seconds,
        total_seconds=sum(seconds.values()),
        paths={name: step.artifact for name, step in plans[-1].steps.items()} | {"final": final},
        export=export,
    )
    write_report(report, folder)
    failed = None if problem is None else f"The GGUF file was not written: {problem}"
    write_pipeline_page(folder, tree, plans, status="completed", report=report, problem=failed)
    point(pipeline_folder(config) / "report", folder)
    if problem is not None:
        raise problem


def _is_exported(config: RunConfig, folder: Path) -> bool:
    """Whether the report tells of a file that is there: a file alone may be what a failed export left."""
    assert isinstance(config.training, PipelineConfig)
    if not config.training.export:
        return True
    record = json.loads((folder / "report.json").read_bytes())
    return record.get("export") is not None and (folder / GGUF).is_file()


def _export(config: RunConfig, artifact: Path, folder: Path, prompts: Sequence[str]) -> "Export":
    from wrinklefree.training.export import export_model
    from wrinklefree.training.report import SAMPLE_TOKENS

    folder.mkdir(parents=True, exist_ok=True)
    link = pipeline_folder(config) / GGUF
    export = export_model(artifact, folder / GGUF, shown_as=link, prompts=prompts, max_tokens=SAMPLE_TOKENS)
    point(link, folder / GGUF)
    return export


def _refuse_endless_cpu_job(config: RunConfig, plans: Sequence[PipelinePlan]) -> None:
    """Refuse a job of days on a CPU before its first step; steps that count epochs of a task are left out."""
    import torch

    from wrinklefree.models.llama import CausalLM
    from wrinklefree.training.device import choose_compute, estimated_seconds, refuse_endless_cpu_run

    compute = choose_compute("auto")
    if compute.device.type != "cpu":
        return
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in CausalLM(config.model.architecture).parameters())
    seconds = 0.0
    for plan in plans:
        for step in plan.steps.values():
            training = step.config.training
            counts_tokens = isinstance(training, StageConfig) and (training.total_tokens or training.max_steps)
            if counts_tokens and not (step.artifact / MANIFEST).is_file():
                tokens = _planned_tokens(step.config)
                seconds += estimated_seconds(compute, parameters, tokens, with_teacher=step.teacher is not None)
    if seconds > 24 * 3600:
        refuse_endless_cpu_run(seconds, allow_slow=config.allow_slow, command_hint="the whole job")


def combined_identity(identity: str, config: RunConfig) -> str:
    """Fingerprint of the report: of its steps and of how they are evaluated."""
    assert isinstance(config.training, PipelineConfig)
    return hashlib.sha256(f"{identity}{config.training.evaluation_tokens}".encode()).hexdigest()
