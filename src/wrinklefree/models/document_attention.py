"""Attention within documents as one operator: what a compiled block calls on a CPU.

A loop over documents is the fastest exact way there, but its borders are Python numbers, so a compiler would make a new
graph for every batch. An operator that takes the ids as a tensor is opaque to it: one graph for all batches. Values are
those of the loop in `attention.attend`; the backward pass takes the forward pass's logarithms of row sums, as the
kernels do, so nothing of size T x T is ever held.

Shapes: B rows, T positions, n query heads, n_kv key heads, d head dimension.
"""

from typing import Any

import torch
from torch import Tensor

from wrinklefree.models.runs import Run, find_runs, uses_float32


@torch.library.custom_op("wrinklefree::attend_documents", mutates_args=())
def attend_documents(query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention within each run of `document_ids` [B, T]; padding attends to itself.

    Query [B, n, T, d], key and value [B, n_kv, T, d] on a CPU, to [B, n, T, d], and the logarithm of each row's sum of
    exponentials, float32 [B, n, T].
    """
    mixed, sums = _like_positions(query), query.new_zeros(query.shape[:3], dtype=torch.float32)
    for row, runs in enumerate(find_runs(document_ids)):
        for run in runs:
            here = _place(row, run)
            if run.is_padding:
                mixed[here] = value[here].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
                continue
            states = _in_kernel_type(run, query[here], key[here], value[here])
            mixed[here], sums[here] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*states, 0.0, True)
    return mixed, sums


@torch.library.custom_op("wrinklefree::attend_documents_backward", mutates_args=())
def attend_documents_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, sums: Tensor, document_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given that of the result."""
    grads = (_like_positions(query), _like_positions(key), _like_positions(value))
    groups = query.shape[1] // key.shape[1]
    for row, runs in enumerate(find_runs(document_ids)):
        for run in runs:
            here = _place(row, run)
            if run.is_padding:
                grads[0][here] = grads[1][here] = 0
                grads[2][here] = grad[here].unflatten(1, (-1, groups)).sum(2)
                continue
            states = _in_kernel_type(run, grad[here], query[here], key[here], value[here], mixed[here])
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *states, sums[here], 0.0, True
            )  # fmt: skip
            for whole, part in zip(grads, parts, strict=True):
                whole[here] = part
    return grads


def _place(row: int, run: Run) -> tuple[slice, slice, slice]:
    return slice(row, row + 1), slice(None), slice(run.start, run.end)


def _like_positions(states: Tensor) -> Tensor:
    """An empty [B, n, T, d] whose heads of a position lie side by side, as projections read and write them."""
    rows, heads, length, width = states.shape
    return states.new_empty(rows, length, heads, width).transpose(1, 2)


def _in_kernel_type(run: Run, *states: Tensor) -> tuple[Tensor, ...]:
    return tuple(state.float() for state in states) if uses_float32(states[0], run.end - run.start) else states


@attend_documents.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
    return _like_positions(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@attend_documents_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, sums: Tensor, document_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_positions(query), _like_positions(key), _like_positions(value)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])


def _backward(ctx: Any, grad: Tensor, _grad_sums: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, mixed, sums, document_ids = ctx.saved_tensors
    return (*attend_documents_backward(grad, query, key, value, mixed, sums, document_ids), None)


attend_documents.register_autograd(_backward, setup_context=_keep)
