"""Attention over packed documents: rotary positions, grouped heads, masks, the key-value cache.

Shapes: B rows, T queries, S keys, D hidden size, n query heads, n_kv key heads, d head dimension. A *run* is a stretch
of a row with one document id; nothing attends across the border of a run, and padding (id 0) attends to itself only.

What every layer needs is decided once a forward pass, in an `AttentionPlan`.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from wrinklefree.models.attention_backends import AttentionBackend, attend_by_blocks, attend_by_borders, block_mask
from wrinklefree.models.bitlinear import make_linear, project
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.document_attention import attend_documents
from wrinklefree.models.records import QKV, Borders
from wrinklefree.models.runs import Run, find_runs, uses_float32
from wrinklefree.models.subln import RMSNorm, subln_or_identity

MIN_LENGTH_FOR_LOOP = 512
"""Shorter rows: one masked kernel costs less than a kernel a document."""


@dataclass(frozen=True)
class AttentionPlan:
    """How to keep documents apart: by nothing, by a loop over runs, by a mask, or by a kernel that is told the borders."""

    mask: Tensor | None = None
    """Bool [B, 1, T, S], True where a query may look."""
    rows: tuple[tuple[Run, ...], ...] | None = None
    """Runs of every row, in order: attend run by run."""
    is_causal: bool = False
    """No mask, no runs: plain causal attention."""
    borders: Borders | None = None
    """For the kernels `varlen` and `flash`, of which `backend` is one."""
    blocks: Any = None
    """FlexAttention's block mask."""
    document_ids: Tensor | None = None
    """[B, T] on a CPU, for the operator that a compiled block calls."""
    backend: AttentionBackend = "sdpa"


def document_mask(document_ids: Tensor, queries: int) -> Tensor:
    """Which keys the last `queries` positions of each row may look at, bool [B, 1, T, S].

    Same run, not later, and not padding, except that every position may look at itself: no row of the mask is empty, so
    no softmax is NaN.
    """
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    key_runs = functional.pad(changes.cumsum(dim=1), (1, 0))
    key_index = torch.arange(document_ids.shape[1], device=document_ids.device)
    query_runs, query_index = key_runs[:, -queries:], key_index[-queries:]
    same_run = query_runs[:, :, None] == key_runs[:, None, :]
    not_later = query_index[:, None] >= key_index[None, :]
    itself = query_index[:, None] == key_index[None, :]
    return (same_run & not_later & ((document_ids != 0)[:, None, :] | itself))[:, None]


def plan_attention(
    document_ids: Tensor, queries: int, *, backend: AttentionBackend = "sdpa", borders: Borders | None = None
) -> AttentionPlan:
    """The cheapest exact plan for the last `queries` positions of rows with these document ids [B, S].

    A GPU's `backend` serves whole rows only; behind a cache the plan is a mask.

    On the CPU the ids are read: one document a row needs no mask, several in a long row are attended one by one. On a
    GPU reading them would wait for the device, and under torch.compile it would break the graph, so there the plan is
    always the mask.
    """
    if backend == "flex" and queries == document_ids.shape[1]:
        return AttentionPlan(blocks=block_mask(document_ids), backend=backend)
    if backend in ("varlen", "flash") and borders is not None and queries == document_ids.shape[1]:
        return AttentionPlan(borders=borders, backend=backend)
    if document_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return AttentionPlan(mask=document_mask(document_ids, queries))
    length = document_ids.shape[1]
    if bool((document_ids == document_ids[:, :1]).all()) and bool((document_ids[:, 0] != 0).all()):
        if queries == length:
            return AttentionPlan(is_causal=True)
        if queries == 1:
            return AttentionPlan()
    if queries == length >= MIN_LENGTH_FOR_LOOP:
        return AttentionPlan(rows=find_runs(document_ids))
    return AttentionPlan(mask=document_mask(document_ids, queries))


def plan_for_compiled(
    document_ids: Tensor, *, backend: AttentionBackend = "sdpa", borders: Borders | None = None
) -> AttentionPlan:
    """The plan for whole rows [B, T] inside a compiled block: of one kind, whatever the documents are.

    Nothing in it is a Python number that changes from batch to batch, so one graph serves them all.
    """
    if document_ids.device.type == "cpu":
        return AttentionPlan(document_ids=document_ids)
    if borders is None:
        return AttentionPlan(mask=document_mask(document_ids, document_ids.shape[1]))
    cumulative = borders.cumulative
    # Their number changes from batch to batch.
    torch._dynamo.maybe_mark_dynamic(cumulative, 0)
    return AttentionPlan(borders=Borders(cumulative, document_ids.shape[1]), backend=backend)


