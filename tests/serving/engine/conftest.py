"""The shipped tiny model, as it is and as a GGUF file written with the reference package."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from wrinklefree.models.artifact import Artifact
from wrinklefree.models.llama import CausalLM
from wrinklefree.utils.tokenizer import TextTokenizer

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="session")
def model(tiny: Artifact) -> CausalLM:
    return tiny.load_model()


@pytest.fixture(scope="session")
def prompt(tokenizer: TextTokenizer) -> list[int]:
    return tokenizer.encode("The sea was calm and the")


@pytest.fixture(scope="session")
def tiny_gguf(tiny: Artifact, tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An F32 file of architecture llama, which every engine holds."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    architecture = tiny.architecture
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(architecture.max_position_embeddings)
    writer.add_embedding_length(architecture.hidden_size)
    writer.add_block_count(architecture.num_hidden_layers)
    writer.add_feed_forward_length(architecture.intermediate_size)
    writer.add_head_count(architecture.num_attention_heads)
    writer.add_head_count_kv(architecture.num_key_value_heads)
    writer.add_layer_norm_rms_eps(architecture.rms_norm_eps)
    writer.add_rope_freq_base(architecture.rope_theta)
    writer.add_rope_dimension_count(architecture.head_dim)
    writer.add_vocab_size(architecture.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([tokenizer.token(index) or "" for index in range(architecture.vocab_size)])
    eos = tokenizer.eos_token_id
    writer.add_token_types([3 if index == eos else 1 for index in range(architecture.vocab_size)])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.json)["model"]["merges"]])
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(False)
    heads = {"attn_q": architecture.num_attention_heads, "attn_k": architecture.num_key_value_heads}
    for name, parameter in tiny.load_model().named_parameters():
        values = parameter.detach().numpy()
        stored = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(name)
        if stored is None:
            _, _, layer, rest = name.split(".", 3)
            kind = NAMES[rest.removesuffix(".weight")]
            if kind in heads:  # llama.cpp keeps the members of a rotary pair side by side
                values = values.reshape(heads[kind], 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            stored = f"blk.{layer}.{kind}.weight"
        writer.add_tensor(stored, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


WriteHeader = Callable[..., Path]


@pytest.fixture
def write_header(tmp_path: Path) -> WriteHeader:
    """A small file with a header that says what a test needs; its weights mean nothing."""

    def write(
        architecture: str = "bitnet",
        *,
        tensors: dict[str, np.ndarray] | None = None,
        raw_types: dict[str, gguf.GGMLQuantizationType] | None = None,
        metadata: dict[str, str | int] | None = None,
    ) -> Path:
        path = tmp_path / f"{architecture}.gguf"
        writer = gguf.GGUFWriter(str(path), architecture)
        writer.add_context_length(64)
        writer.add_embedding_length(32)
        writer.add_block_count(1)
        writer.add_feed_forward_length(64)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-5)
        for key, value in (metadata or {}).items():
            if isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_uint32(key, value)
        writer.add_token_list(["a", "b", "c"])
        writer.add_token_types([1, 1, 3])
        everything = {
            "token_embd.weight": np.zeros((3, 32), np.float32),
            "blk.0.attn_norm.weight": np.ones(32, np.float32),
        }
        everything |= tensors or {}
        for name, values in everything.items():
            kind = (raw_types or {}).get(name)
            writer.add_tensor(name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
