"""Run a study: every step once a seed (once a rate where rates are tried), every arm scored as it is finished.

A cell is an ordinary run in an ordinary run folder, so what is complete is skipped, what was interrupted resumes, and
studies that begin alike share their beginning. A cell that fails is recorded, what builds on it is recorded as failed too,
and the others go on; the next start tries it again.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wrinklefree.composition import compose, compose_tree
from wrinklefree.data.config import FinetuneData, PretrainData
from wrinklefree.data.finetune_dataset import spread
from wrinklefree.data.pretrain_dataset import HeldOut, held_out_rows
from wrinklefree.data.tasks import Task, get_task
from wrinklefree.models.artifact import read_artifact
from wrinklefree.models.llama import CausalLM
from wrinklefree.training.callbacks import METRICS_FILE, format_duration, read_metrics
from wrinklefree.training.config import PretrainConfig, RunConfig, Stage1Config, StageConfig
from wrinklefree.training.device import (
    MODEL_FLOP_UTILIZATION,
    Compute,
    choose_compute,
    count_parameters,
    measured_flops_per_second,
    training_flops,
)
from wrinklefree.training.evaluation import LanguageScore, score_language, score_responses, score_task
from wrinklefree.training.inputs import StageInput
from wrinklefree.training.plan import FROM_SCRATCH, StagePlan, base_input, plan_stage, steps_for
from wrinklefree.training.run import run_stage
from wrinklefree.training.study_config import BASE, ScoringConfig, StepConfig, StudyCommand, StudyConfig, study_as_json
from wrinklefree.training.study_results import (
    ArmResult,
    Measure,
    RateTrial,
    read_result,
    read_results,
    result_path,
    write_result,
    write_table,
    write_trials,
)
from wrinklefree.training.trainer import Interrupted
from wrinklefree.utils.allocator import keep_large_buffers
from wrinklefree.utils.config import decode
from wrinklefree.utils.errors import ConfigError
from wrinklefree.utils.storage import atomic_write, check_writable
from wrinklefree.utils.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

SCORING_VERSION = 1
"""Part of a result's identity: raise it when scores of the same model would change."""
LOG_INTERVAL = 100
RESPONSE_BITS = "response_bits_per_byte"


@dataclass(frozen=True)
class Cell:
    """A planned run of a step, and what its chain amounts to."""

    step: str
    seed: int
    rate: float | None
    plan: StagePlan
    steps: int
    tokens: int
    """Of this run alone; 0 for stage 1."""
    chain_steps: int
    chain_tokens: int
    """Of the chain behind the root, this run included."""
    is_root: bool
    parent: "Cell | None"

    def describe(self) -> str:
        """One line of a log."""
        rate = "" if self.rate is None else f", rate {self.rate:g}"
        return f"{self.step}, seed {self.seed}{rate}"


class StudyFailure(Exception):  # noqa: N818 - a record of an error, not an error
    """A step that could not be run, with the reason."""


def plan_cell(
    study: StudyConfig, command: StudyCommand, name: str, seed: int, rate: float | None,
    parent: Cell | None, teacher: Cell | None,
) -> Cell:  # fmt: skip
    """Plan one run of a step whose source and teacher are planned.

    Raises:
        ConfigError: the step's command cannot be composed, or gives no length in tokens or steps.
    """
    step = study.steps[name]
    overrides = [*step.command, *study.common, f"seed={seed}", f"output_dir='{command.runs_folder}'"]
    if rate is not None:
        overrides.append(f"training.lr={rate!r}")
    root = parent
    while root is not None and root.parent is not None:
        root = root.parent
    if root is not None and root.is_root:
        # Downstream of a model that the study pretrains: records and identity name that model, not the shipped one.
        overrides += ["model.source=path", f"model.path='{root.plan.artifact}'"]
    tree = compose_tree(overrides)
    if "logging" in tree["training"]:
        tree["training"]["logging"]["log_interval"] = LOG_INTERVAL
    config = decode(RunConfig, tree)
    base = root.plan.as_input("the study's pretrained model") if root is not None and root.is_root else None
    base = base or base_input(config)
    source = parent.plan.as_input(f"the study's {parent.step}") if parent is not None else base
    _check_source(name, step, config, source)
    plan = plan_stage(
        config,
        tree,
        base=base,
        source=source,
        teacher=_teacher_input(step, base, teacher),
    )
    steps, tokens = _length(name, config)
    is_root = parent is None and source is FROM_SCRATCH
    behind = (0, 0) if is_root else (steps, tokens)
    return Cell(
        step=name,
        seed=seed,
        rate=rate,
        plan=plan,
        steps=steps,
        tokens=tokens,
        chain_steps=behind[0] + (parent.chain_steps if parent else 0),
        chain_tokens=behind[1] + (parent.chain_tokens if parent else 0),
        is_root=is_root,
        parent=parent,
    )


