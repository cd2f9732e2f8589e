"""Stage 1: what is kept exactly, and what the gains are."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from wrinklefree.models.bitlinear import BitLinear, quantization_of
from wrinklefree.models.config import Architecture, Gain, Placement
from wrinklefree.models.convert import calibrate_gains, to_bitnet
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.models.subln import SubLN, subln_strength_of
from wrinklefree.utils.errors import ConfigError

ARCHITECTURE = Architecture(
    family="llama",
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


def batch_of(ids: Tensor) -> Batch:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch(ids, ids, positions, torch.ones_like(ids))


@pytest.fixture
def model() -> CausalLM:
    torch.manual_seed(3)
    model = CausalLM(ARCHITECTURE)
    for parameter in model.parameters():  # larger than an initialisation, so that norms have something to do
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def batch() -> Batch:
    return batch_of(torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1)))


def convert(model: CausalLM, batch: Batch, placement: Placement, gain: Gain, strength: float) -> CausalLM:
    return to_bitnet(model, placement=placement, gain=gain, activation_bits=8, strength=strength, calibration=[batch])


def inputs_of(model: CausalLM, batch: Batch, site: str) -> Tensor:
    """[N, D]: what enters a projection, first positions left out; collected by another route than the calibration's."""
    kept: list[Tensor] = []
    handle = model.get_submodule(site).register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        model(batch)
    handle.remove()
    return kept[0][:, 1:].reshape(-1, kept[0].shape[-1])


@pytest.mark.parametrize("gain", ["ones", "median", "per_channel"])
@pytest.mark.parametrize("placement", ["none", "output", "per_projection"])
def test_at_strength_zero_the_function_is_kept_exactly(
    model: CausalLM, batch: Batch, placement: Placement, gain: Gain
) -> None:
    ternary = convert(model, batch, placement, gain, 0.0)
    assert torch.equal(ternary(batch).logits(), model(batch).logits())
    assert quantization_of(ternary) == 0.0
    assert all(isinstance(block.self_attn.q_proj, BitLinear) for block in ternary.blocks)


@pytest.mark.parametrize(("placement", "norms"), [("none", 0), ("output", 4), ("per_projection", 14)])
def test_every_weight_is_copied_and_norms_are_added(
    model: CausalLM, batch: Batch, placement: Placement, norms: int
) -> None:
    ternary = convert(model, batch, placement, "median", 1.0)
    ours, theirs = dict(ternary.named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(ours) - len(theirs) == norms == sum(isinstance(module, SubLN) for module in ternary.modules())
    assert all(ours[name].data_ptr() != theirs[name].data_ptr() for name in theirs)
    assert subln_strength_of(ternary) == 1.0
    assert model.bitnet is None


def test_ones_are_ones(model: CausalLM, batch: Batch) -> None:
    gains = calibrate_gains(model, "output", "ones", [])
    assert sorted(gains)[:2] == [
        "model.layers.0.mlp.ffn_sub_norm.weight",
        "model.layers.0.self_attn.attn_sub_norm.weight",
    ]
    assert all(torch.equal(gain, torch.ones_like(gain)) for gain in gains.values())


@pytest.mark.parametrize(
    ("placement", "norm", "site"),
    [
        ("output", "self_attn.attn_sub_norm", "self_attn.o_proj"),
        ("output", "mlp.ffn_sub_norm", "mlp.down_proj"),
        ("per_projection", "self_attn.k_proj_norm", "self_attn.k_proj"),
        ("per_projection", "mlp.down_proj_norm", "mlp.down_proj"),
    ],
)
def test_median_gain_is_the_median_of_token_rms(
    model: CausalLM, batch: Batch, placement: Placement, norm: str, site: str
) -> None:
    x = inputs_of(model, batch, f"model.layers.1.{site}")
    gain = calibrate_gains(model, placement, "median", [batch])[f"model.layers.1.{norm}.weight"]
    sizes = sorted((row.square().mean() + ARCHITECTURE.rms_norm_eps).sqrt().item() for row in x)
    middle = len(sizes) // 2
    median = sizes[middle] if len(sizes) % 2 else (sizes[middle - 1] + sizes[middle]) / 2
    assert gain.shape == (x.shape[1],)
    torch.testing.assert_close(gain, torch.full_like(gain, median))


def test_per_channel_gain_minimises_the_squared_error_of_every_channel(model: CausalLM, batch: Batch) -> None:
    x = inputs_of(model, batch, "model.layers.0.mlp.down_proj").double()
    normalised = functional.rms_norm(x, (x.shape[1],), eps=ARCHITECTURE.rms_norm_eps)
    expected = torch.stack(
        [torch.linalg.lstsq(normalised[:, c : c + 1], x[:, c : c + 1]).solution[0, 0] for c in range(x.shape[1])]
    )
    gain = calibrate_gains(model, "output", "per_channel", [batch])["model.layers.0.mlp.ffn_sub_norm.weight"]
    torch.testing.assert_close(gain.double(), expected, rtol=1e-5, atol=1e-6)


def test_batches_accumulate(model: CausalLM, batch: Batch) -> None:
    rows = [batch_of(row[None]) for row in batch.input_ids]
    for gain in ("median", "per_channel"):
        whole = calibrate_gains(model, "output", gain, [batch])
        parts = calibrate_gains(model, "output", gain, rows)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)


def test_padding_and_first_positions_do_not_count(model: CausalLM, batch: Batch) -> None:
    padded = Batch(
        input_ids=functional.pad(batch.input_ids, (0, 5), value=7),
        labels=functional.pad(batch.labels, (0, 5), value=-100),
        position_ids=functional.pad(batch.position_ids, (0, 5)),
        document_ids=functional.pad(batch.document_ids, (0, 5)),
    )
    for gain in ("median", "per_channel"):
        plain = calibrate_gains(model, "per_projection", gain, [batch])
        for name, value in calibrate_gains(model, "per_projection", gain, [padded]).items():
            torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5)
    first = batch_of(batch.input_ids[:, :1])
    with pytest.raises(ConfigError, match="subln.gain=median is measured on text and there is none"):
        calibrate_gains(model, "output", "median", [first])


def test_calibration_leaves_the_model_as_it_was(model: CausalLM, batch: Batch) -> None:
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate_gains(model, "output", "median", [batch])
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.get_submodule("model.layers.0.self_attn.o_proj")._forward_pre_hooks


def test_a_ternary_model_is_refused(model: CausalLM, batch: Batch) -> None:
    ternary = convert(model, batch, "output", "median", 1.0)
    with pytest.raises(ConfigError, match="ternary already"):
        convert(ternary, batch, "output", "median", 1.0)
