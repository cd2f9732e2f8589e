"""Do 1, 2, 3 and 4 processes train the same model? Every stage, every optimizer, the same global batch.

    uv run python -m benchmark.sharded_equality [--stages stage2,...] [--optimizers adamw,...] [--worlds 2,3,4]

First table, each number of processes against one:

- gradients of the first step, float32: largest difference of any parameter, relative to that parameter's largest
  gradient; the bar is 1e-6.
- losses over 50 steps in float64 throughout: the bar is 1e-9. Every operation that our code does in float32 is done in
  float64 (`Float64`), so what is compared is the algorithm and not the rounding.
- losses over 50 steps in float32. Ternary codes flip at their thresholds, so a float32 run is one of a bundle: that of one
  process and of six whose initial weights were moved by 1e-7. The median distance of the sharded run from the bundle
  must not exceed the largest distance inside it.

Second table, largest relative difference of any weight at the end of a run, in float64 unless said otherwise; the bar is
1e-9, and 0 for the first:

- begun on two processes, saved half-way, ended on two, in float32: to the bit.
- begun on two, ended on one and on four.
- eight micro-batches of one row against one of eight.

8-bit AdamW has no float64 form: of it the first table shows the float32 columns, and the second only the run that ends
on as many processes as began it, since another number refuses its state. It is on a bed whose shards hold whole blocks
of that state.

The processes are on this machine, over gloo. The beds and the process pool below also serve the tests.
"""

import argparse
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from wrinklefree.distillation.combined_loss import language_model_objective, layerwise_objective, stage3_objective
from wrinklefree.distillation.config import DistillationConfig, LayerwiseConfig
from wrinklefree.distillation.objective import Objective
from wrinklefree.distillation.teacher import Teacher
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM, Checkpointing
from wrinklefree.models.records import IGNORE, Batch
from wrinklefree.models.shards import whole
from wrinklefree.quantization import cpu_kernels
from wrinklefree.training.config import (
    DistributedConfig,
    OptimizerConfig,
    ScheduleConfig,
    WarmupConfig,
)
from wrinklefree.training.device import Compute
from wrinklefree.training.muon import ShardedMuon
from wrinklefree.training.optimizers import OptimizerType, build_optimizer
from wrinklefree.training.rank_share import RankShare
from wrinklefree.training.trainer import Trainer, TrainerSettings, WarmStart
from wrinklefree.utils.checkpoint import CheckpointStore
from wrinklefree.utils.distributed import rank, world_size
from wrinklefree.utils.sharded_checkpoint import SharedCheckpointStore

