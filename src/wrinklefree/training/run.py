"""Run one command: a stage, or the pipeline of stages."""

import json
import logging
import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

from wrinklefree.data.config import FinetuneData, PretrainData
from wrinklefree.data.finetune_dataset import finetune_stream, spread, task_examples
from wrinklefree.data.prefetch import PrefetchedStream
from wrinklefree.data.pretrain_dataset import held_out_rows, pretrain_stream, training_documents
from wrinklefree.data.streams import BatchStream
from wrinklefree.data.tasks import get_task
from wrinklefree.distillation.teacher import Teacher
from wrinklefree.models.artifact import read_artifact, write_artifact
from wrinklefree.models.attention_backends import ChosenBackend, choose_backend
from wrinklefree.models.bitlinear import set_products, set_quantization
from wrinklefree.models.config import Architecture
from wrinklefree.models.hf import load_pretrained
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.subln import set_subln_strength
from wrinklefree.models.weights import Cut
from wrinklefree.training.cached_teacher import cache_path
from wrinklefree.training.callbacks import (
    Callback,
    DataWait,
    LossPlot,
    MetricsFile,
    ProgressLine,
    QuantizationTelemetry,
    RunInfo,
    Utilization,
)
from wrinklefree.training.compiling import choose_compile, compile_model
from wrinklefree.training.config import (
    CheckpointConfig,
    PipelineConfig,
    PretrainConfig,
    RunConfig,
    Stage3Config,
    StageConfig,
)
from wrinklefree.training.device import (
    REFERENCE_GPU,
    Compute,
    check_products,
    choose_compute,
    count_parameters,
    estimated_seconds,
    peak_flops_per_second,
    reference_gpu_hours,
    refuse_endless_cpu_run,
    training_flops,
)
from wrinklefree.training.evaluation import score_language, score_task
from wrinklefree.training.influence import MixtureMetrics, moves_mixture, weigh_sources
from wrinklefree.training.inputs import StageInput
from wrinklefree.training.memory_advice import explain_out_of_memory
from wrinklefree.training.optimizers import build_optimizer, resolve_optimizer
from wrinklefree.training.placement import (
    Student,
    collect,
    from_scratch,
    is_cut,
    load_model,
    place_student,
    place_teacher,
)
from wrinklefree.training.plan import FROM_SCRATCH, StagePlan, plan_stage, steps_for
from wrinklefree.training.rank_share import RankShare
from wrinklefree.training.run_report import RunPage, write_run_page
from wrinklefree.training.run_report_samples import Prompt, Samples, Validation, task_prompt, text_prompt
from wrinklefree.training.stage1 import insert_subln
from wrinklefree.training.trackers import make_tracking
from wrinklefree.training.trainer import Interrupted, Trainer, TrainerSettings, WarmStart
from wrinklefree.utils import distributed
from wrinklefree.utils.allocator import keep_large_buffers
from wrinklefree.utils.audit_logger import AuditLogger
from wrinklefree.utils.checkpoint import CheckpointStore
from wrinklefree.utils.determinism import seed_everything
from wrinklefree.utils.errors import ConfigError
from wrinklefree.utils.remote_run import RemoteRun, remote_run
from wrinklefree.utils.run_manager import Run, open_run, point
from wrinklefree.utils.sharded_checkpoint import SharedCheckpointStore
from wrinklefree.utils.storage import check_writable
from wrinklefree.utils.tokenizer import TextTokenizer, train_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResult:
    """A completed stage."""

    plan: StagePlan
    skipped: bool
    seconds: float
    """Working time, with the time before interruptions; that of a process that was killed outright is lost."""
    tokens: int