def _teacher_input(step: StepConfig, base: StageInput, teacher: Cell | None) -> StageInput | None:
    if teacher is not None:
        return teacher.plan.as_input(f"the study's {teacher.step}")
    return base if step.teacher == BASE else None


def _check_source(name: str, step: StepConfig, config: RunConfig, source: StageInput) -> None:
    from_scratch = isinstance(config.training, PretrainConfig) and config.training.from_scratch
    if (step.source is None) != (source is FROM_SCRATCH and from_scratch):
        raise ConfigError(
            f"steps.{name}: source={step.source} and training.from_scratch={str(from_scratch).lower()} do not fit; give "
            "a source (base, or a step), or pretrain from random weights"
        )


def _length(name: str, config: RunConfig) -> tuple[int, int]:
    """Optimizer steps and tokens of a run."""
    training = config.training
    if isinstance(training, Stage1Config):
        return 0, 0
    if not isinstance(training, StageConfig):
        raise ConfigError(f"steps.{name}: a step is one stage, training={training.stage} is all of them")
    if training.max_steps is None and training.total_tokens is None:
        raise ConfigError(
            f"steps.{name} counts epochs; give training.max_steps=... with training.epochs=null, so that controls can be "
            "held to the same length"
        )
    steps = steps_for(training, None)
    return steps, steps * training.batch_size * training.gradient_accumulation_steps * training.max_seq_length


