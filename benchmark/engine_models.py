"""Models of real shapes with random weights: for the engine of our own, and as files for stock llama.cpp.

Speed does not depend on the values of weights, so nothing needs to be trained or fetched. The stock files are the fastest
ternary ones that stock builds run: TQ2_0 where rows divide into 256, else hand-packed Q4_0; Q8_0 embedding and head.
"""

import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wrinklefree.models.artifact import write_artifact
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.quantization.weight_quant import Ternary
from wrinklefree.serving.converter import ConversionOptions, convert
from wrinklefree.serving.engine.native.model import HeadType, PackedModel, parameter_shapes
from wrinklefree.utils.tokenizer import TextTokenizer

SHAPES: dict[str, Architecture] = {
    "135m": Architecture(
        family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "1b": Architecture(
        family="llama", vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "4b": Architecture(
        family="qwen3", vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=2048,
        tie_word_embeddings=True, qk_norm=True,
    ),
}  # fmt: skip
"""SmolLM2-135M, a Llama of a billion weights, Qwen3-4B."""

BITNET = BitNetSpec(placement="output", gain="ones", quantization_lambda=1.0)
BLOCK = {"TQ2_0": (256, 66), "Q4_0": (32, 18), "Q8_0": (32, 34)}


def packed(name: str, head: HeadType = "int8") -> PackedModel:
    """The model for our engine, SubLN included."""
    return PackedModel.from_tensors(SHAPES[name], BITNET, _random_tensors(SHAPES[name]), head)


def _random_tensors(architecture: Architecture) -> Iterator[tuple[str, Tensor | Ternary]]:
    random = torch.Generator().manual_seed(0)
    for name, shape in parameter_shapes(architecture, BITNET).items():
        if name.endswith("_proj.weight"):
            codes = torch.randint(-1, 2, shape, generator=random, dtype=torch.int8)
            yield name, Ternary(codes, torch.tensor(1.2 / shape[1] ** 0.5))
        elif len(shape) == 2:
            yield name, torch.randn(shape, generator=random, dtype=torch.float16)
        else:
            yield name, torch.ones(shape)


def write_ours(name: str, path: Path) -> None:
    """The model as our own converter writes it, out of a checkpoint in bfloat16."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = CausalLM(SHAPES[name], BITNET)
    finally:
        torch.set_default_dtype(default)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        tokenizer = TextTokenizer.from_folder(files("wrinklefree") / "assets" / "tiny")  # pyright: ignore[reportArgumentType]
        write_artifact(Path(folder) / "model", model, tokenizer, {"stage": "stage2", "tokens": 0})
        del model
        convert(ConversionOptions(Path(folder) / "model", path, verify=False))


def write_stock(name: str, path: Path, block: str | None = None) -> None:
    """The model for llama.cpp: architecture bitnet (with SubLN) where it fits, else qwen3 (which has no place for it).

    All matrices have the type `block`; None takes the fastest ternary one and Q8_0.
    """
    architecture = SHAPES[name]
    kind = "bitnet" if architecture.family == "llama" else "qwen3"
    writer = gguf.GGUFWriter(str(path), kind)
    writer.add_context_length(architecture.max_position_embeddings)
    writer.add_embedding_length(architecture.hidden_size)
    writer.add_block_count(architecture.num_hidden_layers)
    writer.add_feed_forward_length(architecture.intermediate_size)
    writer.add_head_count(architecture.num_attention_heads)
    writer.add_head_count_kv(architecture.num_key_value_heads)
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    writer.add_layer_norm_rms_eps(architecture.rms_norm_eps)
    writer.add_rope_freq_base(architecture.rope_theta)
    writer.add_rope_dimension_count(architecture.head_dim)
    writer.add_vocab_size(architecture.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{index}" for index in range(architecture.vocab_size)])
    writer.add_token_types([1] * architecture.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(0)
    for stored, shape in _stock_shapes(architecture, kind).items():
        if len(shape) == 1:
            writer.add_tensor(stored, np.ones(shape, np.float32))
            continue
        if block == "F16":
            writer.add_tensor(stored, np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float16))
            continue
        embedding = stored == "token_embd.weight"
        chosen = block or ("Q8_0" if embedding else "TQ2_0" if shape[1] % 256 == 0 else "Q4_0")
        writer.add_tensor(stored, _random_blocks(shape, chosen), raw_dtype=gguf.GGMLQuantizationType[chosen])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stock_shapes(architecture: Architecture, kind: str) -> dict[str, tuple[int, ...]]:
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
        "self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm",
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(architecture, BITNET).items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            if "sub_norm" not in rest or kind == "bitnet":
                shapes[f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"] = shape
        else:
            shapes[{"model.embed_tokens.weight": "token_embd.weight"}.get(name, "output_norm.weight")] = shape
    return shapes


def _random_blocks(shape: tuple[int, ...], block: str) -> NDArray[np.uint8]:
    """Random codes of a block format with one scale; values -1, 0, 1 times it for the ternary ones."""
    weights, size = BLOCK[block]
    random = np.random.default_rng(shape[1])
    blocks = np.empty((shape[0] * shape[1] // weights, size), np.uint8)
    scale = np.frombuffer(np.float16(1.2 / shape[1] ** 0.5).tobytes(), np.uint8)
    if block == "TQ2_0":
        codes = random.integers(0, 3, (len(blocks), 4, 64), dtype=np.uint8)
        blocks[:, :64] = codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4 | codes[:, 3] << 6
        blocks[:, 64:] = scale
    elif block == "Q4_0":
        codes = random.integers(7, 10, (len(blocks), 2, 16), dtype=np.uint8)
        blocks[:, :2] = scale
        blocks[:, 2:] = codes[:, 0] | codes[:, 1] << 4
    else:
        blocks[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        blocks[:, 2:] = random.integers(0, 256, (len(blocks), 32), dtype=np.uint8)
    return blocks.reshape(shape[0], -1)