def run(config: RunConfig, tree: Mapping[str, Any], overrides: Sequence[str]) -> int:
    """Run `config`; returns the exit code (0, or 128 + the signal that interrupted it)."""
    if config.seeds > 1 and not isinstance(config.training, PipelineConfig):
        raise ConfigError(f"seeds={config.seeds} is for pipelines (training=bitdistill); give one stage seed=...")
    keep_large_buffers()
    try:
        if isinstance(config.training, PipelineConfig):
            from wrinklefree.training.pipeline import run_pipeline

            check_writable(Path(config.output_dir))
            run_pipeline(config, tree, overrides)
        elif config.dry_run:
            check_writable(Path(config.output_dir))
            show_plan(plan_stage(config, tree))
        else:
            with distributed.process_group(config.distributed.timeout_minutes, alone=is_cut(config.distributed)):
                run_stage(distributed.decide_on_rank_zero(partial(_plan_writable, config, tree)))
    except Interrupted as stopped:
        logger.warning("%s; the same command resumes it", stopped)
        return 128 + stopped.signal_number
    return 0


def _plan_writable(config: RunConfig, tree: Mapping[str, Any]) -> StagePlan:
    check_writable(Path(config.output_dir))
    return plan_stage(config, tree)


def show_plan(plan: StagePlan) -> float:
    """Log what `dry_run=true` promises: stage, model, data, length, inputs and outputs; returns estimated GPU hours."""
    training = plan.config.training
    steps = tokens = None
    if isinstance(training, StageConfig):
        counts_epochs = training.epochs is not None and training.max_steps is None
        batches_per_epoch = None
        if counts_epochs:
            with closing(open_stream(plan.config, load_tokenizer(plan))) as stream:
                batches_per_epoch = stream.batches_per_epoch
        steps = steps_for(training, batches_per_epoch)
        tokens = steps * training.batch_size * training.max_seq_length * training.gradient_accumulation_steps
    for key, value in plan.lines(steps, tokens):
        logger.info("%-12s %s", key, value)
    if tokens is None:
        return 0.0
    parameters = count_parameters(plan.config.model.architecture)
    hours = reference_gpu_hours(parameters, tokens, with_teacher=plan.teacher is not None)
    logger.info(
        "%-12s about %.2g GPU hours on one %s (from its data sheet, not measured)", "work", hours, REFERENCE_GPU
    )
    return hours


@dataclass(frozen=True)
class _Opened:
    """A run as rank 0 holds it; only there is it written, marked and sent."""

    run: Run
    remote: RemoteRun | None
    audit: AuditLogger | None


