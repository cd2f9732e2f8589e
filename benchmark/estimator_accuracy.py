"""The estimator's memory against a real training step on this CPU, case by case: models, stages, batch shapes.

Each case runs in a process of its own: random weights, random tokens, the real trainer, objective, optimizer and teacher.
After a first step has made the optimizer's state, two peaks are measured. *Allocated*: parameters and state, plus the
largest running sum of the allocator's events in the profiler during a step. *Resident*: how far the process's resident
memory rises above what it was before the model, as the kernel counts it; this includes the allocator's slack.

    uv run python -m benchmark.estimator_accuracy            # all cases, a Markdown table
    uv run python -m benchmark.estimator_accuracy --case smollm2_stage2

A case whose allocated peak is more than 10% off is called a miss, and the exit code is 1. Resident memory is shown
beside it and not judged: the C allocator keeps freed buffers for reuse.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from wrinklefree.composition import compose
from wrinklefree.distillation.teacher import Teacher
from wrinklefree.models.bitlinear import set_quantization
from wrinklefree.models.config import BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import IGNORE, Batch
from wrinklefree.training.config import RunConfig, StageConfig
from wrinklefree.training.device import Compute
from wrinklefree.training.device_kinds import DEVICE_KINDS
from wrinklefree.training.estimator import step_flops, workload_of
from wrinklefree.training.memory_model import Workload, peak_of_run
from wrinklefree.training.optimizers import build_optimizer, resolve_optimizer
from wrinklefree.training.stages import STAGES
from wrinklefree.training.trainer import Trainer, TrainerSettings, WarmStart
from wrinklefree.utils.allocator import keep_large_buffers

TOLERANCE = 0.10
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """What is trained for two steps."""

    overrides: tuple[str, ...]
    documents_a_row: int = 1
    target_share: float = 1.0
    quantization_lambda: float = 1.0


def _shape(rows: int, length: int, accumulation: int = 1) -> tuple[str, ...]:
    return (
        f"training.batch_size={rows}",
        f"training.max_seq_length={length}",
        f"training.gradient_accumulation_steps={accumulation}",
        "training.dtype=bfloat16",
    )


_MID = (
    "model=tiny",
    "model.architecture.hidden_size=512",
    "model.architecture.intermediate_size=1408",
    "model.architecture.num_hidden_layers=6",
    "model.architecture.head_dim=64",
    "model.architecture.tie_word_embeddings=false",
)
_STAGE2, _STAGE3 = ("training=stage2_pretrain", "data=packaged"), ("training=stage3_distill", "data=recall")

_SMALLEST = (
    *(f"model.architecture.{key}=64" for key in ("vocab_size", "hidden_size", "intermediate_size")),
    "model.architecture.num_attention_heads=2",
    "model.architecture.num_key_value_heads=2",
    "model.architecture.head_dim=32",
    "model.architecture.num_hidden_layers=2",
    "distillation.attention.relation_heads=1",
    *_shape(1, 16),
)

CASES = {
    "tiny_stage2": Case(("model=tiny", *_STAGE2, *_shape(16, 128))),
    "tiny_stage2_warm_up": Case(("model=tiny", *_STAGE2, *_shape(16, 128)), quantization_lambda=0.5),
    "tiny_stage2_long_rows": Case(("model=tiny", *_STAGE2, *_shape(2, 1024)), documents_a_row=3),
    "tiny_stage2_masked": Case(("model=tiny", *_STAGE2, *_shape(4, 384, 2)), documents_a_row=3),
    "tiny_stage2_float32": Case(("model=tiny", *_STAGE2, *_shape(16, 128), "training.dtype=float32")),
    "tiny_stage2_recomputed": Case(
        ("model=tiny", *_STAGE2, *_shape(16, 128), "training.activation_checkpointing=true")
    ),
    "tiny_stage2_selective": Case(
        ("model=tiny", *_STAGE2, *_shape(16, 128), "distributed.activation_checkpointing=selective")
    ),
    "tiny_stage1_9": Case(("model=tiny", "training=stage1_9_layerwise", "data=packaged", *_shape(16, 128))),
    "tiny_stage3": Case(("model=tiny", *_STAGE3, *_shape(16, 128))),
    "tiny_stage3_few_targets": Case(("model=tiny", *_STAGE3, *_shape(16, 128)), target_share=0.05),
    "tiny_fp_sft": Case(("model=tiny", "training=fp_sft", "data=recall", *_shape(16, 128)), target_share=0.05),
    "mid_stage2_muon": Case((*_MID, *_STAGE2, *_shape(8, 128, 2), "optimizer.type=muon")),
    "mid_stage3_per_projection": Case((*_MID, *_STAGE3, *_shape(4, 256), "subln.placement=per_projection")),
    "smollm2_stage2": Case(("model=smollm2_135m", *_STAGE2, *_shape(2, 64))),
    "smollm2_stage3": Case(
        ("model=smollm2_135m", *_STAGE3, *_shape(2, 96), "distillation.attention.relation_heads=3"), target_share=0.1
    ),
}
"""Name -> case. The SmolLM2 ones hold up to 3.5 GB."""


@dataclass(frozen=True)
class Outcome:
    """Bytes and seconds of one case."""

    estimated: int
    moment: str
    allocated: int
    resident: int
    parameters: int
    flops: float
    """Operations for a second of this process's time, on one core."""


