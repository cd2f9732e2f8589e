"""The torch engine: the same tokens as `generate`, reproducible under load, and slots that come back."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from wrinklefree.models.artifact import Artifact
from wrinklefree.models.bitlinear import quantization_of
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.generate import generate
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.models.subln import subln_strength_of
from wrinklefree.serving.engine.protocol import Sampling, Token
from wrinklefree.serving.engine.pytorch import PROMPT_CHUNK, TorchEngine
from wrinklefree.utils.errors import ConfigError, EngineError
from wrinklefree.utils.tokenizer import TextTokenizer

GREEDY = Sampling(16, temperature=0)
SAMPLED = Sampling(12, temperature=0.9, top_k=40, top_p=0.95, seed=7)


@pytest.fixture
def engine(model: CausalLM, tokenizer: TextTokenizer) -> Iterator[TorchEngine]:
    built = TorchEngine(model, tokenizer, name="tiny", context_length=1024, slots=3, threads=1)
    yield built
    built.close()


def ids(tokens: Iterator[Token]) -> list[int]:
    return [token.id for token in tokens]


@pytest.fixture
def endless(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> TorchEngine:
    """The engine, not stopping at end tokens."""
    monkeypatch.setattr(engine, "_end_tokens", frozenset[int]())
    return engine


def test_greedy_tokens_equal_those_of_generate(endless: TorchEngine, model: CausalLM, prompt: list[int]) -> None:
    expected = generate(model, [prompt], max_new_tokens=16, eos_token_id=None)[0]
    assert ids(endless.stream(prompt, GREEDY)) == expected


def test_stops_at_the_tokenizers_end(
    engine: TorchEngine, model: CausalLM, tokenizer: TextTokenizer, prompt: list[int]
) -> None:
    expected = generate(model, [prompt], max_new_tokens=16, eos_token_id=tokenizer.eos_token_id)[0]
    assert 0 < len(expected) < 16
    assert ids(engine.stream(prompt, GREEDY)) == expected


def test_a_prompt_longer_than_a_chunk_gives_the_tokens_of_generate(endless: TorchEngine, model: CausalLM) -> None:
    long = torch.randint(1, 4000, (PROMPT_CHUNK + 40,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = generate(model, [long], max_new_tokens=4, eos_token_id=None)[0]
    assert ids(endless.stream(long, replace(GREEDY, max_tokens=4))) == expected


def test_logprobs_are_the_log_softmax_before_temperature_and_truncation(
    endless: TorchEngine, model: CausalLM, prompt: list[int]
) -> None:
    tokens = list(endless.stream(prompt, replace(SAMPLED, logprobs=3)))
    row = torch.tensor([prompt + [token.id for token in tokens]])
    with torch.no_grad():
        logits = model(Batch(row, row, torch.arange(row.shape[1])[None], torch.ones_like(row))).logits()[0]
    logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    for token, expected in zip(tokens, logprobs, strict=True):
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-4)
        best = expected.topk(3)
        assert [index for index, _ in token.alternatives] == best.indices.tolist()
        assert [value for _, value in token.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_all_logprobs_sum_to_one(engine: TorchEngine, tiny: Artifact, prompt: list[int]) -> None:
    sampling = replace(GREEDY, max_tokens=1, logprobs=tiny.architecture.vocab_size)
    (token,) = engine.stream(prompt, sampling)
    assert torch.tensor([value for _, value in token.alternatives]).exp().sum() == pytest.approx(1.0, abs=1e-4)
    assert token.alternatives[0] == (token.id, token.logprob)


def test_no_logprobs_unless_asked_for(engine: TorchEngine, prompt: list[int]) -> None:
    (token,) = engine.stream(prompt, replace(GREEDY, max_tokens=1))
    assert (token.logprob, token.alternatives) == (None, ())
    (token,) = engine.stream(prompt, replace(GREEDY, max_tokens=1, logprobs=0))
    assert token.logprob is not None
    assert token.alternatives == ()


def test_a_seed_gives_the_same_tokens_alone_and_under_load(engine: TorchEngine, prompt: list[int]) -> None:
    alone = {seed: ids(engine.stream(prompt, replace(SAMPLED, seed=seed))) for seed in range(8)}
    assert len({tuple(tokens) for tokens in alone.values()}) > 4
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(lambda seed: ids(engine.stream(prompt, replace(SAMPLED, seed=seed))), range(8))
    assert dict(enumerate(together)) == alone


def test_without_a_seed_answers_differ(engine: TorchEngine, prompt: list[int]) -> None:
    answers = {tuple(ids(engine.stream(prompt, replace(SAMPLED, seed=None, temperature=1.5)))) for _ in range(4)}
    assert len(answers) > 1


def test_stops_before_an_end_token(model: CausalLM, tokenizer: TextTokenizer, prompt: list[int]) -> None:
    free = generate(model, [prompt], max_new_tokens=16, eos_token_id=None)[0]
    end = free[3]
    stopping = TorchEngine(model, tokenizer, name="tiny", context_length=64, slots=1, threads=1, end_tokens=[end])
    assert stopping.end_tokens == {end, tokenizer.eos_token_id}
    assert ids(stopping.stream(prompt, GREEDY)) == free[: free.index(end)]
    stopping.close()


def test_64_cancelled_requests_free_their_slots(endless: TorchEngine, prompt: list[int]) -> None:
    for index in range(64):
        stream = endless.stream(prompt, Sampling(900, temperature=0))
        if index % 2:
            next(stream)
        stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(ids(endless.stream(prompt, GREEDY))) == 16


def test_refusals(engine: TorchEngine, prompt: list[int]) -> None:
    with pytest.raises(ConfigError, match="the context holds 1024"):
        engine.stream(prompt, Sampling(1024))
    with pytest.raises(ConfigError, match="the vocabulary ends at 4095"):
        engine.stream([4096], GREEDY)
    assert ids(engine.stream(prompt, Sampling(0))) == []


def test_closing_ends_requests_and_refuses_new_ones(endless: TorchEngine, prompt: list[int]) -> None:
    stream = endless.stream(prompt, Sampling(1000))
    next(stream)
    endless.close()
    endless.close()
    with pytest.raises(EngineError, match="closed before the answer was complete"):
        list(stream)
    with pytest.raises(EngineError, match="closed"):
        endless.stream(prompt, GREEDY)


def test_a_failing_request_does_not_take_the_engine_along(
    endless: TorchEngine, model: CausalLM, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
        with pytest.raises(EngineError, match="ran out of memory for this request"):
            list(endless.stream(prompt, GREEDY))
    assert len(ids(endless.stream(prompt, GREEDY))) == 16


def test_a_model_in_its_warm_up_is_served_fully_ternary(
    tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    architecture = Architecture(
        family="llama",
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    spec = BitNetSpec(placement="output", gain="ones", quantization_lambda=0.5, subln_strength=0.25)
    model = CausalLM(architecture, spec)
    serving = TorchEngine(model, tokenizer, name="young", context_length=64, slots=1, threads=1)
    assert (quantization_of(model), subln_strength_of(model)) == (1.0, 1.0)
    assert "young was saved at lambda 0.5 and SubLN strength 0.25" in caplog.text
    expected = generate(model, [[5, 6, 7]], max_new_tokens=6, eos_token_id=None)[0]
    assert ids(serving.stream([5, 6, 7], Sampling(6, temperature=0))) == expected
    serving.close()
