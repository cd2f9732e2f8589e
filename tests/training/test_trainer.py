"""The loop: exact accumulation, bit-identical resume, guards. A small model on rows that a seed decides."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wrinklefree.distillation.combined_loss import language_model_objective
from wrinklefree.models.bitlinear import quantization_of
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import IGNORE, Batch
from wrinklefree.models.subln import subln_strength_of
from wrinklefree.training.callbacks import Callback, RunInfo, StepReport
from wrinklefree.training.config import OptimizerConfig, ScheduleConfig, WarmupConfig
from wrinklefree.training.device import Compute
from wrinklefree.training.optimizers import build_optimizer
from wrinklefree.training.trainer import Interrupted, Trainer, TrainerSettings, WarmStart
from wrinklefree.utils.checkpoint import CheckpointStore
from wrinklefree.utils.errors import CheckpointError, NonFiniteError

ARCHITECTURE = Architecture(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
TERNARY = BitNetSpec(placement="output", gain="ones", quantization_lambda=0.0, subln_strength=0.0)
CPU = Compute(torch.device("cpu"), torch.float32)
LENGTH = 12


class SeededStream:
    """Rows drawn from their number, with uneven masks, so that micro-batches have different target counts."""

    batches_per_epoch = None
    padding_share = 0.0

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.served = 0

    @property
    def tokens_per_batch(self) -> int:
        return self.rows * LENGTH

    def next_batch(self) -> Batch:
        ids, labels = [], []
        for _ in range(self.rows):
            generator = torch.Generator().manual_seed(self.served)
            ids.append(torch.randint(0, 64, (LENGTH,), generator=generator))
            targets = torch.randint(0, 64, (LENGTH,), generator=generator)
            targets[: self.served % LENGTH] = IGNORE
            labels.append(targets)
            self.served += 1
        shape = (self.rows, LENGTH)
        return Batch(
            torch.stack(ids),
            torch.stack(labels),
            torch.arange(LENGTH).expand(shape),
            torch.ones(shape, dtype=torch.long),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.served = state["served"]


def make_trainer(
    *,
    rows: int = 2,
    accumulation: int = 1,
    steps: int = 8,
    folder: Path | None = None,
    bitnet: BitNetSpec | None = TERNARY,
    optimizer: str = "adamw",
    warmup: WarmupConfig = WarmupConfig(schedule="linear", share=0.5),
    **parts: Any,
) -> Trainer:
    torch.manual_seed(0)
    model = CausalLM(ARCHITECTURE, bitnet)
    start = WarmStart(bitnet.quantization_lambda, bitnet.subln_strength) if bitnet else WarmStart(1.0, 1.0)
    return Trainer(
        model=model,
        objective=language_model_objective(),
        optimizer=build_optimizer(model, optimizer, OptimizerConfig(), 1e-2),
        stream=SeededStream(rows),
        settings=TrainerSettings(
            total_steps=steps,
            accumulation_steps=accumulation,
            peak_learning_rate=1e-2,
            weight_decay=0.01,
            schedule=ScheduleConfig(),
            warmup=warmup,
            grad_clip=1.0,
            save_interval=1000,
            evaluation_interval=0,
            max_nonfinite_steps=2,
        ),
        compute=CPU,
        warm_start=start,
        store=CheckpointStore(folder, 2) if folder else None,
        **parts,
    )


def info(trainer: Trainer, folder: Path) -> RunInfo:
    return RunInfo("stage2", folder, trainer.settings.total_steps, trainer.progress.step)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_bit_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Gradients of the first step's objective, before clipping."""
    batches = [trainer.stream.next_batch() for _ in range(trainer.settings.accumulation_steps)]
    counts: dict[str, float] = {}
    for batch in batches:
        for name, count in trainer.objective.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + count
    trainer._accumulate(batches, counts)
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def test_accumulation_is_exact_with_uneven_masks() -> None:
    whole = gradients(make_trainer(rows=16))
    parts = gradients(make_trainer(rows=4, accumulation=4))
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stop_at", [1, 3, 5, 7])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "apollo_mini"])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, stop_at: int, optimizer: str) -> None:
    straight = make_trainer(accumulation=2, optimizer=optimizer)
    straight.fit(info(straight, tmp_path))

    class StopAt(Callback):
        def on_step(self, report: StepReport) -> None:
            if report.step == stop_at:
                first.stop_signal = 15

    first = make_trainer(accumulation=2, optimizer=optimizer, folder=tmp_path / "c", callbacks=[StopAt()])
    with pytest.raises(Interrupted, match=f"signal 15 after step {stop_at}"):
        first.fit(info(first, tmp_path))
    second = make_trainer(accumulation=2, optimizer=optimizer, folder=tmp_path / "c")
    assert second.resume(allow_identity_change=False) == stop_at
    second.fit(info(second, tmp_path))
    assert_bit_equal(weights(second), weights(straight))
    assert second.progress.tokens == straight.progress.tokens == 8 * 2 * 2 * LENGTH