class RandomRows:
    """A stream of random tokens."""

    batches_per_epoch = None
    padding_share = 0.0

    def __init__(self, case: Case, training: StageConfig, vocabulary: int) -> None:
        self._case, self._vocabulary = case, vocabulary
        self._shape = (training.batch_size, training.max_seq_length)
        self._generator = torch.Generator().manual_seed(0)

    @property
    def tokens_per_batch(self) -> int:
        """See `BatchStream`."""
        return self._shape[0] * self._shape[1]

    def next_batch(self) -> Batch:
        """See `BatchStream`."""
        length = self._shape[1]
        ids = torch.randint(0, self._vocabulary, self._shape, generator=self._generator)
        labels = torch.randint(0, self._vocabulary, self._shape, generator=self._generator)
        chosen = torch.rand(self._shape, generator=self._generator) < self._case.target_share
        labels[~chosen] = IGNORE
        documents = torch.arange(length) * self._case.documents_a_row // length + 1
        positions = torch.arange(length)
        return Batch(ids, labels, positions.expand(self._shape), documents.expand(self._shape).contiguous())

    def state_dict(self) -> dict[str, Any]:
        """See `BatchStream`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `BatchStream`."""


def build_trainer(case: Case, config: RunConfig) -> Trainer:
    """A trainer of the case's stage as a run builds it, on random weights and tokens."""
    training = config.training
    assert isinstance(training, StageConfig)
    stage, architecture = STAGES[config.training.stage], config.model.architecture
    assert stage.objective is not None
    torch.manual_seed(0)
    spec = None
    if stage.ternary:
        spec = BitNetSpec(
            placement=config.subln.placement,
            gain="ones",
            activation_bits=config.model.quantization.activation_bits,
            quantization_lambda=case.quantization_lambda,
        )
    model = CausalLM(architecture, spec).train()
    model.activation_checkpointing = (
        "full" if training.activation_checkpointing else config.distributed.activation_checkpointing
    )
    teacher = None if stage.teacher == "none" else Teacher(CausalLM(architecture))
    resolved = resolve_optimizer(config.optimizer, stage.name, "cpu")
    warmup = training.quantization_warmup
    if case.quantization_lambda == 1.0:
        warmup = warmup.model_copy(update={"schedule": "none"})
    return Trainer(
        model=model,
        objective=stage.objective(config, architecture, architecture if teacher else None),
        optimizer=build_optimizer(model, resolved.type, config.optimizer, training.lr),
        stream=RandomRows(case, training, architecture.vocab_size),
        settings=TrainerSettings(
            total_steps=100,
            accumulation_steps=training.gradient_accumulation_steps,
            peak_learning_rate=training.lr,
            weight_decay=0.0,
            schedule=training.schedule,
            warmup=warmup,
            grad_clip=training.grad_clip,
            save_interval=1000,
            evaluation_interval=0,
            max_nonfinite_steps=2,
        ),
        compute=Compute(torch.device("cpu"), torch.float32 if training.dtype == "float32" else torch.bfloat16),
        warm_start=WarmStart(case.quantization_lambda, 1.0),
        teacher=teacher,
    )


