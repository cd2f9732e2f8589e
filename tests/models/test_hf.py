"""Hugging Face configs and folders, in and out; the packaged SmolLM2 against `transformers`."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from wrinklefree.models import hf
from wrinklefree.models.artifact import write_artifact
from wrinklefree.models.config import Architecture, BitNetSpec, ModelConfig, RopeScaling
from wrinklefree.models.gguf_weights import separate_rotary_pairs
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.utils import assets
from wrinklefree.utils.errors import CheckpointError, ConfigError, NetworkError
from wrinklefree.utils.tokenizer import TextTokenizer, train_tokenizer

LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def small(**changes: Any) -> Architecture:
    values: dict[str, Any] = {
        "family": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    return Architecture(**{**values, **changes})


ARCHITECTURES = [
    small(tie_word_embeddings=True),
    small(rope_scaling=LLAMA3, rope_theta=500000.0, attention_bias=True, attention_output_bias=True, mlp_bias=True),
    small(family="qwen2", attention_bias=True, rms_norm_eps=1e-6),
    small(family="qwen3", qk_norm=True, rope_theta=1e6),
]
IDS = ["tied llama", "llama with biases and scaling", "qwen2", "qwen3"]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(["some words and some more words of text"] * 3, 262)


def path_config(folder: Path, architecture: Architecture) -> ModelConfig:
    return ModelConfig(name="small", source="path", path=str(folder), architecture=architecture)


@pytest.fixture
def saved(tmp_path: Path, tokenizer: TextTokenizer) -> tuple[Path, CausalLM]:
    torch.manual_seed(1)
    model = CausalLM(small())
    hf.save_hf(model, tmp_path / "saved", tokenizer)
    return tmp_path / "saved", model


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=IDS)
def test_configs_survive_the_round_trip(architecture: Architecture) -> None:
    assert hf.architecture_from_hf(hf.architecture_to_hf(architecture)) == architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=IDS)
def test_transformers_loads_what_we_save_and_we_load_what_it_saves(
    architecture: Architecture, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    model = CausalLM(architecture).eval()
    hf.save_hf(model, tmp_path / "ours", tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    ids = torch.randint(0, 300, (2, 40))
    batch = Batch(ids, ids, torch.arange(40).expand(2, 40), torch.ones_like(ids))
    with torch.no_grad():
        torch.testing.assert_close(model(batch).logits(), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    again, _ = hf.load_pretrained(path_config(tmp_path / "theirs", architecture))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_silent_keys_have_the_defaults_of_hugging_face() -> None:
    config = {
        "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    architecture = hf.architecture_from_hf(config)
    assert architecture == small(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4,
        max_position_embeddings=2048, rms_norm_eps=1e-6,
    )  # fmt: skip
    newer = {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert hf.architecture_from_hf(newer).rope_theta == 5e5
    del config["hidden_size"]
    with pytest.raises(CheckpointError, match=r"config\.json lacks hidden_size"):
        hf.architecture_from_hf(config)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are llama, qwen2, qwen3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling of type 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "without low_freq_factor, high_freq_factor"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["sliding_attention"]}, "sliding-window"),
        ({"quantization_config": {"bits": 4}}, "quantized already"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_would_change_the_computation_is_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        hf.architecture_from_hf(hf.architecture_to_hf(small()) | change)


def test_switches_that_a_family_lacks_are_refused_on_export() -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM cannot express .* qk_norm=True"):
        hf.architecture_to_hf(small(qk_norm=True))
    with pytest.raises(ConfigError, match="Qwen2ForCausalLM cannot express"):
        hf.architecture_to_hf(small(family="qwen2"))
    with pytest.raises(ConfigError, match="this one is ternary"):
        hf.save_hf(CausalLM(small(), BitNetSpec(placement="none", gain="ones")), "nowhere")


def test_sharded_checkpoints_load_and_a_lost_shard_is_named(saved: tuple[Path, CausalLM]) -> None:
    folder, model = saved
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded, _ = hf.load_pretrained(path_config(folder, small()))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 weight files \(first: model-1\.safetensors\)"):
        hf.load_pretrained(path_config(folder, small()))


def test_damaged_and_foreign_folders_are_named(saved: tuple[Path, CausalLM], tmp_path: Path) -> None:
    folder, _ = saved
    with pytest.raises(CheckpointError, match="num_hidden_layers is 2, model.architecture says 3; choose model="):
        hf.load_pretrained(path_config(folder, small(num_hidden_layers=3)))
    with pytest.raises(CheckpointError, match="tokenizer of model=small has 262 tokens and the model only 200"):
        shrunk = small(vocab_size=200)
        hf.save_hf(CausalLM(shrunk), tmp_path / "shrunk", TextTokenizer.from_folder(folder))
        hf.load_pretrained(path_config(tmp_path / "shrunk", shrunk))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        hf.load_pretrained(path_config(folder, small()))
    weights.unlink()
    with pytest.raises(CheckpointError, match="has neither model.safetensors nor"):
        hf.load_pretrained(path_config(folder, small()))
    with pytest.raises(CheckpointError, match="is not a folder"):
        hf.load_pretrained(path_config(tmp_path / "absent", small()))


def test_an_artifact_is_a_pretrained_model_too(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    model = CausalLM(small())
    artifact = write_artifact(tmp_path / "artifact", model, tokenizer, {})
    config = path_config(tmp_path / "artifact", small())
    loaded, _ = hf.load_pretrained(config)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert hf.identity(config) == f"artifact:{artifact.fingerprint}"
    ternary = CausalLM(small(), BitNetSpec(placement="none", gain="ones"))
    write_artifact(tmp_path / "ternary", ternary, tokenizer, {})
    with pytest.raises(CheckpointError, match="holds a ternary model"):
        hf.load_pretrained(path_config(tmp_path / "ternary", small()))


def test_identity_follows_content_and_not_place(saved: tuple[Path, CausalLM], tmp_path: Path) -> None:
    folder, model = saved
    first = hf.identity(path_config(folder, small()))
    shutil.copytree(folder, tmp_path / "copy")
    assert hf.identity(path_config(tmp_path / "copy", small())) == first
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    hf.save_hf(model, tmp_path / "copy", TextTokenizer.from_folder(folder))
    assert hf.identity(path_config(tmp_path / "copy", small())) != first
    package = ModelConfig(name="s", source="package", package="smollm2_135m_instruct", architecture=small())
    assert hf.identity(package) == f"package:smollm2_135m_instruct@{assets.identity('smollm2_135m_instruct')}"


def test_without_the_hub_the_error_comes_at_once_and_names_ways_round(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config = ModelConfig(name="q", source="hub", pretrained="Qwen/Qwen3-0.6B-Base", architecture=small())
    started = time.monotonic()
    for call in (hf.load_pretrained, hf.identity):
        with pytest.raises(NetworkError, match=r"Qwen/Qwen3-0\.6B-Base is not in the local cache .* model=tiny"):
            call(config)
    assert time.monotonic() - started < 30


def test_data_packages_are_no_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(assets, "fetch", lambda name: tmp_path / "rows.jsonl")
    config = ModelConfig(name="x", source="package", package="boolq", architecture=small())
    with pytest.raises(ConfigError, match="model.package=boolq is a data set"):
        hf.load_pretrained(config)


def write_gguf(path: Path, model: CausalLM, tokenizer: TextTokenizer) -> None:
    """What llama.cpp's converter makes of a Llama model, written with the library of its authors."""
    architecture, content = model.architecture, json.loads(tokenizer.json)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(architecture.max_position_embeddings)
    writer.add_embedding_length(architecture.hidden_size)
    writer.add_block_count(architecture.num_hidden_layers)
    writer.add_feed_forward_length(architecture.intermediate_size)
    writer.add_head_count(architecture.num_attention_heads)
    writer.add_head_count_kv(architecture.num_key_value_heads)
    writer.add_key_length(architecture.head_dim)
    writer.add_rope_freq_base(architecture.rope_theta)
    writer.add_layer_norm_rms_eps(architecture.rms_norm_eps)
    words = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3 if word == "<|endoftext|>" else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, architecture.num_hidden_layers)
    heads = {"q_proj": architecture.num_attention_heads, "k_proj": architecture.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        projection = name.split(".")[-2]
        if projection in heads:  # members of a rotary pair side by side
            halves = values.reshape(heads[projection], 2, architecture.head_dim // 2, -1)
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        stored = names.get_name(name.removesuffix(".weight"))
        assert stored is not None
        writer.add_tensor(f"{stored}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_packages_load_exactly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    architecture = small(vocab_size=262, rms_norm_eps=1e-5)
    model = CausalLM(architecture)
    path = tmp_path / "m.gguf"
    write_gguf(path, model, tokenizer)
    monkeypatch.setattr(assets, "fetch", lambda name: path)
    config = ModelConfig(name="m", source="package", package="smollm2_135m_instruct", architecture=architecture)
    loaded, words = hf.load_pretrained(config)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert words.encode("some more words 12") == tokenizer.encode("some more words 12")
    assert words.eos_token_id == 0
    wrong = config.model_copy(update={"architecture": small(vocab_size=262, rope_theta=1.0)})
    with pytest.raises(CheckpointError, match=r"rope_theta is 10000\.0, model.architecture says 1\.0"):
        hf.load_pretrained(wrong)


def test_rotary_pairs_are_separated_within_each_head() -> None:
    stored = np.array([0, 4, 1, 5, 2, 6, 3, 7, 10, 14, 11, 15, 12, 16, 13, 17])
    expected = [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17]
    assert separate_rotary_pairs(stored, 2).tolist() == expected


@pytest.mark.slow
@pytest.mark.network
def test_smollm2_has_the_perplexity_that_transformers_finds() -> None:
    import pydoc_data.topics

    from transformers import AutoModelForCausalLM

    architecture = small(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, rope_theta=1e5, tie_word_embeddings=True,
    )  # fmt: skip
    config = ModelConfig(name="s", source="package", package="smollm2_135m_instruct", architecture=architecture)
    model, tokenizer = hf.load_pretrained(config)
    text = pydoc_data.topics.topics["assignment"] + pydoc_data.topics.topics["class"]
    ids = torch.tensor(tokenizer.encode(text)[:512])[None]
    batch = Batch(ids, ids, torch.arange(512)[None], torch.ones_like(ids))
    path = assets.fetch("smollm2_135m_instruct")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        ours = functional.cross_entropy(model(batch).logits()[0, :-1], ids[0, 1:]).exp()
        reference = functional.cross_entropy(theirs(ids).logits[0, :-1], ids[0, 1:]).exp()
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=0)
