"""One decoder for Llama, SmolLM2, Qwen2.5 and Qwen3, full precision or ternary.

Families differ in the fields of `Architecture` only. Parameter names are Hugging Face's, so a checkpoint loads by name;
SubLN norms are the only additions. Parameters are float32 masters; whoever calls opens autocast for bfloat16.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from wrinklefree.models.attention import (
    Attention,
    AttentionPlan,
    KVCache,
    plan_attention,
    plan_for_compiled,
    rotary_table,
)
from wrinklefree.models.attention_backends import AttentionBackend
from wrinklefree.models.bitlinear import BitLinear, prepare_codes, set_quantization
from wrinklefree.models.compiled_blocks import CompiledBlocks, compile_run_block, run_block
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.ffn import FeedForward
from wrinklefree.models.records import QKV, Batch, ModelOutput, Wants
from wrinklefree.models.subln import RMSNorm, set_subln_strength

INITIAL_STD = 0.02

Checkpointing = Literal["off", "selective", "full"]
"""What a block's backward pass computes again instead of having kept it: nothing; all but matrix products and
attention, which cost most to repeat; everything."""


def _keep_products(context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.wrinklefree.ternary_product.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}
_WHAT_IS_KEPT: dict[str, dict[str, Any]] = {
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, _keep_products)},
    "full": {},
}


class Block(nn.Module):
    """Pre-norm attention and feed-forward network, each added to the residual stream."""

    def __init__(self, architecture: Architecture, bitnet: BitNetSpec | None, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)
        self.self_attn = Attention(architecture, bitnet, layer)
        self.post_attention_layernorm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)
        self.mlp = FeedForward(architecture, bitnet)

    def forward(
        self, x: Tensor, table: tuple[Tensor, Tensor], plan: AttentionPlan, cache: KVCache | None
    ) -> tuple[Tensor, QKV]:
        """[B, T, D] to [B, T, D], and this block's attention states."""
        mixed, states = self.self_attn(self.input_layernorm(x), table, plan, cache)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), states


class Decoder(nn.Module):
    """What Hugging Face calls `model`: embedding, blocks, final norm."""

    def __init__(self, architecture: Architecture, bitnet: BitNetSpec | None) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(architecture.vocab_size, architecture.hidden_size)
        self.layers = nn.ModuleList(
            Block(architecture, bitnet, layer) for layer in range(architecture.num_hidden_layers)
        )
        self.norm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)


class CausalLM(nn.Module):
    """A language model over packed rows.

    Quantization lambda and SubLN strength start at what the spec records. Random weights are ready for training from
    scratch: normal, 0.02, with the projections that write the residual stream divided by sqrt(2 L).
    """

    def __init__(self, architecture: Architecture, bitnet: BitNetSpec | None = None) -> None:
        super().__init__()
        self.architecture = architecture
        self.bitnet = bitnet
        self._checkpointing: Checkpointing = "off"
        self.attention_backend: AttentionBackend = "sdpa"
        """What keeps packed documents apart; see `choose_backend`."""
        self._compiled: CompiledBlocks | None = None
        self.model = Decoder(architecture, bitnet)
        self.lm_head: nn.Linear | None = None
        if not architecture.tie_word_embeddings:
            self.lm_head = nn.Linear(architecture.hidden_size, architecture.vocab_size, bias=False)
        self._initialise()
        if bitnet is not None:
            set_quantization(self, bitnet.quantization_lambda)
            set_subln_strength(self, bitnet.subln_strength)

    def _initialise(self) -> None:
        residual_std = INITIAL_STD / math.sqrt(2 * self.architecture.num_hidden_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_STD)
            elif isinstance(module, nn.Linear):
                std = residual_std if name.endswith(("o_proj", "down_proj")) else INITIAL_STD
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def activation_checkpointing(self) -> Checkpointing:
        """What the backward pass of a block computes again."""
        return self._checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, mode: Checkpointing) -> None:
        self._checkpointing = mode
        for module in self.modules():
            if isinstance(module, BitLinear):
                module.overwrites_products = mode != "selective"

    def compile_blocks(self, rows: int, length: int, *, gradients: bool, compiler: Any = "inductor") -> None:
        """Compile the blocks' function, once for all of them, for batches of this shape.

        It serves forward passes with gradients in training mode, or those without, as `gradients` says; batches of another
        shape, with a cache, or of the other kind run as they are, so no evaluation ever causes a new graph. Not for
        `attention_backend` flex.
        """
        self._compiled = compile_run_block(rows, length, gradients=gradients, compiler=compiler)

    def forget_compiled(self) -> None:
        """Undo `compile_blocks`."""
        self._compiled = None

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Run the blocks as they are for a while."""
        compiled, self._compiled = self._compiled, None
        try:
            yield
        finally:
            self._compiled = compiled

    @property
    def blocks(self) -> Sequence[Block]:
        """The decoder's blocks, first to last: the unit of checkpointing, compiling and sharding."""
        return cast("Sequence[Block]", self.model.layers)

    @property
    def block_names(self) -> list[str]:
        """Module paths of the blocks."""
        return [f"model.layers.{index}" for index in range(len(self.model.layers))]

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the head's weight, or the embedding's where they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def is_ternary(self) -> bool:
        """Whether the linear layers of the blocks are BitLinears."""
        return self.bitnet is not None

    def forward(self, batch: Batch, wants: Wants = Wants(), cache: KVCache | None = None) -> ModelOutput:  # noqa: B008
        """Hidden states of a batch, and what the objective wants beyond them.

        With a cache, the batch holds the positions that follow the cached ones; `position_ids` and `document_ids`
        continue those of the earlier calls.
        """
        table = rotary_table(self.architecture, batch.position_ids)
        document_ids = batch.document_ids if cache is None else cache.extend_documents(batch.document_ids)
        borders = batch.borders if cache is None and self.attention_backend in ("varlen", "flash") else None
        compiled = self._compiled
        if compiled is not None and compiled.serves(batch, cache, training=self.training):
            prepare_codes(self)
            plan = plan_for_compiled(document_ids, backend=self.attention_backend, borders=borders)
            run = compiled.run
        else:
            queries = batch.input_ids.shape[1]
            plan = plan_attention(document_ids, queries, backend=self.attention_backend, borders=borders)
            run = run_block
        hidden = functional.embedding(batch.input_ids, self.model.embed_tokens.weight)
        hidden_states: dict[int, Tensor] = {}
        qkv: QKV | None = None
        for index, block in enumerate(self.blocks):
            if self._checkpointing != "off" and torch.is_grad_enabled():
                recomputed = checkpoint(
                    run, block, hidden, table, plan, cache, use_reentrant=False, **_WHAT_IS_KEPT[self._checkpointing]
                )
                hidden, states = cast("tuple[Tensor, QKV]", recomputed)
            else:
                hidden, states = run(block, hidden, table, plan, cache)
            if index in wants.hidden_layers:
                hidden_states[index] = hidden
            if index == wants.qkv_layer:
                qkv = states
        if cache is not None:
            cache.length += batch.input_ids.shape[1]
        return ModelOutput(self.model.norm(hidden), self.head_weight, self.model.norm, hidden_states, qkv)