def _scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    dtype = query.dtype
    in_float32 = uses_float32(query, key.shape[2])
    if in_float32:
        query, key, value = query.float(), key.float(), value.float()
    grouped = query.shape[1] != key.shape[1]
    # Autocast would turn the inputs back.
    with torch.autocast(query.device.type, enabled=False) if in_float32 else nullcontext():
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped
        ).to(dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
    """Softmax attention: query [B, n, T, d], key and value [B, n_kv, S, d], result [B, n, T, d]."""
    if plan.borders is not None:
        return attend_by_borders(query, key, value, plan.borders, plan.backend)
    if plan.document_ids is not None:
        query, key = query.to(value.dtype), key.to(value.dtype)
        mixed: Tensor = attend_documents(query, key, value, plan.document_ids)[0]
        return mixed
    if plan.blocks is not None:
        return attend_by_blocks(query, key, value, plan.blocks)
    if plan.rows is None:
        return _scaled_dot_product(query, key, value, plan.mask, plan.is_causal)
    # Split, not sliced: the gradient of each slice would be a tensor of zeros of the whole batch's size.
    rows: list[Tensor] = []
    for runs, *states in zip(plan.rows, query.split(1), key.split(1), value.split(1), strict=True):
        lengths = [run.end - run.start for run in runs]
        pieces = zip(runs, *(state.split(lengths, dim=2) for state in states), strict=True)
        rows.append(torch.cat([_attend_run(*piece) for piece in pieces], dim=2))
    return torch.cat(rows)


def _attend_run(run: Run, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if run.is_padding:  # attends to itself only: its own value
        return value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return _scaled_dot_product(query, key, value, is_causal=True)


def rotary_frequencies(architecture: Architecture, device: torch.device) -> Tensor:
    """Radians a position for each pair of head dimensions, float32 [d / 2].

    Llama 3 divides the frequencies of wavelengths beyond the original context by `factor`, keeps short ones, and
    interpolates between; the two thresholds are a share of 0 and of 1.
    """
    exponents = torch.arange(0, architecture.head_dim, 2, device=device, dtype=torch.float32) / architecture.head_dim
    frequencies = 1.0 / architecture.rope_theta**exponents
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    periods_in_context = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    share = (periods_in_context - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0.0, 1.0)
    return share * frequencies + (1 - share) * frequencies / scaling.factor


def rotary_table(architecture: Architecture, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions [B, T], float32 [B, 1, T, d]; both halves of d hold the same angles."""
    angles = position_ids[..., None].float() * rotary_frequencies(architecture, position_ids.device)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(states: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate [B, n, T, d] by its positions, in float32, returned in the input's dtype."""
    cosine, sine = table
    values = states.float()
    first, second = values.chunk(2, dim=-1)
    return (values * cosine + torch.cat((-second, first), dim=-1) * sine).to(states.dtype)


class KVCache:
    """Keys and values of the positions seen so far, for a batch of rows of equal (left-padded) length.

    Memory for `max_length` positions a layer is allocated at that layer's first use, in the dtype of its keys.
    """

    def __init__(self, batch_size: int, max_length: int) -> None:
        self.batch_size = batch_size
        self.max_length = max_length
        self.length = 0
        """Positions that all layers hold; `CausalLM.forward` advances it."""
        self.document_ids: Tensor | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend_documents(self, document_ids: Tensor) -> Tensor:
        """Remember the ids of new positions [B, T]; returns those of all positions [B, S]."""
        seen = self.document_ids
        self.document_ids = document_ids if seen is None else torch.cat((seen, document_ids), dim=1)
        return self.document_ids

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write new states [B, n_kv, T, d] after the ones held; returns all of them [B, n_kv, S, d]."""
        if layer not in self._layers:
            shape = (self.batch_size, key.shape[1], self.max_length, key.shape[3])
            self._layers[layer] = (key.new_empty(shape), value.new_empty(shape))
        keys, values = self._layers[layer]
        end = self.length + key.shape[2]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]


class Attention(nn.Module):
    """Grouped-query attention with optional biases, QK-norm and SubLN.

    SubLN names: `attn_sub_norm` before o_proj (placement output); `<projection>_norm` (placement per_projection).
    """

    def __init__(self, architecture: Architecture, bitnet: BitNetSpec | None, layer: int) -> None:
        super().__init__()
        hidden, eps, self.head_dim = architecture.hidden_size, architecture.rms_norm_eps, architecture.head_dim
        query_size = architecture.num_attention_heads * self.head_dim
        key_size = architecture.num_key_value_heads * self.head_dim
        self.layer = layer
        self.q_proj = make_linear(hidden, query_size, architecture.attention_bias, bitnet)
        self.k_proj = make_linear(hidden, key_size, architecture.attention_bias, bitnet)
        self.v_proj = make_linear(hidden, key_size, architecture.attention_bias, bitnet)
        self.o_proj = make_linear(query_size, hidden, architecture.attention_output_bias, bitnet)
        self.q_norm = RMSNorm(self.head_dim, eps) if architecture.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps) if architecture.qk_norm else nn.Identity()
        self.norm_per_projection = bitnet is not None and bitnet.placement == "per_projection"
        self.q_proj_norm = subln_or_identity(self.norm_per_projection, hidden, eps)
        self.k_proj_norm = subln_or_identity(self.norm_per_projection, hidden, eps)
        self.v_proj_norm = subln_or_identity(self.norm_per_projection, hidden, eps)
        self.o_proj_norm = subln_or_identity(self.norm_per_projection, query_size, eps)
        self.attn_sub_norm = subln_or_identity(bitnet is not None and bitnet.placement == "output", query_size, eps)

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor], plan: AttentionPlan, cache: KVCache | None
    ) -> tuple[Tensor, QKV]:
        """[B, T, D] to [B, T, D], and the states of the new positions (after QK-norm and rotation)."""
        if self.norm_per_projection:
            query, key, value = (
                self.q_proj(self.q_proj_norm(x)),
                self.k_proj(self.k_proj_norm(x)),
                self.v_proj(self.v_proj_norm(x)),
            )
        else:
            query, key, value = project(x, (self.q_proj, self.k_proj, self.v_proj))
        states = QKV(
            rotate(self.q_norm(self._split_heads(query)), table),
            rotate(self.k_norm(self._split_heads(key)), table),
            self._split_heads(value),
        )
        key, value = states.key, states.value
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        mixed = attend(states.query, key, value, plan).transpose(1, 2).flatten(2)
        return self.o_proj(self.o_proj_norm(self.attn_sub_norm(mixed))), states

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