def run_stage(plan: StagePlan, callbacks: Sequence[Callback] = ()) -> StageResult:
    """Run one stage, or skip it when its fingerprint is complete; moves the seed's pointer to its artifact.

    With several processes every one calls it: rank 0 opens, marks and completes the run, and all train. `callbacks` come
    behind the stage's own.
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        opened: list[_Opened] = []

        def open_on_rank_zero() -> int | None:
            opened.append(_open(plan, stack))
            return _tokens_of_complete(plan, opened[0])

        tokens = distributed.decide_on_rank_zero(open_on_rank_zero)
        here = opened[0] if opened else None
        if tokens is not None:
            return StageResult(plan, skipped=True, seconds=_seconds_so_far(here), tokens=tokens)
        return _run_opened(plan, here, started, callbacks)


def _open(plan: StagePlan, stack: ExitStack) -> _Opened:
    """Lock the run, here and in the bucket, until `stack` is left."""
    config = plan.config
    keep_last_n = config.training.checkpoint.keep_last_n if isinstance(config.training, StageConfig) else 2
    gcs = config.gcs
    remote = stack.enter_context(
        remote_run(
            gcs.enabled, gcs.bucket, gcs.experiment_prefix, plan.fingerprint, plan.run_folder, keep_last_n=keep_last_n
        )
    )
    if remote is not None:
        remote.take() if config.skip_recovery else remote.restore()
    audit = AuditLogger(Path(config.audit.directory)) if config.audit.enabled else None
    run_ = open_run(
        plan.run_folder,
        plan.fingerprint,
        skip_completed=config.resume.skip_completed,
        fresh=config.skip_recovery,
        keep_last_n=keep_last_n,
        audit=audit,
        on_saved=None if remote is None else remote.checkpoint_saved,
        on_mark=None if remote is None else remote.marked,
    )
    return _Opened(stack.enter_context(run_), remote, audit)


def _tokens_of_complete(plan: StagePlan, opened: _Opened) -> int | None:
    """What a complete run was trained on, its pointer and its copy in the bucket put right; None: it is to be trained."""
    if not opened.run.is_complete():
        return None
    logger.info("%s: already complete (%s), skipped", plan.stage.title, plan.run_folder)
    point(plan.pointer, plan.artifact)
    if opened.remote is not None:
        opened.remote.complete_late(plan.artifact)
    return int(read_artifact(plan.artifact).lineage["tokens"])


def _run_opened(plan: StagePlan, opened: _Opened | None, started: float, callbacks: Sequence[Callback]) -> StageResult:
    """Train, or insert SubLN, and leave the run's record true however that ends."""
    config = plan.config
    mark = (lambda status, **facts: None) if opened is None else opened.run.mark
    if opened is not None:
        warn_if_dirty(plan, opened.audit)
    logger.info("%s: reads %s", plan.stage.title, plan.source.describe())
    if plan.teacher is not None:
        logger.info("%s: teacher is %s", plan.stage.title, plan.teacher.describe())
    seed_everything(config.seed)
    earlier = 0.0 if config.skip_recovery else _seconds_so_far(opened)
    mark("running")
    try:
        with explain_out_of_memory(config), distributed.naming_lost_ranks():
            if plan.stage.objective is None:
                tokens = distributed.decide_on_rank_zero(partial(_insert_subln, plan))
            else:
                checkpoints = None if opened is None else opened.run.checkpoints
                tokens = _train(plan, checkpoints, callbacks, lambda how: mark("running", resolved=dict(how)))
    except Interrupted as stopped:
        mark("interrupted", step=stopped.step, seconds=earlier + time.perf_counter() - started)
        _write_page(plan, opened)
        raise
    except (KeyboardInterrupt, SystemExit):
        mark("interrupted", seconds=earlier + time.perf_counter() - started)
        raise
    except BaseException as error:
        mark("failed", error=f"{type(error).__name__}: {error}")
        _write_page(plan, opened)
        raise
    seconds = earlier + time.perf_counter() - started
    if opened is not None:
        _complete(plan, opened, tokens, seconds)
    return StageResult(plan, skipped=False, seconds=seconds, tokens=tokens)


def _complete(plan: StagePlan, opened: _Opened, tokens: int, seconds: float) -> None:
    """The artifact is written: say so, and clear up."""
    if opened.remote is not None:
        opened.remote.complete(plan.artifact)
    opened.run.mark("completed", tokens=tokens, seconds=seconds)
    # Only now: a kill before the mark must still find them.
    opened.run.checkpoints.clear()
    point(plan.pointer, plan.artifact)
    _write_page(plan, opened)
    logger.info("%s: wrote %s in %.1f s", plan.stage.title, plan.pointer, seconds)
    if opened.remote is not None:
        opened.remote.drain()


def _write_page(plan: StagePlan, opened: _Opened | None) -> None:
    """The run's report.html, once its record is marked; of a run that is told to stop at once there is none."""
    if opened is not None:
        page = write_run_page(plan.run_folder, lineage_record(plan, tokens=0, resolved={}))
        if page is not None:
            logger.info("%s: its page is %s", plan.stage.title, page)


def _seconds_so_far(opened: _Opened | None) -> float:
    return 0.0 if opened is None else float(opened.run.metadata.get("seconds", 0.0))


def warn_if_dirty(plan: StagePlan, audit: AuditLogger | None) -> None:
    """The banner and audit entry for uncommitted changes."""
    if plan.fingerprint.git_dirty and audit is not None:
        audit.warn_dirty_git(plan.fingerprint)


