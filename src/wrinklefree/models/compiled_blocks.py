"""One compiled function for all blocks of a model, and which forward passes it serves.

Blocks differ in their weights only, so one graph serves all of them; lambda is a tensor, documents are a tensor
(`attention.plan_for_compiled`), and weight codes come from outside (`bitlinear.prepare_codes`), so it also serves all
batches and a whole warm-up. At lambda = 1 the function is another one: a second graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wrinklefree.models.attention import AttentionPlan, KVCache
from wrinklefree.models.records import QKV, Batch

RunBlock = Callable[[nn.Module, Tensor, tuple[Tensor, Tensor], AttentionPlan, KVCache | None], tuple[Tensor, QKV]]
"""Calls a block with the arguments of its forward pass."""


def run_block(
    block: nn.Module, x: Tensor, table: tuple[Tensor, Tensor], plan: AttentionPlan, cache: KVCache | None
) -> tuple[Tensor, QKV]:
    """The block's forward pass, as it is."""
    result: tuple[Tensor, QKV] = block(x, table, plan, cache)
    return result


@dataclass(frozen=True)
class CompiledBlocks:
    """The compiled function, and the calls that it is for."""

    run: RunBlock
    shape: tuple[int, int]
    """Rows and length of a batch."""
    gradients: bool
    """For training, with gradients and in training mode; or for a teacher, without."""

    def serves(self, batch: Batch, cache: KVCache | None, *, training: bool) -> bool:
        """Whether a forward pass would need no graph but the one there is.

        In eval mode with gradients somebody measures: influence reads the layers' inputs with hooks.
        """
        if cache is not None or self.gradients != torch.is_grad_enabled() or (self.gradients and not training):
            return False
        return tuple(batch.input_ids.shape) == self.shape


def compile_run_block(rows: int, length: int, *, gradients: bool, compiler: Any = "inductor") -> CompiledBlocks:
    """Compile `run_block`; graphs are made when it first runs.

    Args:
        rows: Of a batch.
        length: Of a row.
        gradients: See `CompiledBlocks`.
        compiler: Name of a torch.compile backend, or one itself.
    """
    run: Any = torch.compile(run_block, fullgraph=True, backend=compiler)
    return CompiledBlocks(run, (rows, length), gradients)
