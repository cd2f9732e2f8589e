"""Logits against the `transformers` library on random weights, for every family and switch."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wrinklefree.models.config import Architecture, RopeScaling
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch

LLAMA3_SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 1024,
}
ARCHITECTURES = {
    "llama": Architecture(family="llama", **SMALL, rms_norm_eps=1e-6),
    "llama3_scaling": Architecture(family="llama", **SMALL, rope_theta=5e5, rope_scaling=LLAMA3_SCALING),
    "llama_biases": Architecture(
        family="llama", **SMALL, attention_bias=True, attention_output_bias=True, mlp_bias=True
    ),
    "smollm2": Architecture(
        family="llama",
        **SMALL | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16},
        rope_theta=1e5,
        tie_word_embeddings=True,
    ),
    "qwen2.5": Architecture(
        family="qwen2", **SMALL, attention_bias=True, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True
    ),
    "qwen3": Architecture(family="qwen3", **SMALL | {"head_dim": 20}, qk_norm=True, rope_theta=1e6, rms_norm_eps=1e-6),
}


def make_reference(architecture: Architecture) -> nn.Module:
    """The `transformers` model of these dimensions."""
    import transformers

    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    make_config, make_model = classes[architecture.family]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": architecture.rope_theta}
    if architecture.rope_scaling is not None:
        rope |= {"rope_type": "llama3"} | architecture.rope_scaling.model_dump(exclude={"type"})
    keys = set(SMALL) | {"rms_norm_eps", "tie_word_embeddings"}
    options: dict[str, Any] = {key: getattr(architecture, key) for key in keys}
    if architecture.family == "llama":
        options |= {"attention_bias": architecture.attention_bias, "mlp_bias": architecture.mlp_bias}
    return make_model(make_config(**options, rope_parameters=rope, use_cache=False)).eval()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def models(request: pytest.FixtureRequest) -> tuple[CausalLM, nn.Module]:
    """Ours and theirs with the same random weights, biases and norm gains."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[request.param]
    ours, theirs = CausalLM(architecture), make_reference(architecture)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.normal_(std=0.2).add_(1.0 if "norm" in name else 0.0)
    state = ours.state_dict()
    if architecture.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state)
    return ours, theirs


def make_batch(input_ids: Tensor, document_ids: Tensor) -> Batch:
    """Rows whose positions restart with each document."""
    positions = torch.zeros_like(input_ids)
    for t in range(1, input_ids.shape[1]):
        positions[:, t] = torch.where(document_ids[:, t] == document_ids[:, t - 1], positions[:, t - 1] + 1, 0)
    return Batch(input_ids, torch.full_like(input_ids, -100), positions, document_ids)


def random_ids(rows: int, length: int) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def test_whole_rows(models: tuple[CausalLM, nn.Module]) -> None:
    ours, theirs = models
    ids = random_ids(2, 130)
    mine = ours(make_batch(ids, torch.ones_like(ids))).logits()
    expected = theirs(input_ids=ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows(models: tuple[CausalLM, nn.Module], side: str) -> None:
    ours, theirs = models
    ids = random_ids(3, 24)
    real = torch.tensor([24, 11, 1])
    index = torch.arange(24)
    attention = (index >= 24 - real[:, None]) if side == "left" else (index < real[:, None])
    mine = ours(make_batch(ids, attention.long())).logits()
    positions = (attention.long().cumsum(-1) - 1).clamp(min=0)
    expected = theirs(input_ids=ids, attention_mask=attention.long(), position_ids=positions).logits
    assert mine.isfinite().all()
    torch.testing.assert_close(mine[attention], expected[attention], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [40, 520], ids=["mask", "loop"])
@torch.no_grad()
def test_packed_documents_equal_each_document_alone(models: tuple[CausalLM, nn.Module], length: int) -> None:
    ours, theirs = models
    ids = random_ids(2, length)
    borders = [[0, 7, 8, length // 2, length - 3], [0, length // 3, length]]
    documents = torch.zeros_like(ids)
    for row, cuts in enumerate(borders):
        for number, (start, end) in enumerate(pairwise(cuts), start=1):
            documents[row, start:end] = number
    mine = ours(make_batch(ids, documents)).logits()
    assert mine.isfinite().all()
    for row, cuts in enumerate(borders):
        for start, end in pairwise(cuts):
            expected = theirs(input_ids=ids[row : row + 1, start:end]).logits[0]
            torch.testing.assert_close(mine[row, start:end], expected, rtol=1e-4, atol=1e-4)


def test_gradients(models: tuple[CausalLM, nn.Module]) -> None:
    ours, theirs = models
    ids = random_ids(2, 16)
    ours.zero_grad()
    theirs.zero_grad()
    ours(make_batch(ids, torch.ones_like(ids))).logits().logsumexp(-1).sum().backward()
    theirs(input_ids=ids).logits.logsumexp(-1).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        scale = expected[name].grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4 * scale + 1e-6)
