"""The engine's logits against the PyTorch decoder's, over families, placements, activations, precisions and schedules."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wrinklefree.models.artifact import Artifact
from wrinklefree.models.config import Architecture, BitNetSpec, RopeScaling
from wrinklefree.models.convert import to_bitnet
from wrinklefree.models.bitlinear import set_quantization
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.serving.engine.native.library import isa_names
from wrinklefree.serving.engine.native.model import NativeModel, NativeOptions, PackedModel
from wrinklefree.utils.errors import CheckpointError, ConfigError, EngineError

OPTIONS = NativeOptions(context_length=96, slots=3, max_tokens=40, cache="f32")
LLAMA = Architecture(
    family="llama", vocab_size=131, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True,
)  # fmt: skip
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
ARCHITECTURES = {
    "llama": LLAMA,
    "llama3_untied": LLAMA.model_copy(update={"rope_scaling": SCALING, "tie_word_embeddings": False}),
    "qwen2": LLAMA.model_copy(update={"family": "qwen2", "attention_bias": True, "rope_theta": 1e6}),
    "qwen3": LLAMA.model_copy(update={"family": "qwen3", "qk_norm": True, "head_dim": 32, "rms_norm_eps": 1e-6}),
    "relu2_all_biases": LLAMA.model_copy(
        update={"hidden_act": "relu2", "attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
    ),
    "odd_sizes": LLAMA.model_copy(
        update={"hidden_size": 70, "intermediate_size": 101, "num_attention_heads": 5, "num_key_value_heads": 5,
                "head_dim": 14, "vocab_size": 65}
    ),
}  # fmt: skip
PLACEMENTS = ("none", "output", "per_projection")


def random_model(
    architecture: Architecture, placement: str, *, activation_bits: int | None = 8, seed: int = 0
) -> CausalLM:
    """Random weights, gains and biases, at lambda 1, with logits of a trained model's spread."""
    torch.manual_seed(seed)
    bitnet = BitNetSpec(placement=placement, gain="ones", activation_bits=activation_bits, quantization_lambda=1.0)  # type: ignore[arg-type]
    model = CausalLM(architecture, bitnet)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "embed" in name or "lm_head" in name:
                parameter.normal_(std=0.5)
    return model.eval()


@torch.inference_mode()
def reference(model: CausalLM, ids: list[int]) -> NDArray[np.float32]:
    row = torch.tensor([ids])
    return model(Batch(row, row, torch.arange(len(ids))[None], torch.ones_like(row))).logits()[0].numpy()


def tokens(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocabulary, count).tolist()


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    """A token's error over the size of its logits."""
    return np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)


def assert_same(found: NDArray[np.float32], expected: NDArray[np.float32], *, limit: float) -> None:
    """Small errors, and the same best token unless two are nearly tied."""
    errors = relative_error(found, expected)
    assert np.median(errors) < limit, errors
    ordered = np.sort(expected, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > 0.02 * expected.std()
    assert clear.mean() > 0.5
    assert (found.argmax(axis=1) == expected.argmax(axis=1))[clear].all()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_the_pytorch_model(name: str, placement: str) -> None:
    model = random_model(ARCHITECTURES[name], placement)
    ids = tokens(60, model.architecture.vocab_size)
    native = NativeModel(PackedModel.from_model(model, "f32"), OPTIONS)
    errors = relative_error(native.logits(ids), reference(model, ids))
    # Sums in another order move a value by 1e-7, and now and then one of them rounds to another activation code.
    assert np.median(errors) < 1e-5
    assert errors.mean() < 1e-3