def case_workload(case: Case, config: RunConfig) -> Workload:
    """The estimator's view of the case."""
    return workload_of(
        config,
        device=DEVICE_KINDS["cpu_2_cores"],
        devices=1,
        target_share=case.target_share,
        documents_a_row=case.documents_a_row,
    )


def measure(case: Case) -> Outcome:
    """Run the case in this process."""
    config, _ = compose(list(case.overrides))
    workload = case_workload(case, config)
    estimate = peak_of_run(workload, warms_up=case.quantization_lambda < 1)
    keep_large_buffers()  # as a run does
    warm_up = replace(case, overrides=(*case.overrides, *_SMALLEST))
    build_trainer(warm_up, compose(list(warm_up.overrides)).config).train_step()  # loads what any step needs
    gc.collect()
    before = _status_bytes("VmRSS")
    trainer = build_trainer(case, config)
    trainer.train_step()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
    started = time.process_time()
    trainer.train_step()
    seconds = time.process_time() - started
    resident = _status_bytes("VmHWM") - before
    allocated = _allocated_peak(trainer)
    return Outcome(
        estimated=estimate.total,
        moment=estimate.moment,
        allocated=allocated,
        resident=resident,
        parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
        flops=step_flops(workload) / seconds,
    )


def _allocated_peak(trainer: Trainer) -> int:
    """Bytes of live tensors before a step, plus the largest running sum of the allocator's events in it."""
    warmups = trainer.warmups_at(trainer.progress.step)
    set_quantization(trainer.model, warmups.quantization_lambda)  # as the step begins: forgets the old codes
    gc.collect()
    held = _live_bytes(trainer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train_step()
    results: Any = profiler.profiler
    events = results.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    current = peak = 0
    for _, change in changes:
        current += change
        peak = max(peak, current)
    return held + peak


def _live_bytes(trainer: Trainer) -> int:
    tensors: list[Tensor] = [*trainer.model.parameters(), *trainer.model.buffers()]
    if trainer.teacher is not None:
        tensors += [*trainer.teacher.model.parameters(), *trainer.teacher.model.buffers()]
    tensors += [v for state in trainer.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def row(name: str, outcome: Outcome) -> str:
    """A line of the table."""
    off = outcome.estimated / outcome.allocated - 1
    verdict = "" if abs(off) <= TOLERANCE else " **miss**"
    resident = outcome.estimated / outcome.resident - 1
    return (
        f"| {name} | {outcome.parameters / 1e6:.1f} M | {outcome.estimated / MIB:.0f} | {outcome.allocated / MIB:.0f} | "
        f"{off:+.1%}{verdict} | {outcome.resident / MIB:.0f} | {resident:+.1%} | {outcome.moment} | "
        f"{outcome.flops / 1e9:.0f} |"
    )


HEADER = (
    "| case | parameters | estimated MiB | allocated MiB | estimate off | resident MiB | estimate off | peak at | "
    "GFLOP/s |\n|---|---|---|---|---|---|---|---|---|"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one case and write it as JSON, or all and write the table; 1 if any is a miss."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.estimator_accuracy", description=__doc__)
    parser.add_argument("--case", choices=CASES, help="measure this one in this process, and write JSON")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="some cases for the table (default: all)")
    options = parser.parse_args(argv)
    if options.case:
        sys.stdout.write(json.dumps(asdict(measure(CASES[options.case]))) + "\n")
        return 0
    misses = 0
    sys.stdout.write(HEADER + "\n")
    for name in options.cases or CASES:
        command = [sys.executable, "-m", "benchmark.estimator_accuracy", "--case", name]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            sys.stdout.write(f"| {name} | failed: {finished.stderr.strip().splitlines()[-1]} |\n")
            misses += 1
            continue
        outcome = Outcome(**json.loads(finished.stdout.strip().splitlines()[-1]))
        misses += abs(outcome.estimated / outcome.allocated - 1) > TOLERANCE
        sys.stdout.write(row(name, outcome) + "\n")
        sys.stdout.flush()
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