ARCHITECTURE = Architecture(
    family="llama",
    vocab_size=96,
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
"""24 and 36 rows divide by 2, 3 and 4; 12 (keys, values) too; 96 rows of the embedding as well."""
WIDE = ARCHITECTURE.model_copy(
    update={
        "vocab_size": 128,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "head_dim": 32,
    }
)
"""Every matrix's quarter is at least 4096 elements in whole blocks of 256: what 8-bit AdamW keeps in 8 bits."""
LENGTH = 12
ROWS = 8
"""Rows of a step."""

BedStage = Literal["fp_pretrain", "stage1_9", "stage2", "stage3", "bitnet_sft"]
STAGES: tuple[BedStage, ...] = ("fp_pretrain", "stage1_9", "stage2", "stage3", "bitnet_sft")


@dataclass(frozen=True)
class Bed:
    """One run on synthetic rows."""

    stage: BedStage = "stage2"
    optimizer: OptimizerType = "adamw"
    steps: int = 1
    total_steps: int | None = None
    """Length of the schedule; None: `steps`."""
    accumulation: int = 1
    """Batches of the stream that make the step's rows."""
    rows: int = ROWS
    double: bool = False
    """All arithmetic in float64."""
    bfloat16: bool = False
    architecture: Architecture = ARCHITECTURE
    warmup: bool = True
    """Begin at lambda 0 and strength 0 and rise over half of the run; otherwise fully quantized at once."""
    perturbation: float = 0.0
    """Standard deviation of a relative change of the initial weights."""
    perturbation_seed: int = 0
    checkpointing: Checkpointing = "off"
    distributed: DistributedConfig = field(default_factory=lambda: DistributedConfig(name="bed", strategy="fsdp"))
    folder: str | None = None
    """Where checkpoints go; a run continues from the newest one there."""
    save_interval: int = 1000
    asynchronous: bool = False
    learning_rate: float = 1e-2
    iteration_dtype: torch.dtype = torch.float32
    """Muon's; float64 where everything is."""


@dataclass(frozen=True)
class Outcome:
    """What a run left, the same on every rank."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    """Of the first step of this process, before clipping, whole; empty unless asked for."""
    weights: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


class SeededRows:
    """Rows drawn from their number, with uneven masks and two documents each."""

    batches_per_epoch = None
    padding_share = 0.0

    def __init__(self, rows: int, vocabulary: int) -> None:
        """Draw `rows` a batch."""
        self.rows, self.vocabulary = rows, vocabulary
        self.served = 0

    @property
    def tokens_per_batch(self) -> int:
        """See `BatchStream`."""
        return self.rows * LENGTH

    def next_batch(self) -> Batch:
        """See `BatchStream`."""
        return Batch(*(torch.stack(parts) for parts in zip(*(self._row() for _ in range(self.rows)), strict=True)))

    def _row(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(self.served)
        ids = torch.randint(0, self.vocabulary, (LENGTH,), generator=generator)
        labels = torch.randint(0, self.vocabulary, (LENGTH,), generator=generator)
        labels[: self.served % (LENGTH - 2)] = IGNORE
        cut = 3 + self.served % 6
        position = torch.arange(LENGTH)
        self.served += 1
        return ids, labels, torch.where(position < cut, position, position - cut), 1 + (position >= cut).long()

    def state_dict(self) -> dict[str, Any]:
        """See `BatchStream`."""
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `BatchStream`."""
        self.served = state["served"]


class Float64(TorchFunctionMode):
    """Does in float64 whatever is asked for in float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` with every float32 replaced."""
        if func is Tensor.float:
            func = Tensor.double
        widened = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*widened, **named)


@contextmanager
def float64() -> Iterator[None]:
    """`Float64`, without the C kernels: they have no such type."""
    with Float64(), patch.object(cpu_kernels, "has_kernels", lambda: False):
        yield


