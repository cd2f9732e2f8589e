"""Muon on one process: torch's own, bit for bit, and what Newton-Schulz is for."""

import pytest
import torch

from wrinklefree.training.muon import ShardedMuon, newton_schulz


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_one_process_is_torch_muon_bit_for_bit(shape: tuple[int, int]) -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).reshape(shape)) for _ in range(2))
    groups = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    optimizers = [ShardedMuon([{"params": [ours]}], **groups)]
    reference = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **groups)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradient = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = gradient, gradient.clone()
        for optimizer in (*optimizers, reference):
            optimizer.step()
        assert torch.equal(ours, theirs)


def test_newton_schulz_moves_singular_values_near_one_and_keeps_directions() -> None:
    left, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    right, _ = torch.linalg.qr(torch.randn(9, 6, generator=torch.Generator().manual_seed(2)))
    matrix = left @ torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.2])) @ right.T
    result = newton_schulz(matrix, torch.float32)
    values = torch.diag(left.T @ result @ right)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (left.T @ result @ right - torch.diag(values)).abs().max() < 1e-5
    torch.testing.assert_close(newton_schulz(matrix.T, torch.float32), result.T)
