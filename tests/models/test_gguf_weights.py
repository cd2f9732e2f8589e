"""Weights that ternarize to given codes and scales, and damaged files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wrinklefree.models.config import Architecture
from wrinklefree.models.gguf_names import (
    is_ternary_weight,
    join_rotary_pairs,
    module_names,
    our_name,
    separate_rotary_pairs,
    stored_name,
)
from wrinklefree.models.gguf_weights import (
    CONFIG_KEY,
    codes_and_scale,
    config_from_gguf,
    latent_weight,
    load_gguf_model,
)
from wrinklefree.models.llama import CausalLM
from wrinklefree.quantization.weight_quant import ternarize
from wrinklefree.serving.gguf_writer import TensorPlan, write_gguf
from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.gguf import read_gguf


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 90), st.integers(1, 130), st.floats(1e-4, 10.0))
def test_a_latent_weight_ternarizes_to_its_codes_and_scale(seed: int, rows: int, columns: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = ternarize(torch.randn(rows, columns, generator=generator) * size)
    again = ternarize(latent_weight(found.codes, float(found.scale)))
    assert torch.equal(again.codes, found.codes)
    assert float(again.scale) == float(found.scale)


def test_a_latent_weight_of_zeros_is_zero() -> None:
    assert not latent_weight(torch.zeros(3, 4, dtype=torch.int8), 0.5).any()


def test_joining_rotary_pairs_is_the_inverse_of_separating_them() -> None:
    rows = np.arange(12)
    # Two heads of six rows: first members 0 1 2, second members 3 4 5.
    assert join_rotary_pairs(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    matrix = np.arange(24).reshape(12, 2)
    np.testing.assert_array_equal(separate_rotary_pairs(join_rotary_pairs(matrix, 3), 3), matrix)


@pytest.mark.parametrize("placement", ["none", "output", "per_projection"])
@pytest.mark.parametrize("norms_at_inputs", [False, True])
def test_every_parameter_has_a_stored_name_and_comes_back_from_it(placement, norms_at_inputs: bool) -> None:
    from wrinklefree.models.config import BitNetSpec

    architecture = Architecture(
        family="qwen3",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=8,
        qk_norm=True,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
    )
    parameters = dict(CausalLM(architecture, BitNetSpec(placement=placement, gain="ones")).named_parameters())
    modules = module_names(placement, norms_at_inputs=norms_at_inputs)
    stored = {name: stored_name(name, modules) for name in parameters}
    assert len(set(stored.values())) == len(stored)
    assert {our_name(theirs, modules) for theirs in stored.values()} == set(parameters)
    assert sum(is_ternary_weight(name) for name in parameters) == 14
    if placement == "output":
        spelled = "blk.1.attn_output_norm_in.weight" if norms_at_inputs else "blk.1.attn_sub_norm.weight"
        assert stored["model.layers.1.self_attn.attn_sub_norm.weight"] == spelled


def write(path: Path, metadata: dict[str, object], values: np.ndarray) -> Path:
    data = np.ascontiguousarray(values, dtype="<f4").view(np.uint8).reshape(-1)
    write_gguf(path, metadata, [TensorPlan("w.weight", values.shape, "F32", lambda: data)])  # type: ignore[arg-type]
    return path


def test_written_out_ternary_values_are_recognised_and_others_refused(tmp_path: Path) -> None:
    values = np.array([[0.25, -0.25, 0], [0, 0.25, 0.25]], dtype=np.float32)
    codes, scale = codes_and_scale(read_gguf(write(tmp_path / "a.gguf", {}, values)), "w.weight")
    assert (codes.tolist(), scale) == ([[1, -1, 0], [0, 1, 1]], 0.25)
    values[0, 0] = 0.3
    with pytest.raises(CheckpointError, match=r"tensor w\.weight is not ternary, though the file says so"):
        codes_and_scale(read_gguf(write(tmp_path / "b.gguf", {}, values)), "w.weight")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"architecture": {}}', '{"architecture": {"family": "x"}, "bitnet": null}']
)
def test_a_damaged_config_is_an_error(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "c.gguf", {CONFIG_KEY: text}, np.zeros((1, 1), dtype=np.float32))
    with pytest.raises(CheckpointError, match="was written by another version"):
        config_from_gguf(read_gguf(path))


def test_models_of_other_families_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "d.gguf", {"general.architecture": "mamba"}, np.zeros((1, 1), dtype=np.float32))
    with pytest.raises(CheckpointError, match="holds a mamba model; readable are llama, qwen2, qwen3"):
        load_gguf_model(path)
