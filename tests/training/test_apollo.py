"""APOLLO against a numpy transcription of algorithm 1 of arXiv:2412.05270, and its limits."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from wrinklefree.training.apollo import GROWTH_LIMIT, Apollo, draw_projection

SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "update_projection_every": 3, "seed": 5}


def gradients(shape: tuple[int, int], steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    # Sizes that jump, so that the limiter acts on some steps and not on others.
    return [torch.randn(shape, generator=generator) * scale for scale in [0.01, 1.0, 0.1, 5.0, 0.5, 1.0, 3.0][:steps]]


def run(initial: torch.Tensor, grads: list[torch.Tensor], *, lr: float = 0.1, **settings) -> torch.Tensor:
    parameter = nn.Parameter(initial.clone())
    optimizer = Apollo([{"params": [parameter]}], lr=lr, **(SETTINGS | settings))
    for gradient in grads:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def transcription(initial, grads, *, rank, scaling, lr=0.1, weight_decay=0.0, period=3, seed=5) -> np.ndarray:
    """Algorithm 1 for W [m, n], m <= n, in float64, column by column."""
    weight = initial.double().numpy().copy()
    m, n = weight.shape
    first = np.zeros((rank, n))
    second = np.zeros((rank, n))
    previous = None
    for t, tensor in enumerate(grads, start=1):
        gradient = tensor.double().numpy()
        projection = draw_projection(rank, m, seed, 0, (t - 1) // period).double().numpy() if rank < m else np.eye(m)
        low = projection @ gradient
        first = 0.9 * first + 0.1 * low
        second = 0.95 * second + 0.05 * low**2
        normal = (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.95**t)) + 1e-8)
        if scaling == "channel":
            columns = [gradient[:, j] * np.linalg.norm(normal[:, j]) / np.linalg.norm(low[:, j]) for j in range(n)]
            update = np.stack(columns, axis=1)
        else:
            update = gradient * np.linalg.norm(normal) / np.linalg.norm(low)
        update = update * math.sqrt(m / rank)
        norm = np.linalg.norm(update)
        if previous is not None and norm / previous > 1.01:
            update = update / norm * 1.01 * previous
        previous = np.linalg.norm(update)
        weight = weight - lr * (update + weight_decay * weight)
    return weight


@pytest.mark.parametrize(("rank", "scaling"), [(4, "channel"), (1, "tensor"), (64, "channel")])
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_the_papers_algorithm(rank, scaling, transposed):
    initial = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    grads = gradients((16, 24), 7)
    turn = (lambda x: x.T.contiguous()) if transposed else (lambda x: x)
    ours = run(turn(initial), [turn(g) for g in grads], rank=rank, scaling=scaling, weight_decay=0.1)
    reference = transcription(initial, grads, rank=min(rank, 16), scaling=scaling, weight_decay=0.1)
    np.testing.assert_allclose(turn(ours).numpy(), reference, rtol=2e-5, atol=2e-6)


def test_the_limiter_is_what_holds_a_jump_back():
    initial = torch.zeros(8, 8)
    grads = [torch.eye(8), torch.ones(8, 8)]  # rank 8: 64 entries instead of 8 would grow the norm by sqrt(8)
    weight = [run(initial, grads[:count], rank=8, scaling="channel") for count in (1, 2)]
    first, second = weight[0].norm(), (weight[1] - weight[0]).norm()
    assert second / first == pytest.approx(GROWTH_LIMIT, rel=1e-5)


def test_first_full_rank_step_has_adamws_length():
    initial = torch.zeros(16, 24)
    grads = gradients((16, 24), 1)
    parameter = nn.Parameter(initial.clone())
    adamw = torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    parameter.grad = grads[0].clone()
    adamw.step()
    ours = run(initial, grads, rank=16, scaling="channel")
    assert ours.norm(dim=0) == pytest.approx(parameter.detach().norm(dim=0), rel=1e-5)


@pytest.mark.parametrize(("rank", "scaling"), [(8, "channel"), (1, "tensor")])
def test_low_rank_steps_are_about_as_long_as_adamws_at_the_same_rate(rank, scaling):
    shape = (128, 256)
    lengths = []
    for seed in range(20):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        lengths.append(float(run(torch.zeros(shape), [gradient], rank=rank, scaling=scaling, lr=1.0, seed=seed).norm()))
    # AdamW's first step is +-1 everywhere. A column's sketch may be short by chance, hence the room.
    assert 0.8 < np.median(lengths) / math.sqrt(128 * 256) < 1.6


def test_zero_gradients_leave_the_weight_alone_and_do_not_freeze_it():
    initial = torch.ones(8, 12)
    zero, real = torch.zeros(8, 12), torch.ones(8, 12)
    assert torch.equal(run(initial, [zero], rank=2, scaling="channel"), initial)
    assert (run(initial, [zero, real], rank=2, scaling="channel") - initial).norm() > 0.1


def test_projections_have_variance_one_over_rank_and_differ_by_seed_parameter_and_period():
    draws = [draw_projection(16, 400, *key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    for draw in draws:
        assert float(draw.var()) == pytest.approx(1 / 16, rel=0.1)
    gram = torch.stack([draw.flatten() for draw in draws])
    cosines = torch.corrcoef(gram) - torch.eye(4)
    assert float(cosines.abs().max()) < 0.05
    assert torch.equal(draws[0], draw_projection(16, 400, 0, 0, 0))


def test_projection_is_renewed_every_period_only():
    parameter = nn.Parameter(torch.zeros(8, 12))
    optimizer = Apollo([{"params": [parameter]}], lr=0.1, rank=2, scaling="channel", **SETTINGS)
    seen = []
    for gradient in gradients((8, 12), 7):
        parameter.grad = gradient
        optimizer.step()
        seen.append(optimizer._projections[0][0])
    assert seen == [0, 0, 0, 1, 1, 1, 2]
    assert optimizer.projection_bytes() == 2 * 8 * 4