class Study:
    """The state of one start: which rates were chosen, which cells are done, which failed."""

    def __init__(self, command: StudyCommand, study: StudyConfig) -> None:
        self.command, self.study = command, study
        self.arms = list(command.arms or study.arms)
        self.chosen: dict[str, float] = {}
        self.cells: dict[tuple[str, int], Cell] = {}
        self.failures: dict[tuple[str, int], str] = {}
        self.trials: list[RateTrial] = []
        self._held_out: dict[str, HeldOut] = {}

    def arms_of(self, seed: int) -> list[str]:
        """The arms that run with a seed."""
        return [arm for arm in self.arms if seed in self.study.seeds_of(arm)]

    def plan_all(self) -> Iterator[Cell]:
        """Every cell, with the first of its rates standing for the one that will be chosen."""
        for seed in self.study.seeds:
            first = seed == self.study.seeds[0]
            for name in self.study.needed_steps(self.arms_of(seed), tuning=first):
                step = self.study.steps[name]
                borrowed = self.study.steps[step.rate_of].rates[:1] if step.rate_of else ()
                cells = [self.plan(name, seed, rate) for rate in (step.rates or borrowed or (None,))]
                self.cells[name, seed] = cells[0]
                yield from cells if first else cells[:1]

    def plan(self, name: str, seed: int, rate: float | None) -> Cell:
        """Plan a cell on the cells that are already there."""
        step = self.study.steps[name]
        parent, teacher = (
            None if needed is None or needed == BASE else self.cells[needed, seed]
            for needed in (step.source, step.teacher)
        )
        return plan_cell(self.study, self.command, name, seed, rate, parent, teacher)

    def check_controls(self) -> None:
        """Hold every control to the tokens and steps of its arm; needs `plan_all`.

        Raises:
            ConfigError: naming the arm, its control and both lengths.
        """
        for name, arm in self.study.arms.items():
            if arm.control is None or name not in self.arms:
                continue
            control = self.study.arms[arm.control]
            for seed in self.study.seeds_of(name):
                mine, theirs = self.cells.get((arm.step, seed)), self.cells.get((control.step, seed))
                if mine is None or theirs is None:
                    continue
                if (mine.chain_tokens, mine.chain_steps) != (theirs.chain_tokens, theirs.chain_steps):
                    raise ConfigError(
                        f"arm {name} trains on {mine.chain_tokens:,} tokens in {mine.chain_steps} steps, its control "
                        f"{arm.control} on {theirs.chain_tokens:,} in {theirs.chain_steps}; make them equal"
                    )

    def run_step(self, name: str, seed: int) -> None:
        """Run a step's cell, or its cells when rates are tried; the outcome goes to `cells` or `failures`."""
        step = self.study.steps[name]
        needs = [(needed, seed) for needed in (step.source, step.teacher) if needed is not None]
        if step.rate_of is not None and step.rate_of not in self.chosen:
            needs.append((step.rate_of, self.study.seeds[0]))
        for needed in needs:
            if needed in self.failures:
                self.failures[name, seed] = f"needs {needed[0]}, which failed: {self.failures[needed]}"
                return
        try:
            if name in self.chosen or not step.rates:
                cell = self.plan(name, seed, self.chosen.get(step.rate_of or name))
                self._run(cell)
            else:
                cell = self._try_rates(name, seed)
        except StudyFailure as failure:
            self.failures[name, seed] = str(failure)
        else:
            self.cells[name, seed] = cell

    def _run(self, cell: Cell) -> None:
        logger.info("== %s: %s", self.study.name, cell.describe())
        try:
            run_stage(cell.plan)
        except (Interrupted, KeyboardInterrupt):
            raise
        except Exception as error:
            logger.warning("%s failed: %s: %s", cell.describe(), type(error).__name__, error)
            raise StudyFailure(f"{type(error).__name__}: {error}") from error

    def _try_rates(self, name: str, seed: int) -> Cell:
        """Run every rate, keep the one with the best validation score."""
        step = self.study.steps[name]
        tried: list[tuple[Cell, float | None, str]] = []
        metric = ""
        for rate in step.rates:
            cell = self.plan(name, seed, rate)
            try:
                self._run(cell)
                metric, value = validation_score(cell, step)
                tried.append((cell, value, ""))
            except StudyFailure as failure:
                tried.append((cell, None, str(failure)))
        worked = [(value, cell) for cell, value, _ in tried if value is not None]
        if not worked:
            raise StudyFailure(f"every rate of {name} failed; the first: {tried[0][2]}")
        pick = min if metric.endswith("bits_per_byte") else max
        best = pick(worked, key=lambda found: found[0])[1]
        assert best.rate is not None
        self.chosen[name] = best.rate
        self.trials += [
            RateTrial(
                study=self.study.name, step=name, seed=seed, rate=cell.rate or 0.0, metric=metric, value=value,
                chosen=cell is best, error=error,
            )
            for cell, value, error in tried
        ]  # fmt: skip
        write_trials(self.command.folder, self.trials)
        logger.info("rate of %s: %g of %s (%s on validation data)", name, best.rate, list(step.rates), metric)
        return best

    def score(self, arm: str, seed: int) -> None:
        """Score an arm on test data and keep the record; what is scored already stays."""
        key = (self.study.arms[arm].step, seed)
        folder = self.command.folder
        if key in self.failures:
            result = ArmResult(study=self.study.name, arm=arm, seed=seed, status="failed", error=self.failures[key])
            write_result(folder, result)
            return
        cell = self.cells[key]
        identity = score_identity(cell, self.study.scoring)
        before = read_result(result_path(folder, arm, seed))
        if before is not None and before.status == "completed" and before.identity == identity:
            return
        try:
            measures = self._measures(cell)
        except KeyboardInterrupt:
            raise
        except Exception as error:  # noqa: BLE001 - as for training
            logger.warning("scoring %s, seed %d failed: %s: %s", arm, seed, type(error).__name__, error)
            failed = ArmResult(
                study=self.study.name, arm=arm, seed=seed, status="failed", error=f"{type(error).__name__}: {error}"
            )
            write_result(folder, failed)
            return
        chain = [c for c in _chain(cell) if not c.is_root]
        result = ArmResult(
            study=self.study.name,
            arm=arm,
            seed=seed,
            status="completed",
            fingerprint=cell.plan.fingerprint.value,
            identity=identity,
            commit=cell.plan.fingerprint.git_commit,
            tokens=cell.chain_tokens,
            steps=cell.chain_steps,
            seconds=sum(_training_seconds(c) for c in chain),
            rates={c.step: c.rate for c in _chain(cell) if c.rate is not None},
            measures=measures,
        )
        write_result(folder, result)
        scores = ", ".join(f"{m.metric} {m.value:.4f} [{m.low:.4f}, {m.high:.4f}]" for m in measures)
        logger.info("arm %s, seed %d: %s", arm, seed, scores)

    def _measures(self, cell: Cell) -> tuple[Measure, ...]:
        artifact = read_artifact(cell.plan.artifact)
        compute = choose_compute("auto")
        model, tokenizer = artifact.load_model(compute.device), artifact.load_tokenizer()
        scoring = self.study.scoring
        measures: list[Measure] = []
        if scoring.text:
            if tokenizer.fingerprint not in self._held_out:
                self._held_out[tokenizer.fingerprint] = scoring_rows(scoring, tokenizer)
            measures += text_measures(model, self._held_out[tokenizer.fingerprint], compute)
        for spec in scoring.tasks:
            task = get_task(spec.name)
            measures += task_measures(model, tokenizer, task, spec.max_examples, scoring.max_seq_length, compute)
        return tuple(measures)


