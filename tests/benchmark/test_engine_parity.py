"""The engine's blocks on a small random model; that the measure sees what it is there to see."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import wrinklefree
from benchmark.engine_blocks import MARK, BlockErrors, BlockProbe, hidden_states, torch_outputs
from benchmark.engine_parity import main
from wrinklefree.models.artifact import write_artifact
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.utils.tokenizer import TextTokenizer

TINY = Path(wrinklefree.__file__).parent / "assets" / "tiny"


@pytest.fixture(scope="module")
def model() -> CausalLM:
    """Random, its blocks adding a few per cent to the residual stream: what the stream would hide."""
    torch.manual_seed(0)
    architecture = Architecture(
        family="llama", vocab_size=TextTokenizer.from_folder(TINY).vocab_size, hidden_size=96, intermediate_size=160,
        num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        tie_word_embeddings=True,
    )  # fmt: skip
    bitnet = BitNetSpec(placement="output", gain="ones", quantization_lambda=1.0)
    model = CausalLM(architecture, bitnet)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def states(model: CausalLM) -> np.ndarray:
    return hidden_states(model, np.random.default_rng(0).integers(0, model.architecture.vocab_size, 70).tolist())


def test_states_are_what_the_blocks_read_and_write(model: CausalLM, states: np.ndarray) -> None:
    assert states.shape == (4, 70, 96)
    np.testing.assert_array_equal(torch_outputs(model, states), states[1:])


def test_output_is_read_back_with_its_size(model: CausalLM, states: np.ndarray) -> None:
    """A block whose last projections are zero adds nothing: exactly the hidden states come back, for any size."""
    probe = BlockProbe(model, 1)
    names = [f"model.layers.0.{name}" for name in ("self_attn.o_proj", "mlp.down_proj")]
    probe.packed.linears |= {name: replace(probe.packed.linears[name], scale=0.0) for name in names}
    for size in (1e-3, 1.0, 1e3):
        inputs = states[1] * np.float32(size)
        np.testing.assert_allclose(probe.output(inputs)[:, 1:], inputs[:, 1:], rtol=5e-7)
    assert size * np.abs(states).max() < MARK / 2**24


def test_a_wrong_scale_is_seen_as_large_as_it_is(model: CausalLM, states: np.ndarray) -> None:
    """Also where the update points along the output, which a norm would divide away."""
    inputs = states[0] * np.float32(1e-4)  # the update is nearly all of the output
    probe = BlockProbe(model, 0)
    right = probe.output(inputs)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        linear = probe.packed.linears[f"model.layers.0.{name}"]
        probe.packed.linears[f"model.layers.0.{name}"] = replace(linear, scale=linear.scale * 1.01)
    errors = BlockErrors.between(probe.output(inputs), right, inputs)
    assert np.median(errors.update) == pytest.approx(0.01, rel=0.05)


def test_errors_by_hand() -> None:
    inputs = np.array([[9, 3, 4], [9, 0, 0]], np.float32)
    expected = inputs + np.array([[5, 0, 1], [5, 2, 0]], np.float32)
    found = expected + np.array([[7, 0, 0.5], [7, 0, 0]], np.float32)
    errors = BlockErrors.between(found, expected, inputs)
    assert errors.update.tolist() == [0.5, 0]
    assert errors.output.tolist() == pytest.approx([0.5 / np.hypot(3, 5), 0])


def test_blocks_of_the_engine_are_those_of_pytorch(
    model: CausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "artifact"
    write_artifact(folder, model, TextTokenizer.from_folder(TINY), {})
    assert main([str(folder), "--tokens", "600", "--blocks"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    values = {cells[0]: cells[1:] for cells in lines[2:]}
    assert [name.partition(",")[0] for name in values] == [
        "PyTorch itself",
        "PyTorch itself",
        "the engine",
        "the engine",
    ]
    engine = values["the engine, all 3 blocks"]
    assert engine[0] == "1800"
    output, update = float(engine[1]), float(engine[3])
    assert 0 < output < update < 1e-6
    assert float(engine[7].removesuffix(" %")) < 5