def test_warm_ups_end_at_one_and_never_go_back(tmp_path: Path) -> None:
    trainer = make_trainer(steps=10)
    values = [trainer.warmups_at(step) for step in range(10)]
    assert values[0] == WarmStart(0.0, 0.0)
    assert all(a.quantization_lambda <= b.quantization_lambda for a, b in zip(values, values[1:], strict=False))
    assert values[5] == values[9] == WarmStart(1.0, 1.0)
    done = make_trainer(bitnet=TERNARY.model_copy(update={"quantization_lambda": 1.0, "subln_strength": 1.0}))
    assert done.warmups_at(0) == WarmStart(1.0, 1.0)
    trainer.fit(info(trainer, tmp_path))
    assert quantization_of(trainer.model) == subln_strength_of(trainer.model) == 1.0


def test_without_a_warm_up_the_model_is_ternary_from_the_first_step() -> None:
    inserted = TERNARY.model_copy(update={"subln_strength": 1.0})
    trainer = make_trainer(bitnet=inserted, warmup=WarmupConfig(schedule="none"))
    assert trainer.warmups_at(0) == WarmStart(1.0, 1.0)


def test_a_strength_that_stage_1_left_at_0_rises_even_where_lambda_has_no_schedule() -> None:
    trainer = make_trainer(steps=10, warmup=WarmupConfig(schedule="none", share=0.5))
    assert [trainer.warmups_at(step).subln_strength for step in (0, 1, 5)] == pytest.approx([0.0, 0.2, 1.0])
    assert trainer.warmups_at(0).quantization_lambda == 1.0


@pytest.mark.parametrize("stop_at", [4, 8])
def test_a_signal_is_obeyed_and_the_resumed_run_still_validates(tmp_path: Path, stop_at: int) -> None:
    """Also when it comes during the last step: the run stops after its checkpoint, before validation."""
    seen: list[int] = []

    class StopAt(Callback):
        def on_step(self, report: StepReport) -> None:
            if report.step == stop_at:
                first.stop_signal = 15

        def on_evaluation(self, report: StepReport) -> None:
            seen.append(report.step)

    parts: dict[str, Any] = {"folder": tmp_path / "c", "callbacks": [StopAt()], "evaluate": lambda: {"score": 1.0}}
    first = make_trainer(**parts)
    with pytest.raises(Interrupted):
        first.fit(info(first, tmp_path))
    assert seen == []
    second = make_trainer(**parts)
    assert second.resume(allow_identity_change=False) == stop_at
    second.fit(info(second, tmp_path))
    assert seen == [8]


