"""Attention plans agree with each other and with a loop written out; rotation, scaling, cache."""

import math

import pytest
import torch
from torch import Tensor

from wrinklefree.models import attention, runs
from wrinklefree.models.attention import (
    AttentionPlan,
    KVCache,
    attend,
    document_mask,
    find_runs,
    plan_attention,
    rotary_frequencies,
    rotary_table,
    rotate,
)
from wrinklefree.models.config import Architecture, RopeScaling


def states(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_architecture(scaling: RopeScaling | None = None) -> Architecture:
    return Architecture(
        family="llama",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        rope_theta=100.0,
        rope_scaling=scaling,
    )


def test_mask_written_out() -> None:
    mask = document_mask(torch.tensor([[0, 1, 1, 2, 0]]), queries=5)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_mask_of_the_last_queries_is_the_end_of_the_whole_mask() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2]])
    assert torch.equal(document_mask(ids, queries=2), document_mask(ids, queries=6)[:, :, -2:])


def test_a_document_id_that_comes_back_is_another_document() -> None:
    mask = document_mask(torch.tensor([[1, 2, 1]]), queries=3)
    assert not mask[0, 0, 2, 0]


def test_runs() -> None:
    (runs,) = find_runs(torch.tensor([[0, 0, 1, 2, 2]]))
    assert [(run.start, run.end, run.is_padding) for run in runs] == [(0, 2, True), (2, 3, False), (3, 5, False)]


def test_plan_takes_the_cheapest_exact_way() -> None:
    long = attention.MIN_LENGTH_FOR_LOOP
    one, two = torch.ones(2, long, dtype=torch.long), torch.ones(2, long, dtype=torch.long)
    two[1, long // 2 :] = 2
    assert plan_attention(one, queries=long) == AttentionPlan(is_causal=True)
    assert plan_attention(one, queries=1) == AttentionPlan()
    assert plan_attention(two, queries=long).rows is not None
    assert plan_attention(two[:, 1:], queries=long - 1).mask is not None
    assert plan_attention(torch.zeros_like(one), queries=long).rows is not None
    assert plan_attention(two.to("meta"), queries=long).mask is not None


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_loop_equals_mask_in_values_and_gradients(key_heads: int) -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 2, 2, 0, 0]])
    slope = states(2, 4, 8, 16, seed=9)
    results = []
    for plan in (AttentionPlan(mask=document_mask(ids, queries=8)), AttentionPlan(rows=find_runs(ids))):
        query = states(2, 4, 8, 16, seed=0).requires_grad_()
        key, value = (states(2, key_heads, 8, 16, seed=seed).requires_grad_() for seed in (1, 2))
        output = attend(query, key, value, plan)
        (output * slope).sum().backward()
        results.append([output.detach(), query.grad, key.grad, value.grad])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_attention_written_out() -> None:
    query, key, value = states(1, 2, 3, 4, seed=0), states(1, 1, 3, 4, seed=1), states(1, 1, 3, 4, seed=2)
    output = attend(query, key, value, AttentionPlan(is_causal=True))
    for head in range(2):
        for t in range(3):
            scores = torch.stack([query[0, head, t] @ key[0, 0, s] / 2.0 for s in range(t + 1)])
            expected = sum(p * value[0, 0, s] for s, p in enumerate(scores.softmax(0)))
            torch.testing.assert_close(output[0, head, t], expected)


def test_padding_attends_to_itself() -> None:
    ids = torch.tensor([[0, 0, 1]])
    query, key, value = states(1, 2, 3, 4, seed=0), states(1, 1, 3, 4, seed=1), states(1, 1, 3, 4, seed=2)
    output = attend(query, key, value, AttentionPlan(mask=document_mask(ids, queries=3)))
    torch.testing.assert_close(output[:, :, :2], value[:, :, :2].expand(1, 2, 2, 4))


def test_rotation_depends_on_the_distance_only() -> None:
    architecture = make_architecture()
    query, key = states(1, 1, 1, 8, seed=0), states(1, 1, 1, 8, seed=1)

    def score(query_at: int, key_at: int) -> float:
        turned = [
            rotate(x, rotary_table(architecture, torch.tensor([[at]]))) for x, at in ((query, query_at), (key, key_at))
        ]
        return (turned[0] * turned[1]).sum().item()

    assert score(5, 3) == pytest.approx(score(45, 43), abs=1e-4)
    assert score(5, 3) != pytest.approx(score(5, 4), abs=1e-2)
    assert score(0, 0) == pytest.approx((query * key).sum().item(), abs=1e-6)


def test_rotation_is_a_complex_product() -> None:
    x = states(1, 1, 3, 8, seed=0)
    turned = rotate(x, rotary_table(make_architecture(), torch.tensor([[0, 1, 7]])))
    angles = torch.tensor([0.0, 1.0, 7.0])[:, None] * torch.tensor([100 ** (-i / 4) for i in range(4)])
    expected = torch.complex(x[0, 0, :, :4], x[0, 0, :, 4:]) * torch.polar(torch.ones(3, 4), angles)
    torch.testing.assert_close(turned[0, 0], torch.cat((expected.real, expected.imag), dim=-1))


def test_llama3_scaling_at_both_ends_and_between() -> None:
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    device = torch.device("cpu")
    plain = rotary_frequencies(make_architecture(), device)
    scaled = rotary_frequencies(make_architecture(scaling), device)
    periods = 64 * plain / (2 * math.pi)  # about 10.2, 3.2, 1.0, 0.3
    assert scaled[0] == plain[0]
    share = (periods[1] - 1) / 3
    assert scaled[1].item() == pytest.approx((share * plain[1] + (1 - share) * plain[1] / 8).item())
    assert scaled[3].item() == pytest.approx(plain[3].item() / 8)


def test_cache_hands_back_what_it_was_given() -> None:
    cache = KVCache(batch_size=1, max_length=5)
    key, value = states(1, 2, 5, 4, seed=0), states(1, 2, 5, 4, seed=1)
    cache.extend(0, key[:, :, :3], value[:, :, :3])
    cache.length = 3
    keys, values = cache.extend(0, key[:, :, 3:], value[:, :, 3:])
    assert torch.equal(keys, key)
    assert torch.equal(values, value)
    assert cache.extend_documents(torch.tensor([[0, 1, 1]])).tolist() == [[0, 1, 1]]
    assert cache.extend_documents(torch.tensor([[1, 1]])).tolist() == [[0, 1, 1, 1, 1]]


@pytest.mark.parametrize("length", [runs.MAX_KEYS_FOR_FLOAT32, runs.MAX_KEYS_FOR_FLOAT32 + 1])
def test_bfloat16_states_give_bfloat16_close_to_float32(length: int) -> None:
    query, key, value = (states(1, heads, length, 8, seed=heads) for heads in (4, 2, 1))
    key, value = key[:, :1], value
    exact = attend(query, key, value, AttentionPlan(is_causal=True))
    rounded = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), AttentionPlan(is_causal=True))
    assert rounded.dtype == torch.bfloat16
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.01


def test_autocast_does_not_turn_short_rows_back_to_bfloat16() -> None:
    query, key, value = (states(2, heads, 32, 16, seed=seed).bfloat16() for seed, heads in ((0, 4), (1, 2), (2, 2)))
    plain = attend(query, key, value, AttentionPlan(is_causal=True))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = attend(query, key, value, AttentionPlan(is_causal=True))
    assert torch.equal(plain, under_autocast)
    exact = attend(query.float(), key.float(), value.float(), AttentionPlan(is_causal=True))
    assert torch.equal(plain, exact.bfloat16())