def build(bed: Bed, device: torch.device | None = None) -> tuple[Trainer, Callable[[], None]]:
    """The trainer of a bed on this rank, and what must be called before its model runs."""
    torch.manual_seed(0)
    ternary = bed.stage not in {"fp_pretrain"}
    start = 0.0 if bed.warmup else 1.0
    spec = BitNetSpec(placement="output", gain="ones", quantization_lambda=start, subln_strength=start)
    model = CausalLM(bed.architecture, spec if ternary else None)
    teacher_model = CausalLM(bed.architecture) if bed.stage in {"stage1_9", "stage3"} else None
    if bed.perturbation:
        generator = torch.Generator().manual_seed(1 + bed.perturbation_seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + bed.perturbation * torch.randn(parameter.shape, generator=generator))
    if bed.double:
        model.double()
        if teacher_model is not None:
            teacher_model.double()
    device = device or torch.device("cpu")
    compute = Compute(device, torch.bfloat16 if bed.bfloat16 else torch.float32)
    model.to(device).train()
    if teacher_model is not None:
        teacher_model.to(device)
    model.activation_checkpointing = bed.checkpointing
    refresh: Callable[[], None] | None = None
    if world_size() > 1:
        from wrinklefree.training.fsdp_wrapper import shard, sharding_for

        sharding = sharding_for(bed.distributed, compute)
        if bed.double:
            sharding = replace(sharding, compute_dtype=torch.float64)
        codes = shard(model, sharding)
        refresh = None if codes is None else codes.update
        if teacher_model is not None:
            teacher_model.requires_grad_(False)
            shard(teacher_model, sharding)
    stream: Any = SeededRows(bed.rows // bed.accumulation, bed.architecture.vocab_size)
    micro_batches = bed.accumulation
    if world_size() > 1:
        stream = RankShare(
            stream, accumulation_steps=bed.accumulation, rows=stream.rows, rank=rank(), world_size=world_size()
        )
        micro_batches = stream.micro_batches
    trainer = Trainer(
        model=model,
        objective=_objective(bed),
        optimizer=build_optimizer(model, bed.optimizer, OptimizerConfig(rank=4), bed.learning_rate, seed=3),
        stream=stream,
        settings=TrainerSettings(
            total_steps=bed.total_steps or bed.steps,
            accumulation_steps=micro_batches,
            peak_learning_rate=bed.learning_rate,
            weight_decay=0.01,
            schedule=ScheduleConfig(),
            warmup=WarmupConfig(schedule="linear" if bed.warmup else "none", share=0.5),
            grad_clip=1.0,
            save_interval=bed.save_interval,
            evaluation_interval=0,
            max_nonfinite_steps=2,
            saves_later=bed.asynchronous,
        ),
        compute=compute,
        warm_start=WarmStart(start, start) if ternary else WarmStart(1.0, 1.0),
        teacher=None if teacher_model is None else Teacher(teacher_model),
        store=None if bed.folder is None else open_store(Path(bed.folder)),
        refresh_weights=refresh,
    )
    for part in getattr(trainer.optimizer, "parts", []):
        if isinstance(part, ShardedMuon):
            part._iteration_dtype = torch.float64 if bed.double else bed.iteration_dtype
    return trainer, trainer._refresh


def open_store(folder: Path) -> CheckpointStore | SharedCheckpointStore:
    """The checkpoints in a folder, for this group of processes."""
    if world_size() == 1:
        return CheckpointStore(folder, 100)
    return SharedCheckpointStore(CheckpointStore(folder, 100) if rank() == 0 else None)


def _objective(bed: Bed) -> Objective:
    match bed.stage:
        case "stage1_9":
            return layerwise_objective(LayerwiseConfig(lm_loss_weight=0.5), bed.architecture)
        case "stage3":
            config = DistillationConfig.model_validate(
                {"name": "bed", "attention": {"relation_heads": 2}, "gamma_attention": "auto", "preset": "paper"}
            )
            return stage3_objective(config, bed.architecture, bed.architecture)
        case _:
            return language_model_objective()


def train(bed: Bed, with_gradients: bool = False) -> Outcome:
    """Run a bed on this rank; every rank at once."""
    torch.set_num_threads(1)
    if bed.double:
        torch.set_default_dtype(torch.float64)
    try:
        with float64() if bed.double else nullcontext():
            return _train(bed, with_gradients)
    finally:
        torch.set_default_dtype(torch.float32)


def train_all(beds: Sequence[Bed], with_gradients: bool = False) -> list[Outcome]:
    """`train` of each, one after the other."""
    return [train(bed, with_gradients) for bed in beds]


def _train(bed: Bed, with_gradients: bool) -> Outcome:
    trainer, _ = build(bed)
    gradients: dict[str, Tensor] = {}
    if with_gradients:
        gradients = _first_gradients(trainer)
        trainer, _ = build(bed)
    resumed = trainer.resume(allow_identity_change=False)
    losses, norms = [], []
    while trainer.progress.step < bed.steps:
        report = trainer.last_report = trainer.train_step()
        losses.append(report.loss)
        norms.append(report.grad_norm)
        if trainer.progress.step % bed.save_interval == 0:
            trainer.save()
    if trainer.store is not None:
        trainer.store.wait()
    if world_size() > 1:
        from wrinklefree.training.fsdp_wrapper import reshard

        reshard(trainer.model)
    weights = {name: whole(parameter).clone() for name, parameter in trainer.model.named_parameters()}
    return Outcome(losses, norms, gradients, weights, {"resumed": resumed})


def _first_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Whole gradients of the first step's loss, before clipping."""
    from wrinklefree.models.bitlinear import set_quantization
    from wrinklefree.models.subln import set_subln_strength

    warmups = trainer.warmups_at(0)
    set_quantization(trainer.model, warmups.quantization_lambda)
    set_subln_strength(trainer.model, warmups.subln_strength)
    trainer._refresh()
    batches = [trainer.stream.next_batch() for _ in range(trainer.settings.accumulation_steps)]
    counts, _ = trainer._count(batches)
    if trainer.objective.needs_calibration:
        trainer._calibrate(batches, counts)
    trainer._accumulate(batches, counts)
    return {name: whole(p.grad) for name, p in trainer.model.named_parameters() if p.grad is not None}


class Ranks:
    """Processes that stay, so that many short jobs pay for one start-up: `run(world, function, *arguments)`."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        """Start `size` processes that talk through `backend`."""
        import torch.multiprocessing as multiprocessing

        context = multiprocessing.get_context("spawn")
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, backend), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 240.0) -> list[Any]:
        """Results of `function(*arguments)` by rank, in a group of `world` processes (none for 1).

        Raises:
            RuntimeError: a rank failed; holds its traceback.
        """
        with tempfile.TemporaryDirectory() as folder:
            for number, pipe in enumerate(self._pipes[:world]):
                pipe.send((number, world, folder, function, arguments))
            replies = []
            for number, pipe in enumerate(self._pipes[:world]):
                if not pipe.poll(timeout):
                    raise RuntimeError(f"rank {number} did not answer within {timeout:g} s")
                replies.append(pipe.recv())
        failed = [f"rank {number}:\n{text}" for number, (ok, text) in enumerate(replies) if not ok]
        if failed:
            raise RuntimeError("\n".join(failed))
        return [value for _, value in replies]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _serve(pipe: Any, backend: str) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            number, world, folder, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            with _Group(number, world, folder, backend):
                value = function(*arguments)
            reply: tuple[bool, Any] = (True, value)
        except BaseException:  # noqa: BLE001 - it goes to the caller
            reply = (False, traceback.format_exc())
        pipe.send(reply)


class _Group:
    """A process group for one job; nothing where there is one process."""

    def __init__(self, number: int, world: int, folder: str, backend: str) -> None:
        self.number, self.world, self.folder, self.backend = number, world, folder, backend

    def __enter__(self) -> None:
        if self.world > 1:
            torch.distributed.init_process_group(
                self.backend, init_method=f"file://{self.folder}/rendezvous", rank=self.number, world_size=self.world
            )

    def __exit__(self, *error: object) -> None:
        if self.world > 1:
            torch.distributed.destroy_process_group()


def relative_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Largest |a - b| of any tensor, relative to the largest |b| in the same tensor."""
    if a.keys() != b.keys():
        raise ValueError(f"different names: {sorted(a.keys() ^ b.keys())}")
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-30)) for name in a)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description="Compare 1, 2, 3 and 4 processes.")
    parser.add_argument("--stages", default=",".join(STAGES), help="with adamw; empty for none")
    parser.add_argument("--optimizers", default="muon,apollo,apollo_mini,adamw_8bit", help="of stage 2; empty for none")
    parser.add_argument("--worlds", default="2,3,4", help="numbers of processes in the first table")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--moved", type=int, default=6, help="runs from weights moved by 1e-7")
    options = parser.parse_args(arguments)
    worlds = [int(number) for number in options.worlds.split(",")]
    beds = [Bed(stage=stage) for stage in options.stages.split(",") if stage]
    beds += [
        Bed(optimizer=name, architecture=WIDE if name == "adamw_8bit" else ARCHITECTURE)
        for name in options.optimizers.split(",")
        if name
    ]
    ranks = Ranks(max(4, *worlds))
    missed = 0
    try:
        for heading, rows in (
            (HEADING, lambda bed: _rows(ranks, bed, worlds, options.steps, options.moved)),
            (SECOND_HEADING, lambda bed: _interrupted_row(ranks, bed, options.steps)),
        ):
            sys.stdout.write(f"{heading}\n")
            for bed in beds:
                for line, failed in rows(bed):
                    sys.stdout.write(f"{line}{'  MISSED' if failed else ''}\n")
                    sys.stdout.flush()
                    missed += failed
    finally:
        ranks.close()
    return 1 if missed else 0


