"""The training loop. It knows no stage, no loss and no file format: a model, an objective, a stream and a schedule.

One step: read the micro-batches; count their targets once (and, sharded, sum the counts over ranks); set lambda and
the SubLN strength, both pure functions of the step; forward, teacher forward, objective and backward per micro-batch,
each term a sum over tokens divided by its global count, so that accumulation is exact; clip; skip the update if
anything is not finite; update. The loss, its terms and the gradient norm come to the host in one transfer.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wrinklefree.data.streams import BatchStream
from wrinklefree.distillation.objective import Objective
from wrinklefree.distillation.teacher import Teacher
from wrinklefree.models.bitlinear import set_quantization
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.models.shards import rows_here
from wrinklefree.models.subln import set_subln_strength
from wrinklefree.quantization.schedule import warmup_value
from wrinklefree.training.callbacks import Callback, RunInfo, StepReport
from wrinklefree.training.config import ScheduleConfig, WarmupConfig
from wrinklefree.training.device import Compute
from wrinklefree.training.local_shards import clip_gradients, hand_gradients_over
from wrinklefree.training.optimizers import set_learning_rate, set_weight_decay
from wrinklefree.training.schedules import learning_rate, weight_decay
from wrinklefree.training.sharded_state import (
    is_cut,
    load_model_parts,
    load_optimizer_parts,
    model_parts,
    optimizer_parts,
)
from wrinklefree.utils.checkpoint import Checkpoint, CheckpointStore
from wrinklefree.utils.distributed import largest_of_ranks, sum_over_ranks
from wrinklefree.utils.errors import CheckpointError, NonFiniteError
from wrinklefree.utils.sharded_checkpoint import SharedCheckpointStore
from wrinklefree.utils.training_state import pack_optimizer_state, restore_rng_state, rng_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerSettings:
    """The numbers of a run."""

    total_steps: int
    accumulation_steps: int
    peak_learning_rate: float
    weight_decay: float
    schedule: ScheduleConfig
    warmup: WarmupConfig
    grad_clip: float
    save_interval: int
    evaluation_interval: int
    max_nonfinite_steps: int
    saves_later: bool = False
    """Write checkpoints in a thread, from a copy in memory."""


@dataclass(frozen=True)
class WarmStart:
    """Where the input artifact's warm-ups stand; a warm-up never goes back."""

    quantization_lambda: float
    subln_strength: float


