"""Weights of the tokens in the logit KL: what surprises the teacher counts more (TSLD, arXiv:2308.06744).

Within a document, token i counts w_i = n * softmax_i(c / temperature), where c_i is the teacher's cross-entropy on the
true next token and n the number of tokens: 1 on average, so that the term keeps its size and `lambda_logits` its
meaning. The paper's softmax runs over a row, which packing fills with several documents; ours does not let them compete.
A high temperature makes all tokens equal; the paper's is 10.
"""

import torch
from torch import Tensor
from torch.nn import functional

from wrinklefree.distillation.head_losses import compute_dtype, rows_a_chunk


@torch.no_grad()
def surprise(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy of each row's label, float32 [N], some rows of logits at a time; every label must be a token."""
    dtype = compute_dtype(hidden_ND)
    found = torch.empty(len(labels_N), device=hidden_ND.device)
    step = rows_a_chunk(hidden_ND.device.type, head_VD.shape[0])
    with torch.autocast(hidden_ND.device.type, enabled=False):
        weight = head_VD.to(dtype)
        for start in range(0, len(labels_N), step):
            part = slice(start, start + step)
            logits = (hidden_ND[part].to(dtype) @ weight.T).float()
            found[part] = functional.cross_entropy(logits, labels_N[part], reduction="none")
    return found


@torch.no_grad()
def token_weights(surprise_N: Tensor, documents_N: Tensor, counted_N: Tensor, temperature: float) -> Tensor:
    """Weight of each row, float32 [N]: 0 where it is not counted, 1 on average over the counted rows of a document.

    Args:
        surprise_N: The teacher's cross-entropy.
        documents_N: A number of each row's document, in [0, N].
        counted_N: Which rows the KL counts.
        temperature: Divides the cross-entropy.
    """
    # The largest of all rows instead of each document's: cross-entropies are far too small to underflow at a difference.
    largest = surprise_N.amax() if len(surprise_N) else 0.0
    shares = torch.exp((surprise_N - largest) / temperature) * counted_N
    sums, counts = shares.new_zeros(2, len(documents_N) + 1).index_add_(
        1, documents_N, torch.stack([shares, counted_N.to(shares.dtype)])
    )
    return shares * (counts / sums.clamp(min=torch.finfo(sums.dtype).tiny))[documents_N]


def document_numbers(document_ids_BT: Tensor) -> Tensor:
    """A number for each position's document, [B * T], that no document of another row shares; in [0, B * T]."""
    starts = torch.ones_like(document_ids_BT, dtype=torch.bool)
    starts[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return starts.flatten().cumsum(0)