def scoring_rows(scoring: ScoringConfig, tokenizer: TextTokenizer) -> HeldOut:
    """The test documents of the study's text."""
    text = compose(["training=fp_pretrain", *scoring.text]).config.data
    if not isinstance(text, PretrainData):
        raise ConfigError(f"scoring.text chooses {text.name}, which is a task; choose text, such as data=packaged")
    return held_out_rows(
        text, tokenizer,
        split="test", max_tokens=scoring.max_tokens, max_seq_length=scoring.max_seq_length, batch_size=16,
    )  # fmt: skip


def text_measures(model: CausalLM, held_out: HeldOut, compute: Compute) -> list[Measure]:
    """Bits per byte, by document."""
    return [_bits_measure("bits_per_byte", score_language(model, held_out, compute))]


def _bits_measure(metric: str, score: LanguageScore) -> Measure:
    return Measure(
        metric=metric,
        lower_is_better=True,
        value=score.bits_per_byte,
        low=score.interval.low,
        high=score.interval.high,
        items=score.document_bits,
        weights=tuple(float(size) for size in score.document_bytes),
    )


def task_measures(
    model: CausalLM, tokenizer: TextTokenizer, task: Task, max_examples: int | None, max_seq_length: int,
    compute: Compute,
) -> list[Measure]:  # fmt: skip
    """The metric by example and macro-F1 of a classification; bits per byte of the references of a generation."""
    examples = spread(task.load("test"), max_examples)
    if task.kind == "generation":
        responses = score_responses(model, tokenizer, task, examples, max_seq_length=max_seq_length, compute=compute)
        return [_bits_measure(f"{task.name} {RESPONSE_BITS}", responses)]
    score = score_task(model, tokenizer, task, examples, max_seq_length=max_seq_length, compute=compute)
    measures = [
        Measure(
            metric=f"{task.name} {score.metric}",
            lower_is_better=False,
            value=score.value,
            low=score.interval.low,
            high=score.interval.high,
            items=score.per_example,
            weights=(1.0,) * len(score.per_example),
        )
    ]
    if score.macro_f1 is not None and score.macro_f1_interval is not None:
        interval = score.macro_f1_interval
        measures.append(
            Measure(
                metric=f"{task.name} macro_f1",
                lower_is_better=False,
                value=score.macro_f1,
                low=interval.low,
                high=interval.high,
            )
        )
    return measures


def validation_score(cell: Cell, step: StepConfig) -> tuple[str, float]:
    """Name and value of the score that chooses a rate: from the run's last validation.

    Of a generation task, whose validation would be generated text, the reference responses are scored here.

    Raises:
        StudyFailure: the run validated nothing of that kind.
    """
    lines = [line for line in read_metrics(cell.plan.run_folder / METRICS_FILE) if line["event"] == "evaluation"]
    scores: Mapping[str, float | None] = lines[-1]["evaluation"] if lines else {}
    name = "bits_per_byte"
    if step.select == "task" and isinstance(cell.plan.config.data, FinetuneData):
        task = get_task(cell.plan.config.data.task)
        name = f"{task.name} {task.metric}"
        if task.kind == "generation":
            return f"{task.name} {RESPONSE_BITS}", _response_bits(cell, task)
    value = scores.get(name)
    if value is None:
        raise StudyFailure(f"no validation score {name!r}; it has {', '.join(scores) or 'none'}")
    return name, value


