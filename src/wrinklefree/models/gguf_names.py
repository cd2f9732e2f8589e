"""Parameter names and row orders of GGUF files: ours to theirs and back, for the converter and the loader alike.

GGUF names are llama.cpp's. SubLN norms have two spellings: `attn_sub_norm` and `ffn_sub_norm` (architecture bitnet), or
one norm before each projection, `<projection>_norm_in` (the qwen3 of BitNet.cpp). What is normalised is the same.
"""

import re

import numpy as np
from numpy.typing import NDArray

from wrinklefree.models.config import Placement

ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies; they follow from the architecture and are no parameter."""

OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SUB_NORMS = {"self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm"}
INPUT_NORMS = {
    "self_attn.q_proj_norm": "attn_q_norm_in",
    "self_attn.k_proj_norm": "attn_k_norm_in",
    "self_attn.v_proj_norm": "attn_v_norm_in",
    "self_attn.o_proj_norm": "attn_output_norm_in",
    "mlp.gate_proj_norm": "ffn_gate_norm_in",
    "mlp.up_proj_norm": "ffn_up_norm_in",
    "mlp.down_proj_norm": "ffn_down_norm_in",
}
SUB_NORMS_AS_INPUT_NORMS = {"self_attn.attn_sub_norm": "attn_output_norm_in", "mlp.ffn_sub_norm": "ffn_down_norm_in"}
TERNARY_MODULES = frozenset(name for name in INNER if name.endswith("_proj"))
"""Modules of a block whose weights a ternary model quantizes."""

_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")
_STORED_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)")


def module_names(placement: Placement, *, norms_at_inputs: bool) -> dict[str, str]:
    """Modules inside a block, our name -> the file's.

    Args:
        placement: Where SubLN norms stand.
        norms_at_inputs: Whether the file's architecture spells placement `output` as norms of projection inputs.
    """
    if placement == "per_projection":
        return INNER | INPUT_NORMS
    if placement == "output":
        return INNER | (SUB_NORMS_AS_INPUT_NORMS if norms_at_inputs else SUB_NORMS)
    return dict(INNER)


def stored_name(name: str, modules: dict[str, str]) -> str:
    """Our parameter name -> the file's tensor name."""
    stem, _, kind = name.rpartition(".")
    block = _BLOCK.fullmatch(stem)
    return f"{OUTER[stem]}.{kind}" if block is None else f"blk.{block[1]}.{modules[block[2]]}.{kind}"


def our_name(name: str, modules: dict[str, str]) -> str:
    """The file's tensor name -> our parameter name; what has no counterpart keeps its name."""
    stem, _, kind = name.rpartition(".")
    block = _STORED_BLOCK.fullmatch(stem)
    inner = {theirs: ours for ours, theirs in modules.items()}
    if block is not None and block[2] in inner:
        return f"model.layers.{int(block[1])}.{inner[block[2]]}.{kind}"
    outer = {theirs: ours for ours, theirs in OUTER.items()}
    return f"{outer[stem]}.{kind}" if stem in outer else name


def is_ternary_weight(name: str) -> bool:
    """Whether our parameter is a weight that a ternary model quantizes."""
    stem, _, kind = name.rpartition(".")
    block = _BLOCK.fullmatch(stem)
    return kind == "weight" and block is not None and block[2] in TERNARY_MODULES


def rotary_heads(name: str, heads: int, key_value_heads: int) -> int | None:
    """Heads along the rows of a parameter that architecture llama stores in its own order; None for all others."""
    counts = {"q_proj": heads, "k_proj": key_value_heads}
    return counts.get(name.split(".")[-2]) if "." in name else None


def separate_rotary_pairs(values: NDArray, heads: int) -> NDArray:
    """Rows (h, pair, member) -> (h, member, pair), for a weight [heads * d, in] or a bias [heads * d].

    Architecture llama keeps the two members of a rotary pair side by side; Hugging Face, and all other architectures,
    keep the first members of all pairs before the second ones.
    """
    return _swap_rows(values, heads, inner=2)


def join_rotary_pairs(values: NDArray, heads: int) -> NDArray:
    """Rows (h, member, pair) -> (h, pair, member): the inverse of `separate_rotary_pairs`."""
    return _swap_rows(values, heads, inner=values.shape[0] // heads // 2)


def _swap_rows(values: NDArray, heads: int, inner: int) -> NDArray:
    rows = values.reshape(heads, -1, inner, *values.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(values.shape)