@dataclass
class Progress:
    """What the loop has done so far; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0


class Interrupted(Exception):  # noqa: N818 - a request, not an error
    """A signal asked the run to stop; the checkpoint is written."""

    def __init__(self, signal_number: int, step: int) -> None:
        """Keep the signal, which decides the exit code, and the step that was saved."""
        super().__init__(f"stopped by signal {signal_number} after step {step}")
        self.signal_number = signal_number
        self.step = step


def warmup_steps(total_steps: int, config: WarmupConfig) -> int:
    """Steps that a warm-up takes: `share` of the run, at most `max_steps`; always ends before the run does."""
    return min(config.max_steps, int(total_steps * config.share))


class Trainer:
    """`fit` trains `model` in place and returns the last report."""

    def __init__(
        self,
        *,
        model: CausalLM,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        stream: BatchStream,
        settings: TrainerSettings,
        compute: Compute,
        warm_start: WarmStart,
        teacher: Teacher | None = None,
        store: CheckpointStore | SharedCheckpointStore | None = None,
        callbacks: Sequence[Callback] = (),
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        identity: Mapping[str, str] | None = None,
        refresh_weights: Callable[[], None] | None = None,
    ) -> None:
        """Hold the parts; nothing runs before `fit`.

        `identity` is stored with, and checked against, checkpoints. `refresh_weights` is called whenever masters or
        lambda may have changed and the model is about to run.
        """
        self.model = model
        self.objective = objective
        self.optimizer = optimizer
        self.stream = stream
        self.settings = settings
        self.compute = compute
        self.warm_start = warm_start
        self.teacher = teacher
        self.store = store
        self.callbacks = callbacks
        self.evaluate = evaluate
        self.identity = dict(identity or {})
        self.refresh_weights = refresh_weights
        self.progress = Progress()
        self.last_report: StepReport | None = None
        self.stop_signal: int | None = None
        self._trainable = [p for p in model.parameters() if p.requires_grad]

    def warmups_at(self, step: int) -> WarmStart:
        """Lambda and SubLN strength of `step` (from 0); both are 1 from the end of the warm-up on.

        A strength below 1 was asked for in stage 1, so it rises linearly also where lambda has no schedule.
        """
        config, start = self.settings.warmup, self.warm_start
        steps = warmup_steps(self.settings.total_steps, config)
        strength_shape = "linear" if config.schedule == "none" and start.subln_strength < 1 else config.schedule
        return WarmStart(
            warmup_value(step, start=start.quantization_lambda, steps=steps, shape=config.schedule),
            warmup_value(step, start=start.subln_strength, steps=steps, shape=strength_shape),
        )

    def fit(self, info: RunInfo) -> None:
        """Train to the last step, from where `resume` left off.

        Raises:
            NonFiniteError: after `max_nonfinite_steps` steps in a row without a finite loss and gradient.
            Interrupted: after a signal (`stop_signal`), once the checkpoint is written.
        """
        try:
            for callback in self.callbacks:
                callback.on_start(info)
            while self.progress.step < self.settings.total_steps:
                self._step_and_after()
            self._finish_saving()
            if self.last_report is not None:
                self._validate(self.last_report)
                for callback in self.callbacks:
                    callback.on_end(self.last_report)
        finally:
            for callback in self.callbacks:
                callback.close()

    def _step_and_after(self) -> None:
        """One step; then the checkpoint, the answer to a signal, and the validation, where they are due.

        The checkpoint comes first: whatever fails or is killed after it, validation included, loses nothing.
        """
        report = self.last_report = self.train_step()
        step, settings = self.progress.step, self.settings
        for callback in self.callbacks:
            callback.on_step(report)
        last = step == settings.total_steps
        validates = (
            self.evaluate is not None and settings.evaluation_interval and step % settings.evaluation_interval == 0
        )
        # A signal may have reached some ranks only, or another one than this.
        stop_signal = int(largest_of_ranks(self.stop_signal or 0))
        if last or validates or step % settings.save_interval == 0 or stop_signal:
            self.save()
        if stop_signal:
            self._finish_saving()
            raise Interrupted(stop_signal, step)
        if validates and not last:
            self._validate(report)

    def _finish_saving(self) -> None:
        if self.store is not None:
            self.store.wait()

    def _validate(self, report: StepReport) -> None:
        if self.evaluate is not None:
            self._refresh()
            report.evaluation = self.evaluate()
            for callback in self.callbacks:
                callback.on_evaluation(report)

    def train_step(self) -> StepReport:
        """One optimizer step; see the module's docstring."""
        started = time.perf_counter()
        step = self.progress.step
        warmups = self.warmups_at(step)
        set_quantization(self.model, warmups.quantization_lambda)
        set_subln_strength(self.model, warmups.subln_strength)
        self._refresh()
        rate = learning_rate(step, self.settings.total_steps, self.settings.schedule, self.settings.peak_learning_rate)
        set_learning_rate(self.optimizer, rate)
        set_weight_decay(
            self.optimizer,
            weight_decay(step, self.settings.total_steps, self.settings.schedule, self.settings.weight_decay),
        )

        batches = [self.stream.next_batch() for _ in range(self.settings.accumulation_steps)]
        counts, tokens = self._count(batches)
        if step == 0 and self.objective.needs_calibration:
            self._calibrate(batches, counts)
        total, terms, weights = self._accumulate(batches, counts)
        if self.teacher is not None:
            self.teacher.release()
        norm = clip_gradients(self._trainable, self.settings.grad_clip)
        names = list(terms)
        norm = norm.float().to(total.device)
        grad_norm, *sums = torch.stack([norm, total, *(terms[name] for name in names)]).tolist()
        # Sums over ranks, so that all see the same step, and skip it together.
        values = [grad_norm, *sum_over_ranks(sums)]
        finite = all(value - value == 0.0 for value in values[:2])
        if finite:
            hand_gradients_over(self._trainable)
            self.optimizer.step()
            self.progress.skipped_in_a_row = 0
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - started
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.seconds += seconds
        if not finite:
            self._count_nonfinite(values[1], values[0])
        left = self.settings.total_steps - self.progress.step
        return StepReport(
            step=self.progress.step,
            total_steps=self.settings.total_steps,
            loss=values[1],
            terms=dict(zip(names, values[2:], strict=True)),
            weights=weights,
            learning_rate=rate,
            grad_norm=values[0],
            tokens=self.progress.tokens,
            tokens_per_second=tokens / seconds,
            step_seconds=seconds,
            eta_seconds=left * self.progress.seconds / self.progress.step,
            quantization_lambda=warmups.quantization_lambda,
            subln_strength=warmups.subln_strength,
            skipped=not finite,
        )

    def _refresh(self) -> None:
        if self.refresh_weights is not None:
            self.refresh_weights()

    def _count(self, batches: Sequence[Batch]) -> tuple[dict[str, float], int]:
        """The denominator of each loss term and the number of positions, over all micro-batches and ranks."""
        counts: dict[str, float] = {}
        for batch in batches:
            for name, count in self.objective.counts(batch).items():
                counts[name] = counts.get(name, 0.0) + count
        *totals, tokens = sum_over_ranks([*counts.values(), sum(batch.input_ids.numel() for batch in batches)])
        return dict(zip(counts, totals, strict=True)), int(tokens)

    def _forward(self, batch: Batch, counts: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        moved = batch.to(self.compute.device)
        with self.compute.autocast():
            teacher_output = None
            if self.teacher is not None and self.objective.teacher_wants is not None:
                teacher_output = self.teacher(moved, self.objective.teacher_wants)
            student_output = self.model(moved, self.objective.student_wants)
            losses = self.objective(student_output, teacher_output, moved, counts)
        return losses.total, losses.terms, losses.weights

    def _accumulate(
        self, batches: Sequence[Batch], counts: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """Backward of every micro-batch; the sums of totals and terms, on the device."""
        totals: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        for batch in batches:
            total, terms, weights = self._forward(batch, counts)
            total.backward()
            totals.append(total.detach().float())
            for name, value in terms.items():
                sums[name] = sums[name] + value.detach().float() if name in sums else value.detach().float()
        return torch.stack(totals).sum(), sums, weights

    def _calibrate(self, batches: Sequence[Batch], counts: Mapping[str, float]) -> None:
        """Let the objective fix its `auto` weights on the step-0 terms, before the first gradient."""
        sums: dict[str, float] = {}
        with torch.no_grad():
            for batch in batches:
                _, terms, _ = self._forward(batch, counts)
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
        self.objective.calibrate(dict(zip(sums, sum_over_ranks(list(sums.values())), strict=True)))

    def _count_nonfinite(self, loss: float, norm: float) -> None:
        self.progress.skipped_in_a_row += 1
        logger.warning(
            "step %d skipped: loss %g, gradient norm %g (%d in a row)",
            self.progress.step, loss, norm, self.progress.skipped_in_a_row,
        )  # fmt: skip
        if self.progress.skipped_in_a_row >= self.settings.max_nonfinite_steps:
            raise NonFiniteError(
                f"loss {loss:g} and gradient norm {norm:g} at step {self.progress.step}, the "
                f"{self.progress.skipped_in_a_row}th step in a row that is not finite. Lower training.lr "
                f"(now {self.settings.peak_learning_rate:g}) or training.grad_clip; the last good checkpoint is kept."
            )

    def save(self) -> None:
        """Write a resumable checkpoint of everything that decides the next step.

        Raises:
            NonFiniteError: a weight is not finite: what cannot be trained on is not kept.
        """
        if self.store is None:
            return
        self._refuse_nonfinite_weights()
        weights, optimizer_tensors, optimizer_state = self._stored_parts()
        rng_tensors, rng = rng_state()
        tensors: dict[str, Any] = {f"model.{name}": value for name, value in weights.items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors.items()}
        tensors |= {f"rng.{name}": value for name, value in rng_tensors.items()}
        state: dict[str, Any] = {
            "progress": vars(self.progress),
            "identity": self.identity,
            "optimizer": optimizer_state,
            "rng": rng,
            "stream": self.stream.state_dict(),
            "objective": self.objective.state_dict(),
            "report": None if self.last_report is None else dataclasses.asdict(self.last_report),
        }
        save = self.store.save_later if self.settings.saves_later else self.store.save
        save(self.progress.step, tensors, state)

    def _refuse_nonfinite_weights(self) -> None:
        """On every rank, or on none."""
        shards = [rows_here(parameter).local for parameter in self.model.parameters()]
        finite = [torch.isfinite(shard.sum(dtype=torch.float64)) for shard in shards if shard.numel()]
        bad, total = sum_over_ranks([sum(not bool(one) for one in torch.stack(finite).tolist()), len(finite)])
        if bad:
            raise NonFiniteError(
                f"{bad:.0f} of {total:.0f} weights of the model are not finite after step {self.progress.step}, so they are "
                f"not saved. Lower training.lr (now {self.settings.peak_learning_rate:g}); the last good checkpoint is kept."
            )

    def _stored_parts(self) -> tuple[Mapping[str, Any], Mapping[str, Any], dict[str, Any]]:
        """Weights and optimizer tensors by name, as far as they lie here, and the rest of the optimizer's state."""
        if is_cut(self.model):
            return model_parts(self.model), *optimizer_parts(self.optimizer)
        return self.model.state_dict(), *pack_optimizer_state(self.optimizer)

    def resume(self, *, allow_identity_change: bool) -> int:
        """Continue from the newest checkpoint that verifies; returns its step, 0 when there is none.

        Raises:
            CheckpointError: when all checkpoints are corrupt, or the device resolves dtype, optimizer or attention
                backend differently than when the run began.
        """
        checkpoint = self.store.latest() if self.store else None
        if checkpoint is None:
            return 0
        self._check_identity(checkpoint, allow_identity_change=allow_identity_change)
        if is_cut(self.model):
            load_model_parts(self.model, checkpoint, "model.")
        else:
            self.model.load_state_dict(_below("model.", checkpoint), strict=True)
        load_optimizer_parts(self.optimizer, checkpoint, "optimizer.", checkpoint.state["optimizer"])
        restore_rng_state(_below("rng.", checkpoint), checkpoint.state["rng"])
        self.stream.load_state_dict(checkpoint.state["stream"])
        self.objective.load_state_dict(checkpoint.state["objective"])
        self.progress = Progress(**checkpoint.state["progress"])
        report = checkpoint.state["report"]
        self.last_report = None if report is None else StepReport(**report)
        return self.progress.step

    def _check_identity(self, checkpoint: Checkpoint, *, allow_identity_change: bool) -> None:
        before = checkpoint.state["identity"]
        changed = [f"{key} {before.get(key)} -> {now}" for key, now in self.identity.items() if before.get(key) != now]
        if changed and not allow_identity_change:
            raise CheckpointError(
                f"the run was begun with another set-up ({'; '.join(changed)}), so it cannot be continued bit by bit. "
                "Continue anyway with resume.allow_device_change=true, or start fresh with skip_recovery=true."
            )


def _below(prefix: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): checkpoint.tensors[name] for name in checkpoint.tensors if name.startswith(prefix)
    }
