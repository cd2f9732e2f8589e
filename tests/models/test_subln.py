"""SubLN: both ends of its strength, and what lies between."""

import pytest
import torch

from wrinklefree.models.subln import RMSNorm, SubLN, set_subln_strength, subln_or_identity, subln_strength_of


def make_norm(size: int = 6) -> SubLN:
    norm = SubLN(size, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, size))
    return norm


def test_hand_computed_norm() -> None:
    norm = RMSNorm(2, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 10.0]))
    # rms(1, 7) = 5
    assert norm(torch.tensor([[1.0, 7.0]])).tolist() == [[pytest.approx(0.2), pytest.approx(14.0)]]


def test_strength_zero_returns_the_input_itself() -> None:
    norm, x = make_norm(), torch.randn(3, 6)
    set_subln_strength(norm, 0.0)
    assert norm(x) is x


@pytest.mark.parametrize("strength", [0.1, 0.5, 0.999, 1.0])
def test_values_follow_the_formula(strength: float) -> None:
    norm = make_norm()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    set_subln_strength(norm, strength)
    rms = (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = (1 - strength) * x + strength * norm.weight * x / rms
    torch.testing.assert_close(norm(x).double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_gradients_of_input_and_gain() -> None:
    norm = make_norm().double()
    set_subln_strength(norm, 1.0)
    x = torch.randn(3, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rms = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    slope = torch.randn(3, 6, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((norm.weight * x / rms * slope).sum(), [x, norm.weight])
    actual = torch.autograd.grad((norm(x) * slope).sum(), [x, norm.weight])
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_dtype_is_kept_and_arithmetic_is_float32() -> None:
    norm = make_norm()
    x = torch.full((1, 6), 300.0, dtype=torch.float16)  # its square overflows float16
    output = norm(x)
    assert output.dtype == torch.float16
    torch.testing.assert_close(output[0].float(), norm.weight.detach(), rtol=1e-3, atol=1e-3)


def test_strength_is_read_back_and_not_saved() -> None:
    model = torch.nn.Sequential(make_norm(), make_norm())
    set_subln_strength(model, 0.3)
    assert subln_strength_of(model) == 0.3
    assert subln_strength_of(torch.nn.Linear(2, 2)) == 1.0
    assert sorted(model.state_dict()) == ["0.weight", "1.weight"]


def test_absent_norm_has_no_parameters() -> None:
    absent = subln_or_identity(False, 6, 1e-6)
    assert not list(absent.parameters())
    assert isinstance(subln_or_identity(True, 6, 1e-6), SubLN)
