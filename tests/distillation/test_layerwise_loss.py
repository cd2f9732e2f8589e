from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from wrinklefree.distillation.combined_loss import layerwise_objective
from wrinklefree.distillation.config import LayerwiseConfig
from wrinklefree.distillation.layerwise_loss import LayerwiseDistillation, layer_weights
from wrinklefree.distillation.logits_loss import logits_kl
from wrinklefree.utils.errors import ConfigError

TYPES = ["mse_normalized", "cosine", "mse", "kl", "inner_product"]


def value(kind: str, student, teacher, batch, weights=(0.2, 0.3, 0.5), temperature: float = 1.0):
    term = LayerwiseDistillation(loss_type=kind, weights=weights, temperature=temperature)
    return term(student, teacher, batch, term.counts(batch), {"hidden_states": 1.0, "mean_cosine": 0.0})


def test_layer_weights() -> None:
    assert layer_weights("progressive", 4, normalize=True) == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert layer_weights("progressive", 3, normalize=False) == (1.0, 2.0, 3.0)
    assert layer_weights("exponential", 3, normalize=True) == pytest.approx((1 / 7, 2 / 7, 4 / 7))
    assert layer_weights("uniform", 4, normalize=True) == (0.25,) * 4
    assert layer_weights(None, 2, normalize=False) == (1.0, 1.0)
    assert layer_weights((1.0, 3.0), 2, normalize=True) == (0.25, 0.75)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((1.0, 2.0), "holds 2 numbers, but the model has 3 layers"),
        ((1.0, -1.0, 1.0), "must not be negative"),
        ((0.0,) * 3, "one must be positive"),
    ],
)
def test_wrong_custom_weights_are_refused(numbers: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer_weights(numbers, 3, normalize=True)


def test_one_position_in_closed_form(make) -> None:
    # s = (3, 4), t = (1, 0): cos 3/5, |s - t|^2 = 4 + 16, <s, t> / <t, t> = 3.
    batch, base = make.batch([[1]], 1), make.output(1, 1)
    student = replace(base, hidden_states={0: torch.tensor([[[3.0, 4.0]]])})
    teacher = replace(base, hidden_states={0: torch.tensor([[[1.0, 0.0]]])})
    expected = {"mse_normalized": 0.8, "cosine": 0.4, "mse": 10.0, "inner_product": 4.0}
    for kind, number in expected.items():
        got = value(kind, student, teacher, batch, weights=(1.0,))
        assert got.values["hidden_states"].item() == pytest.approx(number, rel=1e-5), kind
        assert got.values["mean_cosine"].item() == pytest.approx(0.6, rel=1e-5)


def test_normalised_mse_is_twice_one_minus_cosine_whatever_the_width(make) -> None:
    batch = make.batch([[7, 5], [9]], 12)
    for make.hidden in (24, 240):
        student, teacher = make.output(2, 12), make.output(2, 12)
        normalised = value("mse_normalized", student, teacher, batch).values["hidden_states"]
        cosine = value("cosine", student, teacher, batch).values["hidden_states"]
        torch.testing.assert_close(normalised, 2 * cosine, rtol=1e-5, atol=1e-6)
        assert 1.7 < normalised.item() < 2.3


def test_logit_lens_goes_through_the_teachers_norm_and_head(make) -> None:
    batch, student, teacher = make.batch([[7, 3], [9]], 12), make.output(2, 12), make.output(2, 12)
    real = batch.document_ids != 0
    expected = torch.zeros(())
    for layer, weight in enumerate((0.2, 0.3, 0.5)):
        mine, theirs = (
            F.rms_norm(x.hidden_states[layer], (24,), eps=1e-6) @ teacher.head_weight.T for x in (student, teacher)
        )
        expected = expected + weight * logits_kl(mine[real], theirs[real], temperature=2.0).mean()
    got = value("kl", student, teacher, batch, temperature=2.0).values["hidden_states"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_logit_lens_gradient_equals_autograd(make) -> None:
    batch, student, teacher = make.batch([[12]], 12), make.output(1, 12, gradients=True), make.output(1, 12)
    lens = teacher.final_norm(student.hidden_states[1]) @ teacher.head_weight.T
    theirs = teacher.final_norm(teacher.hidden_states[1]) @ teacher.head_weight.T
    (expected,) = torch.autograd.grad(logits_kl(lens[0], theirs[0], temperature=1.0).mean(), student.hidden_states[1])
    (got,) = torch.autograd.grad(
        value("kl", student, teacher, batch, weights=(0.0, 1.0, 0.0)).weighted, student.hidden_states[1]
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("low", [False, True])
def test_recomputed_gradient_equals_autograd(make, low: bool) -> None:
    batch, student, teacher = make.batch([[7, 3], [9]], 12), make.output(2, 12, gradients=True), make.output(2, 12)
    if low:
        halved = student.hidden_states[1].detach().bfloat16().requires_grad_()
        student = replace(student, hidden_states=student.hidden_states | {1: halved})
    real = batch.document_ids != 0
    mine, theirs = (x.hidden_states[1].float()[real] for x in (student, teacher))
    wanted = {
        "mse_normalized": (mine / mine.norm(dim=-1, keepdim=True) - theirs / theirs.norm(dim=-1, keepdim=True))
        .square()
        .sum(-1),
        "cosine": 1 - (mine * theirs).sum(-1) / mine.norm(dim=-1) / theirs.norm(dim=-1),
        "mse": (mine - theirs).square().mean(-1),
        "inner_product": ((mine * theirs).sum(-1) / (theirs * theirs).sum(-1) - 1).square(),
    }
    for kind, distances in wanted.items():
        (expected,) = torch.autograd.grad(3.0 * distances.mean(), student.hidden_states[1], retain_graph=True)
        total = 3.0 * value(kind, student, teacher, batch, weights=(0.0, 1.0, 0.0)).weighted
        (got,) = torch.autograd.grad(total, student.hidden_states[1])
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-2 if low else 1e-4, atol=1e-4 if low else 1e-7)


@pytest.mark.parametrize("kind", TYPES)
def test_zero_when_equal_and_no_teacher_gradient(make, kind: str) -> None:
    batch = make.batch([[7, 5], [9]], 12)
    student, teacher = make.output(2, 12, gradients=True), make.output(2, 12, gradients=True)
    equal = value(kind, teacher, teacher, batch)
    assert abs(equal.values["hidden_states"].item()) < 1e-6
    assert equal.values["mean_cosine"].item() == pytest.approx(1.0, abs=1e-6)
    got = value(kind, student, teacher, batch)
    assert got.values["hidden_states"].item() > 0.1
    got.weighted.backward()
    for layer in range(3):
        assert student.hidden_states[layer].grad.abs().max() > 0
        assert teacher.hidden_states[layer].grad is None
    assert teacher.head_weight.grad is None


@pytest.mark.parametrize("kind", TYPES)
def test_padding_changes_nothing_and_gets_no_gradient(make, kind: str) -> None:
    batch, student, teacher = make.batch([[5, 4], [9]], 12), make.output(2, 12, gradients=True), make.output(2, 12)
    got = value(kind, student, teacher, batch)
    got.weighted.backward()
    padding = batch.document_ids == 0
    assert student.hidden_states[2].grad[padding].abs().max() == 0.0
    loud = {
        layer: torch.where(padding[..., None], 1e4, state.detach()) for layer, state in student.hidden_states.items()
    }
    again = value(kind, replace(student, hidden_states=loud), teacher, batch)
    assert again.values["hidden_states"].item() == pytest.approx(got.values["hidden_states"].item(), rel=1e-6)
    assert again.values["mean_cosine"].item() == pytest.approx(got.values["mean_cosine"].item(), rel=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_accumulated_micro_batches_give_the_gradient_of_one_batch(
    make, take_output_rows, take_batch_rows, kind: str
) -> None:
    batch = make.batch([[3, 9], [12], [2, 2, 2], [11]] * 4, 12)
    student, teacher = make.output(16, 12, gradients=True), make.output(16, 12)
    term = LayerwiseDistillation(loss_type=kind, weights=(0.2, 0.3, 0.5))
    counts, weights = term.counts(batch), {"hidden_states": 1.0, "mean_cosine": 0.0}
    states = list(student.hidden_states.values())
    whole = torch.autograd.grad(term(student, teacher, batch, counts, weights).weighted, states)
    parts = [torch.zeros_like(state) for state in states]
    for start in range(0, 16, 4):
        rows = slice(start, start + 4)
        mine, theirs = take_output_rows(student, rows), take_output_rows(teacher, rows)
        total = term(mine, theirs, take_batch_rows(batch, rows), counts, weights).weighted
        for part, gradient in zip(parts, torch.autograd.grad(total, states), strict=True):
            part += gradient
    for part, gradient in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, gradient, rtol=1e-5, atol=1e-8)


def test_objective_reports_the_cosine_and_adds_cross_entropy(make, architecture) -> None:
    batch, student, teacher = make.batch([[7, 5], [9]], 12), make.output(2, 12, gradients=True), make.output(2, 12)
    objective = layerwise_objective(LayerwiseConfig(lm_loss_weight=0.25), architecture())
    assert objective.student_wants.hidden_layers == (0, 1, 2)
    assert objective.teacher_wants == objective.student_wants
    losses = objective(student, teacher, batch, objective.counts(batch))
    assert losses.weights == {"hidden_states": 1.0, "mean_cosine": 0.0, "cross_entropy": 0.25}
    cosines = [
        F.cosine_similarity(student.hidden_states[i], teacher.hidden_states[i], dim=-1)[batch.document_ids != 0].mean()
        for i in range(3)
    ]
    assert losses.terms["mean_cosine"].item() == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-6)
    expected = losses.terms["hidden_states"] + 0.25 * losses.terms["cross_entropy"]
    torch.testing.assert_close(losses.total.detach(), expected)
    aligned = 2 * (1 - sum(weight * cos for weight, cos in zip((1 / 6, 2 / 6, 3 / 6), cosines, strict=True)))
    assert losses.terms["hidden_states"].item() == pytest.approx(aligned.item(), rel=1e-5)
