"""Weights and dimensions out of a GGUF file: llama.cpp's names and layouts to ours."""

import re
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from wrinklefree.models.config import Architecture
from wrinklefree.models.weights import EMBEDDING, HEAD
from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.gguf import GGUFFile

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)")
_FAMILIES = ("llama", "qwen2", "qwen3")


def architecture_from_gguf(file: GGUFFile) -> Architecture:
    """Dimensions and switches from the metadata and from which tensors there are.

    Raises:
        CheckpointError: the file holds a model of a family that we do not have.
    """
    family = file.text("general.architecture")
    if family not in _FAMILIES:
        raise CheckpointError(f"{file.path} holds a {family} model; readable are {', '.join(_FAMILIES)}")
    hidden_size, heads = file.integer(f"{family}.embedding_length"), file.integer(f"{family}.attention.head_count")
    if hidden_size <= 0 or heads <= 0 or file.integer(f"{family}.attention.head_count_kv") <= 0:
        raise CheckpointError(f"{file.path} announces {heads} heads and {hidden_size} hidden dimensions; it is damaged")
    head_dim_key = f"{family}.attention.key_length"
    if EMBEDDING not in (tensors := _named_tensors(file)).values():
        raise CheckpointError(f"{file.path} has no token_embd.weight; it is not a complete language model")
    bias = "model.layers.0.self_attn.{}_proj.bias"
    ours = set(tensors.values())
    return Architecture(
        family=family,  # pyright: ignore[reportArgumentType] - checked above
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden_size,
        intermediate_size=file.integer(f"{family}.feed_forward_length"),
        num_hidden_layers=file.integer(f"{family}.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=file.integer(f"{family}.attention.head_count_kv"),
        head_dim=file.integer(head_dim_key) if head_dim_key in file.metadata else hidden_size // heads,
        max_position_embeddings=file.integer(f"{family}.context_length"),
        rope_theta=_shortest(file.number(f"{family}.rope.freq_base")),
        rms_norm_eps=_shortest(file.number(f"{family}.attention.layer_norm_rms_epsilon")),
        tie_word_embeddings=HEAD not in ours,
        attention_bias=bias.format("q") in ours,
        attention_output_bias=bias.format("o") in ours,
        mlp_bias="model.layers.0.mlp.down_proj.bias" in ours,
        qk_norm="model.layers.0.self_attn.q_norm.weight" in ours,
    )


def tensors_from_gguf(file: GGUFFile, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Our names and float32 tensors, one at a time.

    llama.cpp stores q and k of the llama family with the rotary pairs of each head side by side; ours, as Hugging
    Face's, keeps the first members of all pairs before the second ones.
    """
    heads = {"q_proj": architecture.num_attention_heads, "k_proj": architecture.num_key_value_heads}
    for stored, name in _named_tensors(file).items():
        values = file.tensor(stored)
        projection = name.rpartition(".")[0].rpartition(".")[2]
        fits = projection in heads and values.shape[0] == heads[projection] * architecture.head_dim
        if architecture.family == "llama" and fits:
            values = separate_rotary_pairs(values, heads[projection])
        yield name, torch.from_numpy(values)


def separate_rotary_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows (h, pair, member) -> (h, member, pair), for a weight [heads * d, in] or a bias [heads * d]."""
    rest = values.shape[1:]
    pairs = values.reshape(heads, -1, 2, *rest)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _named_tensors(file: GGUFFile) -> Mapping[str, str]:
    """Stored name -> our name; what has no counterpart keeps its name and is refused as unexpected later."""
    return {name: _our_name(name) for name in file.tensors}


def _our_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    block = _BLOCK_NAME.fullmatch(stem)
    if block is not None and block[2] in _INNER:
        return f"model.layers.{int(block[1])}.{_INNER[block[2]]}.{kind}"
    return f"{_OUTER[stem]}.{kind}" if stem in _OUTER else name


def _shortest(value: float) -> float:
    """The number that was meant: 1e-05, where the file's float32 reads 9.999999747e-06."""
    return float(str(np.float32(value)))
