"""From gradients to benefit: how much a training gradient lowers the probe's loss, per unit of extra weight.

Notation: g_1..g_n training gradients, v a probe's mean gradient, both restricted to one layer; H = (1/n) sum_i g_i g_i^T
is the layer's empirical Fisher matrix, lambda = lambda_val * mean_i |g_i|^2. Scores are sums over layers.

- "dot": v . g_k, the first-order change of the probe's loss under gradient descent. No lambda.
- "exact": v^T (H + lambda I)^-1 g_k, the influence function. In the span of the n gradients this needs one n x n solve
  a layer, because (H + lambda I)^-1 = (1/lambda) (I - G^T (n lambda I + G G^T)^-1 G) for G with rows g_i (Woodbury).
- "datainf": the inverse of the mean replaced by the mean of the inverses, each of which has a closed form
  (Kwon et al., arXiv:2310.00902, eq. 5):
  (1/lambda) [ v.g_k - (1/n) sum_i (v.g_i)(g_i.g_k) / (lambda + |g_i|^2) ].

The sign is that of a benefit: positive means that more of k lowers the probe's loss (the paper's score is its negative).
The paper's code divides lambda by the layer's size; that leaves H almost nothing to do in the approximation, and depends
on the projection, so lambda here is relative to |g|^2 alone.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from cheapertraining.errors import CheaperTrainingError

Score = Literal["datainf", "exact", "dot"]


def benefits(gradients: Tensor, probes: Tensor, spans: Sequence[slice], *, score: Score, lambda_val: float) -> Tensor:
    """Benefit of each training gradient for each probe, [P, n] in float64.

    Args:
        gradients: [n, width], the training (group) gradients; they also make up H.
        probes: [P, width], mean probe gradients.
        spans: The entries of each layer.
        score: Which of the three.
        lambda_val: Damping in units of the layer's mean squared gradient norm; "dot" does not use it.

    Raises:
        CheaperTrainingError: for an unknown score or a damping that is not positive.
    """
    if score not in get_args(Score):
        raise CheaperTrainingError(f"score {score!r}: choose one of {', '.join(get_args(Score))}")
    if not lambda_val > 0:
        raise CheaperTrainingError(f"lambda_val {lambda_val}: it must be positive")
    total = torch.zeros(len(probes), len(gradients), dtype=torch.float64, device=gradients.device)
    for span in spans:
        g, v = gradients[:, span].double(), probes[:, span].double()
        total += layer_benefits(g @ g.T, v @ g.T, score=score, lambda_val=lambda_val)
    return total


def layer_benefits(gram: Tensor, alignment: Tensor, *, score: Score, lambda_val: float) -> Tensor:
    """One layer's part, [P, n], from inner products: gram[i, j] = g_i.g_j, alignment[p, i] = v_p.g_i (float64)."""
    if score == "dot":
        return alignment
    n = len(gram)
    squares = gram.diagonal()
    damping = lambda_val * squares.mean()
    if damping == 0:  # the layer has no gradient at all; not-a-number must go on, so that the caller sees it
        return torch.zeros_like(alignment)
    if score == "datainf":
        corrected = alignment - (alignment / (damping + squares)) @ gram / n
    else:
        identity = torch.eye(n, dtype=gram.dtype, device=gram.device)
        corrected = alignment - torch.linalg.solve(n * damping * identity + gram, alignment.T).T @ gram
    return corrected / damping
