"""Blocks of the vocabulary against dense logits: values, gradients, masks, dtypes, and what they hold."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from wrinklefree.distillation import logit_rows, vocabulary_blocks
from wrinklefree.distillation.head_losses import HeadLosses, SoftTargets, head_losses
from wrinklefree.models.records import IGNORE

ROWS, HIDDEN, TEACHER_HIDDEN, VOCABULARY = 37, 12, 20, 9001  # ragged blocks both ways


@pytest.fixture(autouse=True, params=["logits kept", "logits made twice", "without C"])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways on every machine: which one a machine takes depends on its products, and on the library."""
    kept = 0 if request.param == "logits made twice" else 13
    if request.param == "without C":
        monkeypatch.setattr(logit_rows, "has_kernels", lambda: False)
    monkeypatch.setattr(vocabulary_blocks, "rows_to_keep", lambda *_given: kept)
    monkeypatch.setattr(vocabulary_blocks, "BLOCK_ROWS", 16)
    monkeypatch.setattr(vocabulary_blocks, "BLOCK_WORDS", 700)


class Inputs:
    def __init__(self, seed: int = 0, rows: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(rows, HIDDEN, generator=generator).requires_grad_()
        self.head = torch.randn(VOCABULARY, HIDDEN, generator=generator).requires_grad_()
        self.labels = torch.randint(0, VOCABULARY, (rows,), generator=generator)
        self.labels[::3] = IGNORE
        self.teacher_hidden = torch.randn(rows, TEACHER_HIDDEN, generator=generator)
        self.teacher_head = torch.randn(VOCABULARY, TEACHER_HIDDEN, generator=generator)
        self.counted = torch.rand(rows, generator=generator) < 0.7

    def soft(self, temperature: float = 5.0, *, t_squared: bool = False) -> SoftTargets:
        return SoftTargets(self.teacher_hidden, self.teacher_head, self.counted, temperature, t_squared)

    def losses(self, soft: SoftTargets | None, *, labels: bool = True, chunk_rows: int | None = None) -> HeadLosses:
        return head_losses(
            self.hidden, self.head, self.labels if labels else None, soft=soft, cross_entropy_factor=0.5,
            divergence_factor=2.0, chunk_rows=chunk_rows,
        )  # fmt: skip

    def dense(self, temperature: float, scale: float) -> tuple[Tensor, Tensor]:
        logits, taught = self.hidden.double() @ self.head.double().T, self.teacher_hidden @ self.teacher_head.T
        cross_entropy = functional.cross_entropy(logits, self.labels, ignore_index=IGNORE, reduction="sum")
        divergence = functional.kl_div(
            functional.log_softmax(logits[self.counted] / temperature, -1),
            functional.log_softmax(taught[self.counted].double() / temperature, -1),
            reduction="sum",
            log_target=True,
        )
        return cross_entropy, divergence * scale


@pytest.mark.parametrize(("temperature", "t_squared"), [(1.0, False), (5.0, False), (5.0, True)])
def test_values_and_gradients_equal_dense_ones(temperature: float, t_squared: bool) -> None:
    inputs = Inputs()
    cross_entropy, divergence = inputs.dense(temperature, temperature**2 if t_squared else 1.0)
    expected = torch.autograd.grad(3.0 * (0.5 * cross_entropy + 2.0 * divergence), [inputs.hidden, inputs.head])
    losses = inputs.losses(inputs.soft(temperature, t_squared=t_squared))
    got = torch.autograd.grad(3.0 * losses.total, [inputs.hidden, inputs.head])
    torch.testing.assert_close(losses.cross_entropy, cross_entropy.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.divergence, divergence.float(), rtol=1e-5, atol=0)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).abs().max() / theirs.abs().max() < 2e-6


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_either_loss_alone_equals_chunks_of_rows(with_labels: bool, with_teacher: bool) -> None:
    if not (with_labels or with_teacher):
        return
    inputs = Inputs()
    soft = inputs.soft() if with_teacher else None
    results: list[list[Tensor]] = []
    for chunk_rows in (None, 8):
        losses = inputs.losses(soft, labels=with_labels, chunk_rows=chunk_rows)
        grads = torch.autograd.grad(losses.total, [inputs.hidden, inputs.head])
        results.append([losses.cross_entropy, losses.divergence, *grads])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_as_close_to_float32_as_chunks_of_rows() -> None:
    inputs = Inputs()
    exact = torch.autograd.grad(inputs.losses(inputs.soft()).total, [inputs.hidden, inputs.head])
    errors: list[list[float]] = []
    for chunk_rows in (None, 8):
        with torch.autocast("cpu", torch.bfloat16):
            total = inputs.losses(inputs.soft(), chunk_rows=chunk_rows).total
        grads = torch.autograd.grad(total, [inputs.hidden, inputs.head])
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(grads, exact, strict=True)])
    for mine, theirs in zip(*errors, strict=True):
        assert mine < 8e-3
        assert mine < 1.5 * theirs + 1e-4