HEADING = (
    f"{'stage':12} {'optimizer':11} {'ranks':>5} {'gradients':>10} {'float64 loss':>13} {'float32 loss':>13} "
    f"{'inside bundle':>14}"
)
SECOND_HEADING = f"\n{'stage':12} {'optimizer':11} {'2 -> 2':>10} {'2 -> 1':>10} {'2 -> 4':>10} {'8x1 = 1x8':>10}"


def _rows(ranks: Ranks, bed: Bed, worlds: Sequence[int], steps: int, moved: int) -> Iterator[tuple[str, bool]]:
    """A line for each number of processes, and whether it misses a bar."""
    long = replace(bed, steps=steps)
    in_float64 = bed.optimizer != "adamw_8bit"
    beds = [bed, long, *([replace(long, double=True)] if in_float64 else [])]
    first, single, *double = ranks.run(1, _first_with_gradients, beds)[0]
    others = [replace(long, perturbation=1e-7, perturbation_seed=seed) for seed in range(moved)]
    bundle = [single.losses, *(outcome.losses for outcome in ranks.run(1, train_all, others)[0])]
    inside = max(_largest_gap(a, b) for number, a in enumerate(bundle) for b in bundle[:number])
    for world in worlds:
        if not in_float64 and world == 3:
            continue  # 128 rows do not divide by three, so blocks of 256 elements would straddle the ranks
        gradients, in_single, *in_double = ranks.run(world, _first_with_gradients, beds)[0]
        gradient = relative_difference(gradients.gradients, first.gradients)
        outside = statistics.median(_largest_gap(in_single.losses, member) for member in bundle)
        gaps = [_largest_gap(a.losses, b.losses) for a, b in zip(in_double, double, strict=True)]
        shown = f"{gaps[0]:13.1e}" if gaps else f"{'-':>13}"
        line = f"{bed.stage:12} {bed.optimizer:11} {world:5d} {gradient:10.1e} {shown} {outside:13.1e} {inside:14.1e}"
        yield line, gradient > 1e-6 or any(gap > 1e-9 for gap in gaps) or outside > inside


