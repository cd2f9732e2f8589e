"""Generation: the cache changes nothing, prompts of a batch do not meet, sampling filters keep what they should."""

import pytest
import torch

from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.generate import choose_token, generate, left_pad
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 30, 12]]


@pytest.fixture(scope="module", params=[None, BitNetSpec(placement="output", gain="ones", quantization_lambda=1.0)])
def model(request: pytest.FixtureRequest) -> CausalLM:
    """A random model with enough spread in its logits."""
    torch.manual_seed(0)
    architecture = Architecture(
        family="llama",
        vocab_size=41,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    built = CausalLM(architecture, request.param)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
    return built


def greedy(model: CausalLM, prompt: list[int], count: int) -> list[int]:
    """One prompt, no cache: the whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(count):
        row = torch.tensor([ids])
        batch = Batch(row, row, torch.arange(len(ids))[None], torch.ones_like(row))
        with torch.no_grad():
            ids.append(int(model(batch).logits()[0, -1].argmax()))
    return ids[len(prompt) :]


def test_batched_cached_tokens_equal_those_of_each_prompt_alone(model: CausalLM) -> None:
    expected = [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) > 1
    assert generate(model, PROMPTS, max_new_tokens=8, eos_token_id=None) == expected


def test_stops_before_the_end_token(model: CausalLM) -> None:
    free = generate(model, PROMPTS, max_new_tokens=8, eos_token_id=None)
    end = free[0][3]
    expected = [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in free]
    assert generate(model, PROMPTS, max_new_tokens=8, eos_token_id=end) == expected


def test_no_tokens_asked_for(model: CausalLM) -> None:
    assert generate(model, PROMPTS, max_new_tokens=0, eos_token_id=None) == [[], [], []]


def test_sampling_is_repeatable_and_differs_between_seeds(model: CausalLM) -> None:
    def sample(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return generate(
            model, PROMPTS, max_new_tokens=12, eos_token_id=None, temperature=2.0, top_p=0.95, generator=generator
        )

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_training_goes_on_after_generation(model: CausalLM) -> None:
    generate(model, [[1, 2]], max_new_tokens=2, eos_token_id=None)
    row = torch.tensor([[1, 2, 3]])
    model(Batch(row, row, torch.arange(3)[None], torch.ones_like(row))).logits().sum().backward()


def test_left_padding() -> None:
    batch = left_pad([[4, 5], [6]], torch.device("cpu"))
    assert batch.input_ids.tolist() == [[4, 5], [0, 6]]
    assert batch.position_ids.tolist() == [[0, 1], [0, 0]]
    assert batch.document_ids.tolist() == [[1, 1], [0, 1]]
    assert batch.num_targets == 0


def frequencies(logits: torch.Tensor, **options: float) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    tokens = choose_token(logits.expand(20000, -1), generator=generator, **options)  # type: ignore[arg-type]
    return (torch.bincount(tokens, minlength=logits.shape[-1]) / 20000).tolist()


def test_sampling_frequencies() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert frequencies(logits, temperature=1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)
    squares = [0.25, 0.09, 0.0225, 0.0025]
    assert frequencies(logits, temperature=0.5) == pytest.approx([s / sum(squares) for s in squares], abs=0.015)
    assert frequencies(logits, temperature=1.0, top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.015)
    assert frequencies(logits, temperature=1.0, top_p=0.9) == pytest.approx(
        [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=0.015
    )
    assert frequencies(logits, temperature=1.0, top_p=0.0) == [1.0, 0.0, 0.0, 0.0]
    assert choose_token(logits, temperature=0.0).tolist() == [0]
