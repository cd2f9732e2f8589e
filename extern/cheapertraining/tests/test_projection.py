"""Projected per-sample gradients against autograd, row by row."""

import random

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cheapertraining import CheaperTrainingError, GradientProjector
from cheapertraining.projection import group_means

EXACT = 10_000
"""A projection size that keeps every side as it is."""


def row_gradients(projector, batch, loss):
    """[B, width], one backward pass a row, through `.grad`."""
    rows = []
    for row in range(len(batch)):
        projector.model.zero_grad()
        loss(projector.model, batch[row : row + 1])[0].sum().backward()
        rows.append(torch.cat([layer.module.weight.grad.flatten() for layer in projector.layers]))
    projector.model.zero_grad()
    return torch.stack(rows)


def tokens(rows=5):
    return torch.randint(0, 20, (rows, 9), generator=torch.Generator().manual_seed(1))


def test_one_batched_pass_gives_the_gradient_of_every_row(tiny_lm, loss):
    projector = GradientProjector(tiny_lm(), size=EXACT)
    gradients, counts = projector.per_sample(tokens(), loss)
    torch.testing.assert_close(gradients, row_gradients(projector, tokens(), loss), rtol=1e-5, atol=1e-6)
    assert counts.tolist() == [8] * 5
    assert [layer.name for layer in projector.layers] == [
        f"blocks.{block}.{name}" for block in (0, 1) for name in ("gate", "up", "down")
    ]


def test_projection_equals_multiplying_the_gradient_from_both_sides(tiny_lm, loss):
    exact, projected = (GradientProjector(tiny_lm(), size=size, seed=3) for size in (EXACT, 8))
    whole, _ = exact.per_sample(tokens(), loss)
    small, _ = projected.per_sample(tokens(), loss)
    for index, (big, little) in enumerate(zip(exact.layers, projected.layers, strict=True)):
        left, right = (signs.float() / 8**0.5 for signs in projected._matrices(index, torch.device("cpu")))
        full = whole[:, big.span].reshape(5, *big.module.weight.shape)
        torch.testing.assert_close(small[:, little.span].reshape(5, 8, 8), left.T @ full @ right, rtol=1e-4, atol=1e-5)


def test_inner_products_are_unbiased_over_draws(tiny_lm, loss):
    model = tiny_lm()
    whole, _ = GradientProjector(model, size=EXACT).per_sample(tokens(), loss)
    projector = GradientProjector(model, size=8)
    estimates = []
    for number in range(300):
        projector.redraw(number)
        rows, _ = projector.per_sample(tokens(), loss)
        estimates.append(rows @ rows.T)
    stacked = torch.stack(estimates)
    error = stacked.std(0) / len(estimates) ** 0.5
    assert ((stacked.mean(0) - whole @ whole.T).abs() < 4.5 * error).all()


def test_a_number_always_draws_the_same_matrices(tiny_lm, loss):
    first, second = (GradientProjector(tiny_lm(), size=4, seed=7) for _ in range(2))
    second.redraw(5)
    assert not torch.equal(first.per_sample(tokens(), loss)[0], second.per_sample(tokens(), loss)[0])
    second.redraw(0)
    assert torch.equal(first.per_sample(tokens(), loss)[0], second.per_sample(tokens(), loss)[0])


class _SignWeight(torch.autograd.Function):
    """x @ sign(W)^T with straight-through gradients, as a ternary layer computes it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.sign().T

    @staticmethod
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        return grads[0] @ weight.sign(), grads[0].flatten(0, -2).T @ x.flatten(0, -2)


class SignLinear(nn.Linear):
    def forward(self, input):
        return _SignWeight.apply(input, self.weight)


class NormLinear(nn.Linear):
    def forward(self, input):
        return functional.linear(functional.normalize(input, dim=-1), self.weight)


def chain(layer, wrap=lambda part, x: part(x)):
    """Embedding, three layers with a residual that is added in place, head."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 20)
            self.layers = nn.ModuleList(layer(6, 6) for _ in range(3))

        def forward(self, ids):
            x = self.embed(ids)
            for part in self.layers:
                y = wrap(part, x)
                y += x
                x = torch.tanh(y)
            return self.head(x)

    return Chain()


def test_custom_autograd_functions_and_in_place_writes(loss):
    projector = GradientProjector(chain(SignLinear), size=EXACT)
    gradients, _ = projector.per_sample(tokens(), loss)
    torch.testing.assert_close(gradients, row_gradients(projector, tokens(), loss), rtol=1e-5, atol=1e-6)


def test_activation_checkpointing(loss):
    model = chain(nn.Linear, lambda part, x: checkpoint(part, x, use_reentrant=False))
    projector = GradientProjector(model, size=EXACT)
    gradients, _ = projector.per_sample(tokens(), loss)
    torch.testing.assert_close(gradients, row_gradients(projector, tokens(), loss), rtol=1e-5, atol=1e-6)


