"""Zero-padding: the same logits from a wider model, and the epsilon's price where there is one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wrinklefree.models.config import Architecture, BitNetSpec, Placement
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.padding import EpsilonChange, Padding, plan_padding
from wrinklefree.models.records import IGNORE, Batch
from wrinklefree.models.weights import assemble
from wrinklefree.utils.errors import ConfigError

SMOLLM2 = Architecture(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
SMALL = SMOLLM2.model_copy(
    update={
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
    }
)


def random_model(architecture: Architecture, placement: Placement, bits: int | None) -> CausalLM:
    torch.manual_seed(3)
    spec = BitNetSpec(placement=placement, gain="ones", quantization_lambda=0.0, activation_bits=bits)  # type: ignore[arg-type]
    model = CausalLM(architecture, spec).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(std=0.3)
    return model


def padded_model(model: CausalLM, padding: Padding) -> CausalLM:
    tensors = [(name, padding.pad(name, parameter.detach())) for name, parameter in model.named_parameters()]
    return assemble(padding.padded, model.bitnet, tensors, source="the padded model").eval()


@torch.no_grad()
def logits(model: CausalLM) -> torch.Tensor:
    ids = torch.arange(40).reshape(2, 20)
    positions = torch.arange(20).expand_as(ids)
    return model(Batch(ids, torch.full_like(ids, IGNORE), positions, torch.ones_like(ids))).logits()


def test_smollm2_grows_to_768_2048_and_12_heads() -> None:
    padding = plan_padding(SMOLLM2, "output", 256, square=True)
    sizes = (padding.hidden_size, padding.intermediate_size, padding.num_attention_heads, padding.num_key_value_heads)
    assert sizes == (768, 2048, 12, 4)
    assert padding.padded.rms_norm_eps == pytest.approx(1e-5 * 576 / 768)
    assert padding.epsilon_changes("output") == []
    assert plan_padding(SMOLLM2, "output", 64, square=True).is_none


@pytest.mark.parametrize("placement", ["none", "output", "per_projection"])
@pytest.mark.parametrize("architecture", [SMALL, SMALL.model_copy(update={"attention_bias": True, "mlp_bias": True})])
def test_a_padded_model_has_the_same_logits(architecture: Architecture, placement: Placement) -> None:
    model = random_model(architecture, placement, None)
    padding = plan_padding(architecture, placement, 64, square=True)
    assert (padding.hidden_size, padding.intermediate_size) == (64, 128)
    ours, theirs = logits(model), logits(padded_model(model, padding))
    assert float((ours - theirs).abs().max()) < 1e-5 * float(ours.abs().max())


def test_head_norms_and_other_widths_work_with_the_epsilon_that_is_announced() -> None:
    # An epsilon as large as the activations: what it changes is seen, and is what the record says.
    architecture = SMALL.model_copy(update={"qk_norm": True, "intermediate_size": 100, "rms_norm_eps": 0.5})
    padding = plan_padding(architecture, "output", 64, square=True)
    changes = {change.site: change for change in padding.epsilon_changes("output")}
    assert padding.intermediate_size == 128
    assert sorted(changes) == ["ffn_sub_norm", "k_norm", "q_norm"]
    assert changes["ffn_sub_norm"].effective == pytest.approx(0.5 * (48 / 64) / (100 / 128))
    assert changes["q_norm"].effective == pytest.approx(0.5 * 48 / 64)
    model = random_model(architecture, "output", None)
    wide = padded_model(model, padding)
    x = torch.randn(5, 100)
    norm, wide_norm = model.blocks[0].mlp.ffn_sub_norm, wide.blocks[0].mlp.ffn_sub_norm
    found = wide_norm(torch.nn.functional.pad(x, (0, 28)))[:, :100]
    mean_square = x.square().mean(-1, keepdim=True)
    expected = norm(x) * ((mean_square + 0.5) / (mean_square + changes["ffn_sub_norm"].effective)).sqrt()
    torch.testing.assert_close(found, expected)


@given(st.floats(1e-8, 1.0), st.floats(0.3, 3.0), st.floats(0, 10))
def test_the_bound_on_a_norm_s_change_falls_with_its_input(trained: float, ratio: float, mean_square: float) -> None:
    change = EpsilonChange("norm", trained, trained * ratio)
    exact = abs(math.sqrt((mean_square + trained) / (mean_square + trained * ratio)) - 1)
    assert change.relative_change_at(mean_square) == pytest.approx(exact)
    assert change.relative_change_at(mean_square) <= change.largest_relative_change + 1e-12


def test_new_heads_come_in_whole_groups_and_change_no_old_head() -> None:
    architecture = SMALL.model_copy(update={"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72})
    padding = plan_padding(architecture, "none", 32, square=False)
    assert (padding.num_attention_heads, padding.num_key_value_heads) == (12, 4)
    weight = torch.arange(72 * 72, dtype=torch.float32).reshape(72, 72)
    name = "model.layers.0.self_attn.q_proj.weight"
    wide = padding.pad(name, weight)
    assert wide.shape == (96, 96) == padding.shape(name, (72, 72))
    assert torch.equal(wide[:72, :72], weight)
    assert float(wide[72:].abs().sum() + wide[:, 72:].abs().sum()) == 0


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.ffn_sub_norm.weight", "lm_head.weight"])
def test_unpadding_undoes_padding(name: str) -> None:
    padding = plan_padding(SMALL, "output", 64, square=True)
    shape = {"model.norm.weight": (48,), "lm_head.weight": (64, 48)}.get(name, (96,))
    values = torch.rand(shape) + 0.5
    torch.testing.assert_close(padding.unpad(name, padding.pad(name, values)), values, rtol=2e-7, atol=0)


def test_codes_are_padded_without_changing_their_type() -> None:
    padding = plan_padding(SMALL, "output", 64, square=True)
    codes = torch.randint(-1, 2, (48, 96), dtype=torch.int8)
    wide = padding.pad("model.layers.0.mlp.down_proj.weight", codes)
    assert (wide.dtype, wide.shape) == (torch.int8, (64, 128))
    assert torch.equal(padding.unpad("model.layers.0.mlp.down_proj.weight", wide), codes)


def test_doubling_a_model_is_refused() -> None:
    seven_heads = SMALL.model_copy(update={"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1})
    with pytest.raises(ConfigError, match="hidden size of 56 would have to grow to 448 .* use --type Q2_0 or Q4_0"):
        plan_padding(seven_heads, "output", 64, square=True)