def _response_bits(cell: Cell, task: Task) -> float:
    """Bits per byte of the validation split's reference responses."""
    artifact, training = read_artifact(cell.plan.artifact), cell.plan.config.training
    assert isinstance(training, StageConfig)
    compute = choose_compute(training.dtype)
    score = score_responses(
        artifact.load_model(compute.device), artifact.load_tokenizer(), task, task.load("validation"),
        max_seq_length=training.max_seq_length, compute=compute,
    )  # fmt: skip
    return score.bits_per_byte


def score_identity(cell: Cell, scoring: ScoringConfig) -> str:
    """Identity of an arm's record."""
    content = [cell.plan.fingerprint.value, scoring.model_dump(mode="json"), SCORING_VERSION]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def run_study(command: StudyCommand, study: StudyConfig) -> int:
    """Run, list or report a study; returns the exit code: 0, 1 when an arm failed, 128 + the signal that stopped it."""
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    check_writable(Path(command.output_dir))
    if command.report:
        from wrinklefree.training.study_report import write_study_report

        write_study_report(command, study)
        return 0
    runner = Study(command, study)
    cells = list(runner.plan_all())
    runner.check_controls()
    if command.dry_run:
        show_cells(runner, cells)
        return 0
    runner.cells.clear()
    keep_large_buffers()
    command.folder.mkdir(parents=True, exist_ok=True)
    atomic_write(command.folder / "study.json", study_as_json(study))
    # Arms that train nothing, models just rounded, count for nothing in the time that is left.
    total, done, started = max(1, sum(cell.tokens for cell in cells)), 0, time.monotonic()
    planned = _tokens_by_step(cells)
    try:
        for seed in study.seeds:
            arms = runner.arms_of(seed)
            for name in study.needed_steps(arms, tuning=seed == study.seeds[0]):
                runner.run_step(name, seed)
                for arm in (arm for arm in arms if study.arms[arm].step == name):
                    runner.score(arm, seed)
                    write_table(command.folder, read_results(command.folder))
                done += planned[name, seed]
                elapsed = time.monotonic() - started
                left = elapsed * (total - done) / done if done else 0.0
                logger.info("%s: %.0f%% done, about %s left", study.name, 100 * done / total, format_duration(left))
    except Interrupted as stopped:
        logger.warning("%s; the same command goes on from there", stopped)
        return 128 + stopped.signal_number
    from wrinklefree.training.study_report import write_study_report

    write_study_report(command, study)
    return 1 if runner.failures else 0


def show_cells(runner: Study, cells: Sequence[Cell]) -> None:
    """Log every cell with its tokens and estimated time, and the sum."""
    compute = choose_compute("auto")
    speed = measured_flops_per_second(compute) * MODEL_FLOP_UTILIZATION
    parameters: dict[str, int] = {}
    seconds = 0.0
    for number, cell in enumerate(cells, start=1):
        config = cell.plan.config
        if config.model.name not in parameters:
            parameters[config.model.name] = count_parameters(config.model.architecture)
        flops = training_flops(parameters[config.model.name], cell.tokens, with_teacher=cell.plan.teacher is not None)
        seconds += flops / speed
        logger.info(
            "%3d  %s  %-40s %9s tokens  %7s", number, cell.plan.fingerprint.value[:8], cell.describe(),
            f"{cell.tokens:,}", format_duration(flops / speed),
        )  # fmt: skip
    logger.info(
        "%d cells of %d arms, %s tokens, about %s of training on this machine",
        len(cells), len(runner.arms), f"{sum(cell.tokens for cell in cells):,}", format_duration(seconds),
    )  # fmt: skip


def _tokens_by_step(cells: Sequence[Cell]) -> dict[tuple[str, int], int]:
    tokens: dict[tuple[str, int], int] = {}
    for cell in cells:
        tokens[cell.step, cell.seed] = tokens.get((cell.step, cell.seed), 0) + cell.tokens
    return tokens


def _chain(cell: Cell) -> list[Cell]:
    cells, at = [cell], cell.parent
    while at is not None:
        cells.insert(0, at)
        at = at.parent
    return cells


def _training_seconds(cell: Cell) -> float:
    """What the run recorded, wherever it was trained; 0 when it recorded nothing."""
    try:
        record: dict[str, Any] = json.loads((cell.plan.run_folder / "metadata.json").read_bytes())
    except (OSError, ValueError):
        return 0.0
    return float(record.get("seconds", 0.0))