def test_a_layer_called_twice_gets_the_sum(loss):
    model = chain(nn.Linear)
    model.layers[2] = model.layers[0]
    projector = GradientProjector(model, size=EXACT)
    assert len(projector.layers) == 2
    gradients, _ = projector.per_sample(tokens(), loss)
    torch.testing.assert_close(gradients, row_gradients(projector, tokens(), loss), rtol=1e-5, atol=1e-6)


def test_an_input_that_the_layer_transforms(loss):
    model = chain(NormLinear)
    without = GradientProjector(model, size=EXACT)
    told = GradientProjector(model, size=EXACT, layer_input=lambda _, x: functional.normalize(x, dim=-1))
    truth = row_gradients(told, tokens(), loss)
    torch.testing.assert_close(told.per_sample(tokens(), loss)[0], truth, rtol=1e-5, atol=1e-6)
    assert (without.per_sample(tokens(), loss)[0] - truth).abs().max() > 1e-3


def test_autocast(tiny_lm, loss):
    def bfloat16_loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch)

    projector = GradientProjector(tiny_lm(), size=EXACT)
    low, _ = projector.per_sample(tokens(), bfloat16_loss)
    full, _ = projector.per_sample(tokens(), loss)
    assert low.dtype == torch.float32
    assert functional.cosine_similarity(low, full).min() > 0.999


def test_the_training_state_stays(tiny_lm, loss):
    model = tiny_lm(dropout=0.5)
    model.blocks[0].eval()
    loss(model, tokens())[0].sum().backward()
    model.blocks[1].up.weight.requires_grad_(False)

    def state():
        return (
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            [p.requires_grad for p in model.parameters()],
            [module.training for module in model.modules()],
            [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()],
            torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
        )  # fmt: skip

    def drawing_loss(model, batch):
        torch.rand(3), random.random(), numpy.random.random()
        return loss(model, batch)

    before = state()
    first, _ = GradientProjector(model, size=4).per_sample(tokens(), drawing_loss)
    with torch.no_grad():
        second, _ = GradientProjector(model, size=4).per_sample(tokens(), drawing_loss)
    after = state()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]
    assert torch.equal(first, second), "dropout must be off while gradients are taken"
    assert len(GradientProjector(model).layers) == 5, "a frozen layer is not scored"


def test_hooks_and_flags_are_restored_after_an_error(tiny_lm):
    model = tiny_lm()

    def broken(model, batch):
        model(batch)
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        GradientProjector(model).per_sample(tokens(), broken)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("bad_loss", "message"),
    [
        (lambda m, b: (m(b).sum(), torch.tensor(5)), r"sums \[\] and counts \[\]: return one of each a row"),
        (lambda m, b: (m(b).sum((1, 2)).detach(), torch.ones(5)), "sums without a gradient"),
        (lambda m, b: (m.embed(b).sum((1, 2)), torch.ones(5)), r"called none of the 6 layers \(first: blocks.0.gate\)"),
        (lambda m, b: (m(b.reshape(-1, 3)).reshape(5, -1).sum(1), torch.ones(5)), r"saw 15 rows in a batch of 5"),
    ],
)
def test_a_loss_that_is_not_per_row_is_refused(tiny_lm, bad_loss, message):
    with pytest.raises(CheaperTrainingError, match=message):
        GradientProjector(tiny_lm()).per_sample(tokens(), bad_loss)


def test_no_layer_to_tap():
    with pytest.raises(CheaperTrainingError, match="no linear layer"):
        GradientProjector(nn.Embedding(3, 3))
    with pytest.raises(CheaperTrainingError, match="projection size 0"):
        GradientProjector(nn.Linear(3, 3), size=0)


def test_group_means_are_over_targets():
    gradients = torch.tensor([[2.0], [4.0], [9.0], [1.0], [5.0]])
    means = group_means([gradients[:2], gradients[2:]], [torch.tensor([1, 3]), torch.tensor([5, 1, 1])], 2)
    assert means.flatten().tolist() == pytest.approx([15 / 9, 3.0])
    with pytest.raises(CheaperTrainingError, match="5 rows do not fill 6 groups"):
        group_means([gradients], [torch.ones(5)], 6)
    with pytest.raises(CheaperTrainingError, match="a group of 2 rows has no target"):
        group_means([gradients], [torch.tensor([1, 1, 1, 0, 0])], 2)


def test_cache_bytes_of_smollm2_135m():
    """30 blocks of its seven projections, on the meta device: what a default update of 4 sources keeps."""
    sides = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    model = nn.ModuleList(nn.Linear(*side, device="meta") for _ in range(30) for side in sides)
    projector = GradientProjector(model)
    gradients = 210 * 32 * 32 * 4
    signs = 30 * 32 * sum(sum(side) for side in sides)
    assert projector.cache_bytes(4 * 8 + 2) == 34 * gradients + signs
    assert projector.cache_bytes(4 * 8 + 2) < 64 * 2**20