def load_tokenizer(plan: StagePlan) -> TextTokenizer:
    """The tokenizer of the run's input: the artifact's, the base model's, or a new one trained on the data."""
    # A planned artifact does not exist yet; stages keep the tokenizer of the model that they begin with.
    if plan.source.path is not None and plan.source.path.exists():
        return read_artifact(plan.source.path).load_tokenizer()
    if plan.source == FROM_SCRATCH:
        assert isinstance(plan.config.data, PretrainData)
        logger.info("training a tokenizer of %d words", plan.config.model.architecture.vocab_size)
        return train_tokenizer(training_documents(plan.config.data), plan.config.model.architecture.vocab_size)
    return load_pretrained(plan.config.model)[1]


def open_stream(config: RunConfig, tokenizer: TextTokenizer) -> PrefetchedStream:
    """The run's training rows, those of all processes, made ahead of the steps; the caller closes it."""
    training = config.training
    assert isinstance(training, StageConfig)
    make = finetune_stream if isinstance(config.data, FinetuneData) else pretrain_stream
    stream = make(
        config.data,  # pyright: ignore[reportArgumentType]
        tokenizer, batch_size=training.batch_size, max_seq_length=training.max_seq_length, packing=config.packing,
        seed=config.seed,
    )  # fmt: skip
    return PrefetchedStream(stream, ahead=2 * training.gradient_accumulation_steps)


def choose_attention(config: RunConfig, compute: Compute) -> ChosenBackend:
    """What keeps documents apart on this device; printed."""
    architecture = config.model.architecture
    chosen = choose_backend(
        config.packing.attention,
        device=compute.device,
        dtype=compute.dtype,
        heads=(architecture.num_attention_heads, architecture.num_key_value_heads),
        head_dim=architecture.head_dim,
    )
    logger.info("attention: %s (%s)", chosen.name, chosen.reason)
    return chosen


