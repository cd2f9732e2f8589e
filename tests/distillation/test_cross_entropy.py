import pytest
import torch
from torch.nn import functional as F

from wrinklefree.distillation.combined_loss import language_model_objective
from wrinklefree.distillation.cross_entropy import target_nll
from wrinklefree.models.records import IGNORE, Batch, ModelOutput


def test_cross_entropy_is_the_sum_over_targets_by_the_global_count(make) -> None:
    batch, output = make.batch([[7, 5], [9]], 12), make.output(2, 12)
    expected = F.cross_entropy(output.logits().flatten(0, 1), batch.labels.flatten(), reduction="sum") / 100
    losses = language_model_objective()(output, None, batch, {"cross_entropy": 100.0})
    torch.testing.assert_close(losses.total, expected, rtol=1e-6, atol=1e-6)
    assert losses.weights == {"cross_entropy": 1.0}
    torch.testing.assert_close(losses.terms["cross_entropy"], expected, rtol=1e-6, atol=1e-6)


def test_uniform_logits_cost_log_vocabulary(make) -> None:
    batch = make.batch([[12], [6, 6]], 12)
    output = ModelOutput(torch.zeros(2, 12, 8), torch.randn(37, 8), final_norm=torch.nn.Identity())
    objective = language_model_objective()
    losses = objective(output, None, batch, objective.counts(batch))
    assert losses.total.item() == pytest.approx(3.6109179, rel=1e-6)


def test_accumulated_micro_batches_give_the_gradient_of_one_batch(make, take_output_rows, take_batch_rows) -> None:
    lengths = [[3, 9], [12], [2, 2, 2], [11]] * 4
    batch, whole = make.batch(lengths, 12), make.output(16, 12, gradients=True)
    # Uneven masks: the first micro-batch keeps a single target.
    batch.labels[:4] = torch.where(torch.arange(48).view(4, 12) == 0, 5, IGNORE)
    objective = language_model_objective()
    counts = objective.counts(batch)
    together = torch.autograd.grad(objective(whole, None, batch, counts).total, [whole.hidden, whole.head_weight])
    parts, terms = [torch.zeros_like(g) for g in together], 0.0
    for start in range(0, 16, 4):
        rows = slice(start, start + 4)
        losses = objective(take_output_rows(whole, rows), None, take_batch_rows(batch, rows), counts)
        terms += losses.terms["cross_entropy"].item()
        for part, gradient in zip(
            parts, torch.autograd.grad(losses.total, [whole.hidden, whole.head_weight]), strict=True
        ):
            part += gradient
    for part, gradient in zip(parts, together, strict=True):
        torch.testing.assert_close(part, gradient, rtol=1e-6, atol=1e-7)
    assert terms == pytest.approx(objective(whole, None, batch, counts).terms["cross_entropy"].item(), rel=1e-6)


def test_a_step_without_targets_costs_nothing(make) -> None:
    batch, output = make.batch([[12]], 12), make.output(1, 12, gradients=True)
    empty = Batch(batch.input_ids, torch.full_like(batch.labels, IGNORE), batch.position_ids, batch.document_ids)
    objective = language_model_objective()
    losses = objective(output, None, empty, objective.counts(empty))
    losses.total.backward()
    assert losses.total.item() == 0.0
    assert output.hidden.grad.abs().max() == 0.0


def test_target_nll_scores_each_target(make) -> None:
    batch, output = make.batch([[7, 5], [9]], 12), make.output(2, 12, gradients=True)
    nll = target_nll(output, batch.labels)
    expected = F.cross_entropy(output.logits().flatten(0, 1), batch.labels.flatten(), reduction="none").view(2, 12)
    torch.testing.assert_close(nll, expected.detach(), rtol=1e-5, atol=1e-6)
    assert (nll[batch.labels == IGNORE] == 0).all()
    assert not nll.requires_grad
