"""Records that cross layers: a batch in, what an objective wants, what a model hands out.

Shapes: B rows, T positions a row, D hidden size, V vocabulary, n heads, d head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

IGNORE = -100
"""Label of a position that is not a target."""


@dataclass(frozen=True)
class Borders:
    """Where documents begin in the positions of a batch, row after row; a row's end is a border too."""

    cumulative: Tensor
    """int32 [N + 1]: the first position of each of N documents (padding counts as one), and the number of positions."""
    longest: int

    def to(self, device: torch.device | str) -> "Borders":
        """The same on another device."""
        return Borders(self.cumulative.to(device, non_blocking=True), self.longest)


def find_borders(document_ids: Tensor) -> Borders:
    """Borders of rows [B, T]; waits for the device if they are on one."""
    starts = (
        functional.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True).flatten().nonzero().flatten()
    )
    cumulative = torch.cat((starts, starts.new_tensor([document_ids.numel()]))).to(torch.int32)
    return Borders(cumulative, int(cumulative.diff().max()))


@dataclass(frozen=True)
class Batch:
    """Packed rows of tokens. All fields are [B, T] integer tensors."""

    input_ids: Tensor
    labels: Tensor
    """`labels[b, t]` is the token that position t must predict (already shifted), or `IGNORE`."""
    position_ids: Tensor
    """Restart at 0 with each document."""
    document_ids: Tensor
    """0 is padding; 1, 2, ... number the documents of a row. Attention never crosses a change."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device (asynchronous from pinned memory); it still knows its targets and borders."""
        moved = replace(self, **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})
        moved.__dict__["num_targets"] = self.num_targets
        if moved.input_ids.device != self.input_ids.device:
            moved.__dict__["borders"] = self.borders.to(device)
        return moved

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, from where it goes to a GPU without waiting."""
        pinned = replace(self, **{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})
        pinned.__dict__["num_targets"] = self.num_targets
        return pinned

    @cached_property
    def borders(self) -> Borders:
        """Where documents begin. Found once, on the CPU copy, as `num_targets` is."""
        return find_borders(self.document_ids)

    @cached_property
    def num_targets(self) -> int:
        """Targets in the batch. Counted once, on the CPU copy: `.to` hands the number on, so no device synchronises."""
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True)
class Wants:
    """What an objective asks of a forward pass, beyond the final hidden state."""

    hidden_layers: tuple[int, ...] = ()
    """Block outputs to hand out: 0 is the first block's, `num_hidden_layers - 1` the last's (before the norm)."""
    qkv_layer: int | None = None
    """Block whose Q, K, V states are handed out (after q/k-norm and RoPE; K and V before GQA repetition)."""


@dataclass(frozen=True)
class QKV:
    """Attention states of one block: query [B, n, T, d]; key and value [B, n_kv, T, d]."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class ModelOutput:
    """A forward pass. Logits are `hidden @ head_weight.T`: objectives compute them in chunks, at targets only."""

    hidden: Tensor
    """[B, T, D], after the final norm."""
    head_weight: Tensor
    """[V, D]; the embedding when tied."""
    final_norm: Callable[[Tensor], Tensor]
    """For the logit lens: block output -> head input."""
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    """Block index -> [B, T, D], the layers asked for."""
    qkv: QKV | None = None

    def logits(self) -> Tensor:
        """All logits [B, T, V]; for evaluation and generation, not for training."""
        return self.hidden @ self.head_weight.to(self.hidden.dtype).T