def share_rows(stream: BatchStream, training: StageConfig) -> tuple[BatchStream, int]:
    """This process's part of the rows, and its micro-batches a step."""
    accumulation = training.gradient_accumulation_steps
    if distributed.world_size() == 1:
        return stream, accumulation
    share = RankShare(
        stream,
        accumulation_steps=accumulation,
        rows=training.batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    return share, share.micro_batches


def _insert_subln(plan: StagePlan) -> int:
    """Stage 1: convert, write; no tokens are trained on."""
    model, tokenizer = load_model(plan.source, plan.config)
    ternary = insert_subln(plan.config, model, tokenizer)
    write_artifact(plan.artifact, ternary, tokenizer, lineage_record(plan, tokens=0, resolved={}))
    return 0


def _train(
    plan: StagePlan,
    checkpoints: CheckpointStore | None,
    callbacks: Sequence[Callback],
    tell: Callable[[Mapping[str, str]], None],
) -> int:
    """Every other stage: build the parts, `tell` which they are, fit, write the artifact; returns the tokens trained on."""
    config, training = plan.config, plan.config.training
    assert isinstance(training, StageConfig)
    compute = choose_compute(training.dtype)
    if plan.stage.ternary:
        check_products(training.forward_products, training.backward_products, compute.device)
    student, tokenizer = load_student(plan, compute)
    model = student.model.train()
    set_products(model, training.forward_products, training.backward_products)
    model.activation_checkpointing = (
        "full" if training.activation_checkpointing else config.distributed.activation_checkpointing
    )
    longest = config.model.architecture.max_position_embeddings
    if training.max_seq_length > longest:
        logger.warning("rows of %d positions, and the model was made for %d", training.max_seq_length, longest)
    assert plan.stage.objective is not None
    teacher = teacher_architecture = None
    if plan.teacher is not None and cache_path(config) is None:
        teacher, teacher_architecture = load_teacher(plan, plan.teacher, compute, tokenizer)
    stream = open_stream(config, tokenizer)
    rows, micro_batches = share_rows(stream, training)
    total_steps = steps_for(training, stream.batches_per_epoch)
    tokens = total_steps * training.gradient_accumulation_steps * training.batch_size * training.max_seq_length
    if compute.device.type == "cpu":
        parameters = sum(parameter.numel() for parameter in model.parameters())
        seconds = estimated_seconds(compute, parameters, tokens, with_teacher=teacher is not None)
        refuse_endless_cpu_run(seconds, allow_slow=config.allow_slow, command_hint=plan.stage.title)
    resolved = resolve_optimizer(config.optimizer, plan.stage.name, compute.device.type)
    logger.info("optimizer: %s", resolved.reason)
    attention = choose_attention(config, compute)
    model.attention_backend = attention.name
    if teacher is not None and isinstance(teacher.model, CausalLM):
        teacher.model.attention_backend = attention.name
    spec = model.bitnet
    compiles = _compile(config, compute, model, teacher, tokens)
    identity = {
        "dtype": compute.dtype_name,
        "optimizer": resolved.type,
        "attention": attention.name,
        "device": compute.device.type,
        "compile": "blocks" if compiles else "no",
    }
    tell(identity)
    optimizer = build_optimizer(model, resolved.type, config.optimizer, training.lr, seed=config.seed)
    mixture: list[Callback] = []
    if moves_mixture(config):
        optimizer = weigh_sources(
            config, optimizer, student=student, tokenizer=tokenizer, compute=compute, stream=stream,
            total_steps=total_steps,
        )  # fmt: skip
        mixture.append(MixtureMetrics(optimizer))
    validation = make_validation(config, model, tokenizer, compute)
    shown: list[Callback] = []
    peak = peak_flops_per_second(compute, measure=training.logging.measure_peak)
    if peak is not None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        flops = training_flops(parameters, 1, with_teacher=teacher is not None)
        shown.append(Utilization(flops, peak * distributed.world_size()))
        logger.info("peak: %.4g TFLOP/s a device; MFU is the share of it", peak / 1e12)
    trainer = Trainer(
        model=model,
        objective=plan.stage.objective(config, model.architecture, teacher_architecture),
        optimizer=optimizer,
        stream=rows,
        settings=TrainerSettings(
            total_steps=total_steps,
            accumulation_steps=micro_batches,
            peak_learning_rate=training.lr,
            weight_decay=config.optimizer.weight_decay,
            schedule=training.schedule,
            warmup=training.quantization_warmup,
            grad_clip=training.grad_clip,
            save_interval=training.checkpoint.save_interval,
            evaluation_interval=training.evaluation.interval,
            max_nonfinite_steps=training.max_nonfinite_steps,
            saves_later=saves_later(training.checkpoint, compute),
        ),
        compute=compute,
        warm_start=WarmStart(spec.quantization_lambda, spec.subln_strength) if spec else WarmStart(1.0, 1.0),
        teacher=teacher,
        store=checkpoints if distributed.world_size() == 1 else SharedCheckpointStore(checkpoints),
        callbacks=[
            DataWait(stream),
            *mixture,
            *shown,
            *make_callbacks(plan, model),
            *make_samples(config, model, tokenizer, compute, validation),
            *callbacks,
        ]
        if distributed.is_main()
        else [],
        evaluate=validation,
        identity=identity,
        refresh_weights=student.refresh_weights,
    )
    resumed = trainer.resume(allow_identity_change=config.resume.allow_device_change)
    with closing(stream), stop_on_signals(trainer):
        trainer.fit(RunInfo(plan.stage.name, plan.run_folder, total_steps, resumed))
    set_quantization(model, 1.0)
    set_subln_strength(model, 1.0)
    whole = collect(model)

    def write() -> None:
        assert whole is not None
        record = lineage_record(plan, tokens=trainer.progress.tokens, resolved=identity)
        write_artifact(plan.artifact, whole, tokenizer, record)

    distributed.decide_on_rank_zero(write)
    return trainer.progress.tokens


def _compile(config: RunConfig, compute: Compute, model: CausalLM, teacher: Teacher | None, tokens: int) -> bool:
    """Compile the blocks of student and teacher where it is wanted and works; whether they are.

    Raises:
        ConfigError: it was asked for, and does not work.
    """
    training = config.training
    assert isinstance(training, StageConfig)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = training_flops(parameters, tokens, with_teacher=teacher is not None)
    choice = choose_compile(
        training.compile, model=model, compute=compute, sharded=is_cut(config.distributed), flops=flops
    )
    problem = None
    if choice.compiles:
        warms_up = training.quantization_warmup.schedule != "none"
        rows, length = training.batch_size, training.max_seq_length
        problem = compile_model(model, compute, rows, length, gradients=True, warms_up=warms_up)
        if problem is None and teacher is not None and isinstance(teacher.model, CausalLM) and not teacher.offload:
            problem = compile_model(teacher.model, compute, rows, length, gradients=False)
    if problem is not None:
        model.forget_compiled()
        if training.compile is True:
            raise ConfigError(f"training.compile=true does not work here ({problem}); use training.compile=false")
        logger.warning("blocks are not compiled: %s", problem)
    logger.info("compiled blocks: %s", "no" if problem or not choice.compiles else f"yes ({choice.reason})")
    return choice.compiles and problem is None


def saves_later(config: CheckpointConfig, compute: Compute) -> bool:
    """Whether checkpoints are written beside the training: a copy in memory is cheap where a GPU trains."""
    return compute.device.type != "cpu" if config.asynchronous == "auto" else config.asynchronous


def load_student(plan: StagePlan, compute: Compute) -> tuple[Student, TextTokenizer]:
    """The model that the stage trains, where it is trained, and the run's tokenizer."""
    if plan.source == FROM_SCRATCH:
        assert isinstance(plan.config.training, PretrainConfig)
        tokenizer = load_tokenizer(plan)
        fresh = CausalLM(plan.config.model.architecture)
        return place_student(plan.config, compute, partial(from_scratch, fresh)), tokenizer
    loaded: list[TextTokenizer] = []

    def load(cut: Cut | None) -> CausalLM:
        model, tokenizer = load_model(plan.source, plan.config, cut=cut)
        loaded.append(tokenizer)
        return model

    student = place_student(plan.config, compute, load)
    return student, loaded[0]


def load_teacher(
    plan: StagePlan, source: StageInput, compute: Compute, tokenizer: TextTokenizer
) -> tuple[Teacher, Architecture]:
    """The frozen model that teaches, and what it is; it may be larger than the student.

    Raises:
        ConfigError: it reads another vocabulary than the student's `tokenizer`.
    """
    training = plan.config.training
    offload = isinstance(training, Stage3Config) and training.teacher.offload

    def load(cut: Cut | None) -> CausalLM:
        model, theirs = load_model(source, plan.config, ternary=False, any_size=True, cut=cut)
        if theirs.fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"the teacher {source.describe()} has another tokenizer than the student, and distillation compares tokens: "
                "choose a teacher of the same family with training.teacher.source=..."
            )
        return model

    teacher, model = place_teacher(plan.config, compute, load, offload=offload)
    return teacher, model.architecture