def test_a_validation_that_fails_loses_no_step(tmp_path: Path) -> None:
    def broken() -> dict[str, float]:
        raise RuntimeError("no memory for logits")

    first = make_trainer(folder=tmp_path / "c", evaluate=broken)
    with pytest.raises(RuntimeError, match="no memory"):
        first.fit(info(first, tmp_path))
    assert make_trainer(folder=tmp_path / "c").resume(allow_identity_change=False) == 8


class Broken:
    """Wraps an objective; its loss is multiplied by NaN, or another value, at the steps given."""

    def __init__(self, at: Callable[[int], bool], factor: float = math.nan) -> None:
        self.inner = language_model_objective()
        self.at = at
        self.factor = factor
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *arguments: Any) -> Any:
        losses = self.inner(*arguments)
        broken = self.at(self.calls)
        self.calls += 1
        return type(losses)(losses.total * self.factor, losses.terms, losses.weights) if broken else losses


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.objective = Broken(lambda call: call == 1)
    trainer.train_step()
    before = weights(trainer)
    assert trainer.train_step().skipped
    assert_bit_equal(before, weights(trainer))
    assert not trainer.train_step().skipped
    assert trainer.progress.skipped_in_a_row == 0


def test_the_run_aborts_after_too_many_such_steps(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.objective = Broken(lambda call: call >= 1)
    with pytest.raises(NonFiniteError, match=r"at step 3, the 2th step in a row.*Lower training\.lr"):
        trainer.fit(info(trainer, tmp_path))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["loss", "gradient", "weight", "saved weight"])
def test_what_is_not_finite_never_reaches_a_checkpoint(
    place: str, value: float, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Once: the step is skipped. For good: the run ends, and the checkpoint of before is the newest."""
    trainer = make_trainer(folder=tmp_path / "c", steps=6)
    weight = next(iter(trainer.model.parameters()))
    trainer.train_step()
    trainer.save()
    before = weights(trainer)
    if place == "loss":
        trainer.objective = Broken(lambda call: call == 0, value)
    elif place == "gradient":
        hook = weight.register_hook(lambda gradient: gradient * value)
    elif place == "weight":
        with torch.no_grad():
            weight.view(-1)[3] = value
    if place == "saved weight":
        with torch.no_grad():
            weight.view(-1)[3] = value
        with pytest.raises(NonFiniteError, match=r"1 of \d+ weights .* step 1"):
            trainer.save()
    elif place == "weight":
        with pytest.raises(NonFiniteError, match="at step 3, the 2th step in a row"):
            trainer.fit(info(trainer, tmp_path))
    else:
        assert trainer.train_step().skipped
        assert_bit_equal(before, weights(trainer))
        if place == "gradient":
            hook.remove()
        assert not trainer.train_step().skipped
    found = CheckpointStore(tmp_path / "c", 2).latest()
    assert found is not None
    assert found.step == 1
    assert_bit_equal(before, {name: found.tensors[f"model.{name}"] for name in before})
    record_property("nonfinite_values", 1)


def test_another_device_set_up_is_refused_unless_told(tmp_path: Path) -> None:
    first = make_trainer(folder=tmp_path / "c", identity={"dtype": "bfloat16"})
    first.train_step()
    first.save()
    second = make_trainer(folder=tmp_path / "c", identity={"dtype": "float32"})
    with pytest.raises(CheckpointError, match=r"dtype bfloat16 -> float32.*resume\.allow_device_change=true"):
        second.resume(allow_identity_change=False)
    assert second.resume(allow_identity_change=True) == 1


def test_the_loss_falls(tmp_path: Path) -> None:
    losses: list[float] = []

    class Watch(Callback):
        def on_step(self, report: StepReport) -> None:
            losses.append(report.loss)

    class SameRows(SeededStream):
        def next_batch(self) -> Batch:
            self.served = 0
            return super().next_batch()

    trainer = make_trainer(steps=30, callbacks=[Watch()])
    trainer.stream = SameRows(2)
    trainer.fit(info(trainer, tmp_path))
    assert losses[-1] < 0.5 * losses[0]
