"""Folding: a model with another scale or a dead-zone bias, and the plain one that computes the same, to the last bit."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import wrinklefree
from wrinklefree.models.artifact import Artifact, read_artifact, write_artifact
from wrinklefree.models.bitlinear import BitLinear
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.folding import fold, folded
from wrinklefree.models.gguf_weights import load_gguf_model
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.serving.converter import ConversionOptions, convert
from wrinklefree.serving.engine.native.loading import load_packed
from wrinklefree.serving.hf_export import export_hf
from wrinklefree.utils.errors import CheckpointError, ConfigError
from wrinklefree.utils.gguf import read_gguf
from wrinklefree.utils.tokenizer import TextTokenizer

TINY = Path(wrinklefree.__file__).parent / "assets" / "tiny"
ARCHITECTURE = Architecture(
    family="llama",
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
OPTIONS: list[dict[str, Any]] = [
    {"weight_scale": "median"},
    {"weight_scale": "learned"},
    {"dead_zone_bias": 0.05},
    {"weight_scale": "learned", "dead_zone_bias": 0.05},
]


def make_model(architecture: Architecture = ARCHITECTURE, **options: Any) -> CausalLM:
    torch.manual_seed(3)
    model = CausalLM(architecture, BitNetSpec(placement="none", gain="ones", quantization_lambda=1.0, **options))
    with torch.no_grad():
        layers = [module for module in model.modules() if isinstance(module, BitLinear)]
        for index, layer in enumerate(layers):
            if layer.scale_gain is not None:
                layer.scale_gain.fill_(0.7 + 0.05 * index)
            if layer.bias is not None:
                layer.bias.normal_()
    return model.eval()


def make_artifact(folder: Path, **options: Any) -> Artifact:
    return write_artifact(folder, make_model(**options), TextTokenizer.from_folder(TINY), {"stage": "stage3"})


@torch.no_grad()
def logits(model: CausalLM) -> torch.Tensor:
    ids = torch.arange(5, 45).reshape(2, 20)
    return model(Batch(ids, ids, torch.arange(20).expand(2, 20), torch.ones_like(ids))).logits()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_folded_model_computes_the_same(options: dict[str, Any], biased: bool) -> None:
    model = make_model(ARCHITECTURE.model_copy(update={"attention_bias": biased}), **options)
    plain = fold(model)
    assert plain.bitnet is not None
    assert plain.bitnet.is_plain
    assert not [name for name, _ in plain.named_parameters() if "gain" in name]
    assert plain.architecture.mlp_bias == ("dead_zone_bias" in options)
    assert torch.equal(logits(plain), logits(model))
    assert not torch.allclose(logits(plain), logits(make_model(model.architecture)))


def test_a_weight_that_has_no_plain_form_is_refused() -> None:
    model = make_model(weight_scale="learned")
    with torch.no_grad():
        up = model.get_submodule("model.layers.1.mlp.up_proj")
        up.get_parameter("scale_gain").fill_(1000.0)  # every code is 0, and no scale matters
        plain = fold(model)
        assert torch.equal(logits(plain), logits(model))
        up.get_parameter("scale_gain").fill_(math.nan)
    with pytest.raises(CheckpointError, match=r"up_proj: .* its scale nan"):
        fold(model)


def test_options_survive_an_artifact(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "a", weight_scale="learned", dead_zone_bias=0.05)
    loaded = read_artifact(artifact.folder).load_model()
    assert torch.equal(logits(loaded), logits(make_model(weight_scale="learned", dead_zone_bias=0.05)))


def test_a_plain_artifact_is_not_copied(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "a")
    with folded(artifact, tmp_path / "out") as same:
        assert same is artifact


@pytest.mark.parametrize("options", OPTIONS[1:3], ids=str)
def test_a_gguf_file_and_the_cpu_engine_have_the_folded_model(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    artifact = make_artifact(tmp_path / "a", **options)
    output = tmp_path / "model.gguf"
    convert(ConversionOptions(artifact.folder, output, weight_type="I2_S", embedding_type="F32", run=False))
    said = f"weight_scale={options.get('weight_scale', 'absmean')}, dead_zone_bias={options.get('dead_zone_bias', 0)}"
    assert f"folding {said} into weights and biases" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "model.gguf"]
    file = read_gguf(output)
    assert file.metadata["wrinklefree.source.fingerprint"] == artifact.fingerprint
    torch.testing.assert_close(logits(load_gguf_model(output)[0]), logits(artifact.load_model()), rtol=0, atol=2e-5)
    load_packed(output)
    with pytest.raises(ConfigError, match=rf"{said}.*convert it with scripts/convert_to_gguf.py"):
        load_packed(artifact.folder)


def test_a_folder_for_transformers_has_the_biases(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "a", dead_zone_bias=0.05)
    export = export_hf(artifact.folder, tmp_path / "hf", weights="f32")
    assert json.loads((export.folder / "config.json").read_text())["mlp_bias"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "hf"]