def _interrupted_row(ranks: Ranks, bed: Bed, steps: int) -> Iterator[tuple[str, bool]]:
    """The line of the second table, and whether it misses a bar."""
    long = replace(bed, steps=steps)
    exact = replace(long, double=bed.optimizer != "adamw_8bit")
    on_two, exact_on_two = ranks.run(2, train_all, [long, exact])[0]
    same = relative_difference(interrupted(ranks, long, 2, 2).weights, on_two.weights)
    if not exact.double:
        # Its state comes back for as many processes as wrote it, and rounding to 8 bits is no algorithm to compare.
        yield f"{bed.stage:12} {bed.optimizer:11} {same:10.1e} {'refused':>10} {'refused':>10} {'-':>10}", same != 0
        return
    others = [relative_difference(interrupted(ranks, exact, 2, then).weights, exact_on_two.weights) for then in (1, 4)]
    one_batch, eight_batches = ranks.run(1, train_all, [exact, replace(exact, accumulation=ROWS)])[0]
    others.append(relative_difference(eight_batches.weights, one_batch.weights))
    cells = " ".join(f"{value:10.1e}" for value in (same, *others))
    yield f"{bed.stage:12} {bed.optimizer:11} {cells}", same != 0 or max(others) > 1e-9


def interrupted(ranks: Ranks, bed: Bed, first: int, then: int) -> Outcome:
    """`bed` begun on `first` processes, saved half-way and ended on `then`."""
    with tempfile.TemporaryDirectory() as folder:
        half = bed.steps // 2
        bed = replace(bed, folder=folder, save_interval=half, total_steps=bed.steps)
        ranks.run(first, train, replace(bed, steps=half))
        outcome: Outcome = ranks.run(then, train, bed)[0]
    if outcome.facts["resumed"] != half:
        raise RuntimeError(f"the run resumed at step {outcome.facts['resumed']}, not {half}")
    return outcome


def _first_with_gradients(beds: Sequence[Bed]) -> list[Outcome]:
    """Gradients of the first, runs of the others."""
    return [train(bed, with_gradients=number == 0) for number, bed in enumerate(beds)]


def _largest_gap(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    # Under its own name: the processes of the pool must find what is sent to them.
    from benchmark.sharded_equality import main as run

    sys.exit(run())