def make_callbacks(plan: StagePlan, model: CausalLM) -> list[Callback]:
    """Progress, metrics, plot, page, and for ternary models the telemetry of the quantizer."""
    interval = plan.config.training.logging.log_interval if isinstance(plan.config.training, StageConfig) else 1
    callbacks: list[Callback] = []
    if plan.stage.ternary:
        callbacks.append(QuantizationTelemetry(model, interval))
    tracking = make_tracking(plan.config.tracking, plan.tree, plan.config.model.name)
    page = RunPage(lineage_record(plan, tokens=0, resolved={}))
    return [*callbacks, ProgressLine(interval), MetricsFile(), LossPlot(), page, *tracking]


def make_validation(
    config: RunConfig, model: CausalLM, tokenizer: TextTokenizer, compute: Compute
) -> Callable[[], Mapping[str, float]] | None:
    """Validation scores: bits per byte of the run's text, and the task's metric; None when there is nothing to score."""
    training = config.training
    assert isinstance(training, StageConfig)
    text = config.data.replay if isinstance(config.data, FinetuneData) else config.data
    scorers: list[Callable[[], Mapping[str, float]]] = []
    prompts: list[Prompt] = []
    if text is not None and training.evaluation.max_tokens:
        held_out = held_out_rows(
            text, tokenizer,
            split="validation", max_tokens=training.evaluation.max_tokens,
            max_seq_length=training.max_seq_length, batch_size=training.batch_size,
        )  # fmt: skip

        def language() -> Mapping[str, float]:
            score = score_language(model, held_out, compute)
            return {"bits_per_byte": score.bits_per_byte, "perplexity": score.perplexity}

        if held_out.document_bytes:
            scorers.append(language)
            prompts.append(text_prompt(held_out))
        else:
            logger.warning(
                "no document of %s is held out (data.held_out_percent=%g of few documents): no validation on text",
                text.name,
                text.held_out_percent,
            )
    if isinstance(config.data, FinetuneData) and training.evaluation.max_examples:
        task = get_task(config.data.task)
        examples = spread(task_examples(config.data, "validation"), training.evaluation.max_examples)

        def answers() -> Mapping[str, float]:
            score = score_task(
                model, tokenizer, task, examples, max_seq_length=training.max_seq_length, compute=compute
            )
            return {f"{score.task} {score.metric}": score.value}

        scorers.append(answers)
        prompts.append(task_prompt(task, examples[0], tokenizer, training.max_seq_length))
    return Validation(scorers, prompts) if scorers else None


