"""The three scores against their definitions, with dense matrices."""

import pytest
import torch

from cheapertraining import CheaperTrainingError, benefits

SPANS = [slice(0, 4), slice(4, 10)]


def example(n=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 10, generator=generator).double(), torch.randn(2, 10, generator=generator).double()


def by_definition(g, v, lambda_val, inverse):
    total = torch.zeros(len(v), len(g), dtype=torch.float64)
    for span in SPANS:
        a, b = g[:, span], v[:, span]
        damping = lambda_val * (a**2).sum(1).mean()
        total += b @ inverse(a, damping) @ a.T
    return total


def inverse_of_mean(a, damping):
    return torch.linalg.inv(a.T @ a / len(a) + damping * torch.eye(a.shape[1], dtype=a.dtype))


def mean_of_inverses(a, damping):
    eye = torch.eye(a.shape[1], dtype=a.dtype)
    return torch.stack([torch.linalg.inv(torch.outer(row, row) + damping * eye) for row in a]).mean(0)


@pytest.mark.parametrize("lambda_val", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize(("score", "inverse"), [("exact", inverse_of_mean), ("datainf", mean_of_inverses)])
def test_closed_forms_equal_dense_inverses(score, inverse, lambda_val):
    g, v = example()
    expected = by_definition(g, v, lambda_val, inverse)
    torch.testing.assert_close(benefits(g, v, SPANS, score=score, lambda_val=lambda_val), expected)


def test_dot_is_the_inner_product_and_ignores_lambda():
    g, v = example()
    for lambda_val in (1e-3, 10.0):
        torch.testing.assert_close(benefits(g, v, SPANS, score="dot", lambda_val=lambda_val), v @ g.T)


@pytest.mark.parametrize("score", ["datainf", "exact"])
def test_a_large_lambda_leaves_the_dot_product_of_each_layer(score):
    g, v = example()
    expected = sum(v[:, s] @ g[:, s].T / (1e6 * (g[:, s] ** 2).sum(1).mean()) for s in SPANS)
    torch.testing.assert_close(benefits(g, v, SPANS, score=score, lambda_val=1e6), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("score", ["datainf", "exact"])
def test_scores_do_not_depend_on_the_scale_of_the_loss(score):
    g, v = example()
    once, scaled = (benefits(c * g, c * v, SPANS, score=score, lambda_val=0.1) for c in (1.0, 1e-4))
    torch.testing.assert_close(once, scaled)


def test_a_layer_without_gradients_counts_nothing():
    g, v = example()
    g[:, SPANS[1]] = 0
    for score in ("datainf", "exact", "dot"):
        both = benefits(g, v, SPANS, score=score, lambda_val=0.1)
        torch.testing.assert_close(both, benefits(g, v, SPANS[:1], score=score, lambda_val=0.1))


def test_refusals():
    g, v = example()
    with pytest.raises(CheaperTrainingError, match="score 'tracin': choose one of datainf, exact, dot"):
        benefits(g, v, SPANS, score="tracin", lambda_val=0.1)
    with pytest.raises(CheaperTrainingError, match="lambda_val 0: it must be positive"):
        benefits(g, v, SPANS, score="exact", lambda_val=0)