def test_uncounted_rows_get_no_gradient() -> None:
    inputs = Inputs()
    inputs.losses(inputs.soft()).total.backward()
    nothing = (inputs.labels == IGNORE) & ~inputs.counted
    assert inputs.hidden.grad is not None
    assert nothing.any()
    assert not inputs.hidden.grad[nothing].any()
    assert inputs.hidden.grad[~nothing].any(1).all()


def test_no_rows_give_zeros() -> None:
    inputs = Inputs(rows=0)
    losses = inputs.losses(inputs.soft())
    losses.total.backward()
    assert losses.total.item() == 0.0
    assert inputs.head.grad is not None
    assert not inputs.head.grad.any()


def test_large_logits_stay_finite_and_a_nan_is_seen() -> None:
    inputs = Inputs()
    with torch.no_grad():
        inputs.hidden.mul_(1e4)
    losses = inputs.losses(inputs.soft(1.0))
    cross_entropy, divergence = inputs.dense(1.0, 1.0)
    torch.testing.assert_close(losses.cross_entropy, cross_entropy.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.divergence, divergence.float(), rtol=1e-5, atol=0)
    with torch.no_grad():
        inputs.hidden[1, 0] = float("nan")
    assert inputs.losses(inputs.soft()).total.isnan()


def test_evaluation_values_equal_those_of_training() -> None:
    inputs = Inputs()
    trained = inputs.losses(inputs.soft())
    with torch.no_grad():
        evaluated = inputs.losses(inputs.soft())
    assert not evaluated.total.requires_grad
    assert evaluated.total.item() == trained.total.item()


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, and how many were of the head's size."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.sizes.append(result.numel())
        return result


def test_beside_the_gradient_of_the_head_only_kept_logits_are_large() -> None:
    inputs = Inputs()
    with LargestResult() as seen:
        inputs.losses(inputs.soft()).total.backward()
    large = [size for size in seen.sizes if size > 16 * 1400]
    gradient, kept = VOCABULARY * HIDDEN, VOCABULARY * 13
    # Made, written, scaled in backward, given away: never a second one, and nothing of size [N, V].
    assert large.count(gradient) in range(1, 5)
    assert [size for size in large if size != gradient] in ([], [kept, kept])


@pytest.mark.parametrize(("count", "expected"), [(1024, 120), (512, 104), (115, 115), (7, 7), (0, 0)])
def test_kept_logits_are_a_share_of_the_head_in_even_groups(
    monkeypatch: pytest.MonkeyPatch, count: int, expected: int
) -> None:
    monkeypatch.undo()
    hidden, head = torch.empty(count, 576), torch.empty(1, 576)
    student = vocabulary_blocks.Student(hidden, head, None, 1.0)
    teacher = vocabulary_blocks.TeacherSide(hidden, head, torch.ones(count), 5.0, 1.0, 1.0)
    assert vocabulary_blocks.rows_to_keep(student, teacher, torch.float32) == expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert vocabulary_blocks.rows_to_keep(student, teacher, torch.bfloat16) == 0
    halved = vocabulary_blocks.Student(hidden, head.bfloat16(), None, 1.0)
    assert vocabulary_blocks.rows_to_keep(halved, teacher, torch.float32) == 0
