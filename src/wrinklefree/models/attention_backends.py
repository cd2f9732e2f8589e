"""Kernels that keep packed documents apart on a GPU, and the choice of one of them.

A mask works everywhere but computes all the blocks that it then discards: 1.4 to 5 times the work on packed rows. Kernels
for documents of varying length are told where each begins instead:

- `varlen`: torch's own (`torch.nn.attention.varlen`), in 16 bit;
- `flash`: the package flash-attn, in 16 bit;
- `flex`: FlexAttention with a block mask, compiled, in any type.

`sdpa`, the fallback, is the mask on a GPU and, on a CPU, a loop over documents where rows are long. The choice is made
once: a candidate must reproduce the masked kernel's values and gradients on a small batch on this very device, or it is
passed over (or refused, where it was asked for by name).

Not tried on a GPU by us yet: the check at the start is what stands between a moved signature and a wrong model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from wrinklefree.models.records import Borders, find_borders
from wrinklefree.utils.errors import ConfigError

AttentionBackend = Literal["sdpa", "varlen", "flash", "flex"]

CHECK_TOLERANCE = 3e-2
"""Largest difference from the masked kernel, relative to the largest value: a few roundings of bfloat16. A leak across a
border is of the order of 1."""
_HALF = (torch.bfloat16, torch.float16)

Kernel = Callable[[Tensor, Tensor, Tensor, Borders], Tensor]
"""Query [P, n, d], key and value [P, n_kv, d] of all P positions end to end, and the borders -> [P, n, d], causal."""


@dataclass(frozen=True)
class ChosenBackend:
    """A backend that works here, and why it was taken."""

    name: AttentionBackend
    reason: str


def choose_backend(
    wanted: AttentionBackend | Literal["auto"], *, device: torch.device, dtype: torch.dtype, heads: tuple[int, int],
    head_dim: int,
) -> ChosenBackend:  # fmt: skip
    """The backend for training on `device` in `dtype`, with (query heads, key heads) of `head_dim`.

    Raises:
        ConfigError: the one that was asked for does not work here.
    """
    if wanted == "sdpa":
        return ChosenBackend("sdpa", "asked for")
    candidates: tuple[AttentionBackend, ...] = ("varlen", "flash") if wanted == "auto" else (wanted,)
    failures: list[str] = []
    for name in candidates:
        problem = _problem(name, device=device, dtype=dtype, heads=heads, head_dim=head_dim)
        if problem is None:
            return ChosenBackend(name, "equals the masked kernel on this device")
        failures.append(f"{name}: {problem}")
    if wanted != "auto":
        raise ConfigError(f"packing.attention={wanted} does not work here ({failures[0]}); use packing.attention=auto")
    where = "a loop over documents, or a mask in short rows" if device.type == "cpu" else "; ".join(failures)
    return ChosenBackend("sdpa", where)


def attend_by_borders(query: Tensor, key: Tensor, value: Tensor, borders: Borders, backend: AttentionBackend) -> Tensor:
    """Causal attention within each document of a batch of rows.

    Query [B, n, T, d], key and value [B, n_kv, T, d], result [B, n, T, d] in the type of the values. Padding is a document
    of its own here: its results are finite and mean nothing.
    """
    # Rotation and norms may hand out wider types; these kernels take one 16-bit type only.
    dtype = value.dtype if value.dtype in _HALF else torch.get_autocast_dtype(value.device.type)
    flat_query, flat_key, flat_value = (x.to(dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    mixed = kernel_of(backend)(flat_query, flat_key, flat_value, borders)
    return mixed.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2).to(value.dtype)


def block_mask(document_ids: Tensor) -> Any:
    """FlexAttention's mask for rows [B, T]: the same run of one document id, not later. Never waits for the device."""
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    runs = functional.pad(changes.cumsum(dim=1), (1, 0))

    def may_look(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (runs[row, query] == runs[row, key]) & (query >= key)

    rows, length = document_ids.shape
    flex = import_module("torch.nn.attention.flex_attention")
    return flex.create_block_mask(may_look, rows, None, length, length, device=document_ids.device)


def attend_by_blocks(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    """FlexAttention, compiled once: [B, n, T, d] and [B, n_kv, T, d] to [B, n, T, d] in the type of the values."""
    grouped = query.shape[1] != key.shape[1]
    states = (query.to(value.dtype), key.to(value.dtype), value)
    return _flex_attention(value.device.type)(*states, block_mask=mask, enable_gqa=grouped)


@cache
def kernel_of(backend: AttentionBackend) -> Kernel:
    """The kernel behind `varlen` or `flash`, its signature evened out.

    Raises:
        ImportError: it is not installed.
    """
    if backend == "flash":
        flash = import_module("flash_attn").flash_attn_varlen_func

        def by_package(query: Tensor, key: Tensor, value: Tensor, borders: Borders) -> Tensor:
            at, longest = borders.cumulative, borders.longest
            return flash(query, key, value, at, at, longest, longest, causal=True)

        return by_package
    varlen = import_module("torch.nn.attention.varlen").varlen_attn

    def by_torch(query: Tensor, key: Tensor, value: Tensor, borders: Borders) -> Tensor:
        at, longest = borders.cumulative, borders.longest
        grouped = query.shape[1] != key.shape[1]
        # A window of nothing to the right is what this function calls causal.
        return varlen(query, key, value, at, at, longest, longest, window_size=(-1, 0), enable_gqa=grouped)

    return by_torch


@cache
def _flex_attention(device_type: str) -> Callable[..., Any]:
    attention = import_module("torch.nn.attention.flex_attention").flex_attention
    # Uncompiled it builds the whole score matrix, which is as right and serves a CPU's tests.
    return attention if device_type == "cpu" else torch.compile(attention, dynamic=False)


def _problem(
    name: AttentionBackend, *, device: torch.device, dtype: torch.dtype, heads: tuple[int, int], head_dim: int
) -> str | None:
    """Why a backend cannot be used here; None if its values and gradients are those of the masked kernel."""
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if name != "flex" and dtype not in _HALF:
        return f"computes in 16 bit, training.dtype is {str(dtype).removeprefix('torch.')}"
    try:
        difference = difference_from_mask(name, device=device, dtype=dtype, heads=heads, head_dim=head_dim)
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises here means that it cannot be used here
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    if not difference <= CHECK_TOLERANCE:
        return f"differs from the masked kernel by {difference:.2g}"
    return None


def difference_from_mask(
    name: AttentionBackend, *, device: torch.device, dtype: torch.dtype, heads: tuple[int, int], head_dim: int
) -> float:
    """Largest difference of values and gradients from a masked kernel, relative to the largest value of each."""
    generator = torch.Generator().manual_seed(0)
    length = 256
    document_ids = torch.ones(2, length, dtype=torch.int64)
    document_ids[0, 100:] = 2
    document_ids[0, 101:] = 3
    document_ids[1, 37:] = 2
    document_ids[1, 200:] = 0
    sizes = (heads[0], heads[1], heads[1], heads[0])
    made = [torch.randn(2, count, length, head_dim, generator=generator).to(device, dtype) for count in sizes]
    # Padding means nothing: it must not count either way.
    slope = made.pop() * (document_ids != 0)[:, None, :, None].to(device, dtype)
    results: list[list[Tensor]] = []
    for masked in (False, True):
        query, key, value = states = [state.clone().requires_grad_() for state in made]
        attend = _masked if masked else partial(_by_name, name)
        output = attend(query, key, value, document_ids)
        (output * slope).sum().backward()
        results.append([output.detach() * (slope != 0), *(state.grad for state in states if state.grad is not None)])
    pairs = zip(*results, strict=True)
    return max(float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs)


def _by_name(name: AttentionBackend, query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor) -> Tensor:
    if name == "flex":
        return attend_by_blocks(query, key, value, block_mask(document_ids.to(value.device)))
    return attend_by_borders(query, key, value, find_borders(document_ids).to(value.device), name)


def _masked(query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor) -> Tensor:
    ids = document_ids.to(query.device)
    earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=query.device).tril()
    mask = (ids[:, None, :, None] == ids[:, None, None, :]) & earlier
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
