"""The decoder: names, taps, initial weights, checkpointing, packing when ternary, cache, meta device, compiling."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from wrinklefree.models.attention import KVCache
from wrinklefree.models.bitlinear import BitLinear, quantization_of, set_quantization
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM, Checkpointing
from wrinklefree.models.records import Batch, Wants
from wrinklefree.models.subln import SubLN, set_subln_strength, subln_strength_of

TERNARY = BitNetSpec(placement="output", gain="ones", quantization_lambda=1.0)


def make_model(bitnet: BitNetSpec | None = None, seed: int = 0, **changes: Any) -> CausalLM:
    options: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    return CausalLM(Architecture(**options | changes), bitnet)


def make_batch(rows: int = 2, length: int = 12, documents: Tensor | None = None) -> Batch:
    ids = torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(length))
    documents = torch.ones_like(ids) if documents is None else documents
    positions = torch.zeros_like(ids)
    for t in range(1, length):
        positions[:, t] = torch.where(documents[:, t] == documents[:, t - 1], positions[:, t - 1] + 1, 0)
    return Batch(ids, ids, positions, documents)


def cut(batch: Batch, start: int, end: int) -> Batch:
    return Batch(*(getattr(batch, name)[:, start:end] for name in Batch.__dataclass_fields__))


@pytest.mark.parametrize(
    ("placement", "added"),
    [
        ("none", set()),
        ("output", {"self_attn.attn_sub_norm", "mlp.ffn_sub_norm"}),
        (
            "per_projection",
            {f"self_attn.{p}_proj_norm" for p in "qkvo"} | {f"mlp.{p}_proj_norm" for p in ("gate", "up", "down")},
        ),
    ],
)
def test_subln_names_by_placement(placement: Any, added: set[str]) -> None:
    plain = set(make_model().state_dict())
    ternary = make_model(BitNetSpec(placement=placement, gain="ones"))
    names = {f"model.layers.{layer}.{name}.weight" for layer in range(3) for name in added}
    assert set(ternary.state_dict()) == plain | names
    assert sum(isinstance(m, BitLinear) for m in ternary.modules()) == 7 * 3
    assert sum(isinstance(m, SubLN) for m in ternary.modules()) == len(added) * 3


def test_subln_sizes_follow_their_input() -> None:
    model = make_model(BitNetSpec(placement="per_projection", gain="ones"), head_dim=10)
    sizes = {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, SubLN)}
    assert sizes["model.layers.0.self_attn.q_proj_norm"] == 32
    assert sizes["model.layers.0.self_attn.o_proj_norm"] == 40
    assert sizes["model.layers.0.mlp.down_proj_norm"] == 48


@pytest.mark.parametrize("placement", ["output", "per_projection"])
def test_at_strength_and_lambda_zero_the_model_is_the_base_model(placement: Any) -> None:
    base = make_model()
    spec = BitNetSpec(placement=placement, gain="ones", quantization_lambda=0.0, subln_strength=0.0)
    student = make_model(spec, seed=1)
    student.load_state_dict(student.state_dict() | base.state_dict())
    assert torch.equal(student(make_batch()).logits(), base(make_batch()).logits())
    set_subln_strength(student, 0.5)
    assert not torch.allclose(student(make_batch()).logits(), base(make_batch()).logits())


def test_spec_sets_lambda_and_strength() -> None:
    model = make_model(BitNetSpec(placement="output", gain="ones", quantization_lambda=0.25, subln_strength=0.75))
    assert quantization_of(model) == 0.25
    assert subln_strength_of(model) == 0.75
    assert model.is_ternary
    assert not make_model().is_ternary


def test_initial_weights() -> None:
    model = make_model(hidden_size=128, intermediate_size=256, attention_bias=True, tie_word_embeddings=False)
    layer = model.blocks[0]
    assert layer.mlp.gate_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.05)
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.1)
    assert model.head_weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.self_attn.q_proj.bias.abs().sum() == 0
    loss = -model(make_batch()).logits().log_softmax(-1).mean()
    assert loss.item() == pytest.approx(math.log(61), rel=0.02)


def test_squared_relu() -> None:
    mlp = make_model(hidden_act="relu2").blocks[0].mlp
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    torch.testing.assert_close(mlp(x), (gate.clamp(min=0) ** 2 * up) @ mlp.down_proj.weight.T)


@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
def test_taps(checkpointing: Checkpointing) -> None:
    model, batch = make_model(TERNARY), make_batch()
    model.activation_checkpointing = checkpointing
    output = model(batch, Wants(hidden_layers=(0, 2), qkv_layer=1))
    assert sorted(output.hidden_states) == [0, 2]
    torch.testing.assert_close(output.final_norm(output.hidden_states[2]), output.hidden)
    qkv = output.qkv
    assert qkv is not None
    assert qkv.query.shape == (2, 4, 12, 8)
    assert qkv.key.shape == qkv.value.shape == (2, 2, 12, 8)
    block = model.blocks[1]
    value = block.self_attn.v_proj(block.input_layernorm(output.hidden_states[0]))
    torch.testing.assert_close(qkv.value.transpose(1, 2).flatten(2), value)
    # Position 0 is not rotated; others keep their length.
    key = block.self_attn.k_proj(block.input_layernorm(output.hidden_states[0])).unflatten(-1, (2, 8)).transpose(1, 2)
    torch.testing.assert_close(qkv.key[:, :, 0], key[:, :, 0])
    torch.testing.assert_close(qkv.key.norm(dim=-1), key.norm(dim=-1))
    assert not torch.allclose(qkv.key[:, :, 3], key[:, :, 3])
    qkv.query.square().sum().backward()
    assert model.model.embed_tokens.weight.grad is not None
    assert model.blocks[1].mlp.up_proj.weight.grad is None
    assert model(batch).qkv is None
    assert model(batch).hidden_states == {}


@pytest.mark.parametrize("bitnet", [None, TERNARY])
def test_checkpointing_changes_no_gradient(bitnet: BitNetSpec | None) -> None:
    model, batch = make_model(bitnet), make_batch()
    gradients = []
    modes: tuple[Checkpointing, ...] = ("off", "selective", "full")
    for checkpointing in modes:
        model.activation_checkpointing = checkpointing
        model.zero_grad()
        model(batch).logits().logsumexp(-1).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


@pytest.mark.parametrize("length", [16, 520], ids=["mask", "loop"])
def test_packed_documents_equal_each_document_alone_when_ternary(length: int) -> None:
    model = make_model(TERNARY)
    documents = torch.ones(1, length, dtype=torch.long)
    documents[:, 5:9], documents[:, 9:] = 2, 3
    batch = make_batch(1, length, documents)
    packed = model(batch).logits()
    for start, end in ((0, 5), (5, 9), (9, length)):
        torch.testing.assert_close(packed[:, start:end], model(cut(batch, start, end)).logits(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bitnet", [None, TERNARY])
def test_cache_gives_the_logits_of_the_full_pass(bitnet: BitNetSpec | None) -> None:
    model = make_model(bitnet)
    documents = torch.ones(2, 12, dtype=torch.long)
    documents[1, :4] = 0  # left padding
    batch = make_batch(2, 12, documents)
    full = model(batch).logits()
    cache = KVCache(2, 12)
    with torch.no_grad():
        parts = [model(cut(batch, a, b), cache=cache).logits() for a, b in ((0, 6), (6, 9), (9, 10), (10, 12))]
    assert cache.length == 12
    real = documents == 1
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], full[real], rtol=1e-4, atol=1e-4)


def test_autocast_is_close_to_float32_and_leaves_float32_gradients() -> None:
    model, batch = make_model(), make_batch()
    exact = model(batch).logits()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch).logits()
    logits.float().square().sum().backward()
    assert ((logits - exact).norm() / exact.norm()).item() < 0.02
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}


def test_a_model_built_on_the_meta_device_takes_its_weights_by_assignment() -> None:
    model = make_model(TERNARY)
    with torch.device("meta"):
        empty = make_model(TERNARY.model_copy(update={"quantization_lambda": 0.5}))
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    set_quantization(model, 0.5)
    assert torch.equal(empty(make_batch()).logits(), model(make_batch()).logits())


def test_head_is_the_embedding_only_where_tied() -> None:
    tied, untied = make_model(), make_model(tie_word_embeddings=False)
    assert tied.head_weight is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in tied.state_dict()
    assert untied.lm_head is not None
    assert untied.head_weight is untied.lm_head.weight


def test_block_names_lead_to_the_blocks() -> None:
    model = make_model()
    assert [model.get_submodule(name) for name in model.block_names] == list(model.blocks)


# Dynamo itself asks the block's input, which is no leaf, for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_block_is_one_graph_while_both_warm_ups_rise() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    spec = BitNetSpec(placement="output", gain="ones", quantization_lambda=0.1, subln_strength=0.1)
    model, reference = make_model(spec, num_hidden_layers=1), make_model(spec, num_hidden_layers=1)
    model.blocks[0].compile(backend=counter, fullgraph=True)
    batch = make_batch()
    for step in range(1, 5):
        for one in (model, reference):
            set_quantization(one, step / 5)
            set_subln_strength(one, step / 5)
        torch.testing.assert_close(model(batch).hidden, reference(batch).hidden, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    for one in (model, reference):
        set_quantization(one, 1.0)
        set_subln_strength(one, 1.0)
    torch.testing.assert_close(model(batch).hidden, reference(batch).hidden, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2
    torch._dynamo.reset()