def make_samples(
    config: RunConfig,
    model: CausalLM,
    tokenizer: TextTokenizer,
    compute: Compute,
    validation: Callable[[], Mapping[str, float]] | None,
) -> list[Callback]:
    """What writes samples at the end: of a run in one process that holds its whole model, and has something to ask."""
    if not isinstance(validation, Validation) or distributed.world_size() > 1 or is_cut(config.distributed):
        return []
    return [Samples(model, tokenizer, compute, validation.prompts)]


@contextmanager
def stop_on_signals(trainer: Trainer) -> Iterator[None]:
    """First SIGTERM or SIGINT: finish the step, save, stop. Second: at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if trainer.stop_signal is not None:
            raise SystemExit(128 + number)
        logger.warning("signal %d: finishing this step and saving; once more to stop at once", number)
        trainer.stop_signal = number

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lineage_record(plan: StagePlan, *, tokens: int, resolved: Mapping[str, str]) -> dict[str, Any]:
    """What an artifact was made from and how; `ancestors` is how later stages find their input."""

    def parent(role: str, source: StageInput) -> dict[str, Any]:
        return {"role": role, "stage": source.stage, "fingerprint": source.fingerprint, "path": str(source.path or "")}

    parents = [parent("init", plan.source)]
    if plan.teacher is not None:
        parents.append(parent("teacher", plan.teacher))
    model = plan.config.model
    return {
        "stage": plan.stage.name,
        "fingerprint": plan.fingerprint.value,
        "parents": parents,
        "ancestors": [*map(list, plan.source.ancestors), [plan.stage.name, plan.fingerprint.value]],
        "base": {
            "name": model.name,
            "source": model.source,
            "from": {"hub": model.pretrained, "package": model.package, "path": model.path}[model.source],
            "fingerprint": plan.base.fingerprint,
        },
        "data": {"name": plan.task, "fingerprint": plan.data_fingerprint},
        "tokens": tokens,
        "seed": plan.config.seed,
        "git_commit": plan.fingerprint.git_commit,
        "git_dirty": plan.fingerprint.git_dirty,
        "resolved": dict(resolved),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "wrinklefree")}},
        "config": json.loads(json.dumps(plan.tree)),
    }
