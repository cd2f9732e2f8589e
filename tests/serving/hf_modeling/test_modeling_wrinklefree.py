"""Our class for transformers: the same function and gradients as our decoder, and what transformers expects of a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.quantization import activation_quant, weight_quant
from wrinklefree.serving import hf_tensors
from wrinklefree.serving.hf_layouts import Forms, build_layout
from wrinklefree.serving.hf_modeling import modeling_wrinklefree as ours
from wrinklefree.serving.hf_modeling.configuration_wrinklefree import WrinkleFreeConfig
from wrinklefree.serving.hf_modeling.registration import register

ARCHITECTURE = Architecture(
    family="qwen3",
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    qk_norm=True,
    attention_bias=True,
    tie_word_embeddings=True,
)
SPEC = BitNetSpec(placement="output", gain="ones", quantization_lambda=1.0)
IDS = torch.tensor([[3, 9, 4, 27, 31, 5, 8], [1, 2, 60, 4, 5, 6, 7]])


def make_decoder() -> CausalLM:
    torch.manual_seed(3)
    model = CausalLM(ARCHITECTURE, SPEC)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_model(weights: Any = "f32", **changes: Any) -> ours.WrinkleFreeForCausalLM:
    """The same model in our class, without a file between."""
    decoder = make_decoder()
    layout = build_layout("wrinklefree", ARCHITECTURE, SPEC, Forms(weights, torch.float32, "bitlinear"))
    config = {key: value for key, value in layout.config.items() if key not in {"architectures", "auto_map"}}
    model = ours.WrinkleFreeForCausalLM(WrinkleFreeConfig(**{**config, **changes}))
    source = dict(decoder.named_parameters())
    tensors = {t.entry.name: t.convert(source[t.source].detach()) for t in layout.tensors if t.source is not None}
    problems = model.load_state_dict(tensors, strict=False)
    assert (problems.missing_keys, problems.unexpected_keys) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.eval()


def decoder_logits(decoder: CausalLM) -> Tensor:
    positions = torch.arange(IDS.shape[1]).expand_as(IDS)
    return decoder(Batch(IDS, IDS, positions, torch.ones_like(IDS))).logits()


@pytest.mark.parametrize("seed", range(5))
def test_rounding_is_the_library_s(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(10, 7, generator=generator) * 10.0 ** (seed - 3)
    codes, scale = ours.ternarize(weight)
    expected = weight_quant.ternarize(weight)
    assert torch.equal(codes.to(torch.int8), expected.codes)
    assert torch.equal(scale, expected.scale)
    assert torch.equal(ours.unpack_codes(hf_tensors.pack_row_blocks(expected.codes), 10), expected.codes)
    for bits in (4, 8):
        x_codes, x_scale = ours.quantize_activation(weight, bits)
        activation = activation_quant.quantize_activation(weight, bits)
        assert torch.equal(x_codes.to(torch.int8), activation.codes)
        assert torch.equal(x_scale, activation.scale)


@pytest.mark.parametrize("weights", ["f32", "packed"])
def test_logits_equal_the_decoder_s(weights: str) -> None:
    with torch.no_grad():
        theirs, expected = make_model(weights)(IDS).logits, decoder_logits(make_decoder())
    assert float((theirs - expected).norm() / expected.norm()) <= 1e-5


def test_gradients_equal_the_decoder_s() -> None:
    decoder, model = make_decoder().train(), make_model().train()
    decoder_logits(decoder).square().mean().backward()
    model(IDS).logits.square().mean().backward()
    expected = dict(decoder.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad = expected[name].grad
        assert grad is not None
        assert float((parameter.grad - grad).norm() / grad.norm()) <= 1e-3, name


def test_checkpointed_gradients_are_the_same() -> None:
    plain, checkpointed = make_model().train(), make_model().train()
    checkpointed.activation_checkpointing_enable()
    for model in (plain, checkpointed):
        model(IDS, labels=IDS).loss.backward()
    for (name, expected), parameter in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert expected.grad is not None
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected.grad, atol=1e-7), name


def test_gradients_reach_the_input_of_packed_layers() -> None:
    model = make_model("packed")
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.square().mean().backward()
    assert embeddings.grad is not None
    assert float(embeddings.grad.abs().sum()) > 0


def test_the_loss_is_the_shifted_cross_entropy() -> None:
    with torch.no_grad():
        output = make_model()(IDS, labels=IDS)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


@torch.no_grad()
def test_cache_and_logits_to_keep() -> None:
    model = make_model()
    whole = model(IDS).logits
    cache = DynamicCache(config=model.config)
    first = model(IDS[:, :4], past_key_values=cache, use_cache=True)
    rest = model(IDS[:, 4:], past_key_values=first.past_key_values, use_cache=True, logits_to_keep=2)
    assert torch.allclose(first.logits, whole[:, :4], atol=1e-4)
    assert torch.allclose(rest.logits, whole[:, -2:], atol=1e-4)
    assert model(IDS, use_cache=False).past_key_values is None


@torch.no_grad()
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"cache_implementation": "static"}])
def test_other_ways_to_generate(how: dict[str, Any]) -> None:
    model = make_model()
    whole = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    masked = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    padded = model.generate(IDS, attention_mask=masked, **whole, **how)
    alone = model.generate(IDS[:1, 2:], attention_mask=torch.ones(1, 5), **whole, **how)
    assert padded.shape == (2, 12)
    assert padded[0, 7:].tolist() == alone[0, 5:].tolist()


@torch.no_grad()
def test_eager_attention_agrees_and_shows_its_weights() -> None:
    model = make_model(attn_implementation="eager")
    output = model(IDS, output_attentions=True, output_hidden_states=True)
    assert torch.allclose(output.logits, make_model()(IDS).logits, atol=1e-4)
    assert len(output.attentions) == ARCHITECTURE.num_hidden_layers
    assert torch.allclose(output.attentions[0].sum(-1), torch.ones(2, 4, 7))
    assert len(output.hidden_states) == ARCHITECTURE.num_hidden_layers + 1
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(IDS))
    assert torch.allclose(output.hidden_states[-1] @ model.lm_head.weight.T, output.logits, atol=1e-6)


@torch.no_grad()
def test_kept_codes_follow_the_weight() -> None:
    model = make_model()
    before = model(IDS).logits
    layer = model.model.layers[0].mlp.up_proj
    assert layer.codes(torch.float32)[0] is layer.codes(torch.float32)[0]
    layer.weight.mul_(-1.0)
    changed = model(IDS).logits
    assert not torch.allclose(changed, before)
    layer.weight.data = -layer.weight.data
    assert torch.equal(model(IDS).logits, before)
    slow = make_model(keep_codes=False)
    assert torch.equal(slow(IDS).logits, before)
    assert slow.model.layers[0].mlp.up_proj._kept is None


def test_bfloat16_keeps_the_scales_in_float32(tmp_path: Path) -> None:
    make_model("packed").save_pretrained(tmp_path)
    register()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.uint8, torch.float32)
    with torch.no_grad():
        close = model(IDS).logits.float()
        expected = make_model("packed")(IDS).logits
    assert close.dtype == torch.float32
    assert float((close - expected).norm() / expected.norm()) < 0.2


@pytest.mark.parametrize("weights", ["f32", "packed"])
def test_what_is_saved_loads_with_the_code_beside_it(tmp_path: Path, weights: str) -> None:
    register()
    model = make_model(weights)
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"modeling_wrinklefree.py", "configuration_wrinklefree.py", "config.json", "model.safetensors"} <= names
    assert AutoConfig.from_pretrained(tmp_path).auto_map["AutoModelForCausalLM"] == (
        "modeling_wrinklefree.WrinkleFreeForCausalLM"
    )
    loaded, problems = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, ours.WrinkleFreeForCausalLM)
    assert not any(problems.values())
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_new_model_is_initialised() -> None:
    torch.manual_seed(0)
    model = ours.WrinkleFreeForCausalLM(
        WrinkleFreeConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=4, head_dim=8, attention_bias=True,
        )
    )  # fmt: skip
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.model.layers[0].self_attn.q_proj.bias.any()
    assert torch.equal(model.model.norm.weight, torch.ones(32))
