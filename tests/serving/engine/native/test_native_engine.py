"""The engine behind the seam: the tokens of the PyTorch model, whatever the load, and slots that come back."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from wrinklefree.models.artifact import Artifact, write_artifact
from wrinklefree.models.bitlinear import set_products, set_quantization
from wrinklefree.models.convert import to_bitnet
from wrinklefree.models.generate import generate
from wrinklefree.models.llama import CausalLM
from wrinklefree.serving.converter import ConversionOptions, convert
from wrinklefree.serving.engine.native.engine import STEP_TOKENS, NativeEngine
from wrinklefree.serving.engine.native.loading import load_packed
from wrinklefree.serving.engine.native.model import PackedModel
from wrinklefree.serving.engine.protocol import Sampling, Token
from wrinklefree.utils.errors import CheckpointError, ConfigError, EngineError
from wrinklefree.utils.tokenizer import TextTokenizer

GREEDY = Sampling(16, temperature=0)
SAMPLED = Sampling(12, temperature=0.9, top_k=40, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def ternary(model: CausalLM) -> CausalLM:
    """The tiny model with SubLN, fully quantized; untrained as such, so its words mean nothing."""
    converted = to_bitnet(model, placement="output", gain="ones", activation_bits=8, strength=1.0, calibration=[])
    set_quantization(converted, 1.0)
    set_products(converted, "float", "exact")  # the engine shares the kernels that are the default
    assert converted.bitnet is not None
    converted.bitnet = converted.bitnet.model_copy(update={"quantization_lambda": 1.0})
    return converted.eval()


@pytest.fixture(scope="module")
def packed(ternary: CausalLM) -> PackedModel:
    return PackedModel.from_model(ternary, "f32")


@pytest.fixture
def engine(packed: PackedModel, tokenizer: TextTokenizer) -> Iterator[NativeEngine]:
    built = NativeEngine(packed, tokenizer, name="tiny", context_length=1024, slots=3, threads=1, cache="f32")
    yield built
    built.close()


@pytest.fixture
def endless(engine: NativeEngine, monkeypatch: pytest.MonkeyPatch) -> NativeEngine:
    """The engine, not stopping at end tokens."""
    monkeypatch.setattr(engine, "_end_tokens", frozenset[int]())
    return engine


def ids(tokens: Iterator[Token]) -> list[int]:
    return [token.id for token in tokens]


def random_prompt(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 4000, count).tolist()


def test_greedy_tokens_equal_those_of_generate(endless: NativeEngine, ternary: CausalLM, prompt: list[int]) -> None:
    expected = generate(ternary, [prompt], max_new_tokens=16, eos_token_id=None)[0]
    assert ids(endless.stream(prompt, GREEDY)) == expected


def test_a_prompt_longer_than_a_step(endless: NativeEngine, ternary: CausalLM) -> None:
    long = random_prompt(STEP_TOKENS * 2 + 40)
    expected = generate(ternary, [long], max_new_tokens=4, eos_token_id=None)[0]
    assert ids(endless.stream(long, replace(GREEDY, max_tokens=4))) == expected


def test_logprobs_are_the_log_softmax(endless: NativeEngine, ternary: CausalLM, prompt: list[int]) -> None:
    (token,) = endless.stream(prompt, replace(GREEDY, max_tokens=1, logprobs=3))
    from wrinklefree.models.generate import left_pad

    with torch.no_grad():
        expected = ternary(left_pad([prompt], torch.device("cpu"))).logits()[0, -1].log_softmax(-1).topk(3)
    assert [index for index, _ in token.alternatives] == expected.indices.tolist()
    assert [value for _, value in token.alternatives] == pytest.approx(expected.values.tolist(), abs=1e-3)


def test_a_seed_gives_the_same_tokens_alone_and_under_load(engine: NativeEngine, prompt: list[int]) -> None:
    alone = {seed: ids(engine.stream(prompt, replace(SAMPLED, seed=seed))) for seed in range(8)}
    assert len({tuple(tokens) for tokens in alone.values()}) > 4
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(lambda seed: ids(engine.stream(prompt, replace(SAMPLED, seed=seed))), range(8))
    assert dict(enumerate(together)) == alone


def test_different_prompts_under_load_get_what_they_get_alone(endless: NativeEngine) -> None:
    prompts = [random_prompt(count, seed=count) for count in (3, 300, 40, 1, 600, 7)]
    alone = [ids(endless.stream(prompt, replace(SAMPLED, seed=3))) for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda prompt: ids(endless.stream(prompt, replace(SAMPLED, seed=3))), prompts * 2))
    assert together == alone * 2


def test_steps_are_shared(endless: NativeEngine, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three requests of 40 tokens take little more than 40 steps."""
    sizes: list[int] = []
    step, gate = endless._model.step, threading.Event()

    def counted(ids: list[int], *rest: list[int]) -> np.ndarray:
        gate.wait(10)  # until all three are queued
        sizes.append(len(ids))
        return step(ids, *rest)

    monkeypatch.setattr(endless._model, "step", counted)
    streams = [endless.stream(prompt, Sampling(40, temperature=0)) for _ in range(3)]
    gate.set()
    assert all(len(ids(stream)) == 40 for stream in streams)
    assert len(sizes) <= 43
    assert sizes.count(3) >= 35


def test_a_shared_beginning_is_computed_once(
    endless: NativeEngine, ternary: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[int] = []
    step = endless._model.step

    def counted(ids: list[int], *rest: list[int]) -> np.ndarray:
        fed.append(len(ids))
        return step(ids, *rest)

    monkeypatch.setattr(endless._model, "step", counted)
    system = random_prompt(200)
    one = replace(GREEDY, max_tokens=1)
    prompts = [[*system, 5, 6, 7], [*system, 5, 9], [*system, 5, 9], system[:150], [*random_prompt(30, 4)]]
    expected = [
        row[0] for prompt in prompts for row in generate(ternary, [prompt], max_new_tokens=1, eos_token_id=None)
    ]
    found = [ids(endless.stream(prompt, one))[0] for prompt in prompts]
    assert found == expected
    assert fed == [203, 1, 1, 1, 30]


def test_a_beginning_is_copied_from_a_slot_at_work(endless: NativeEngine, ternary: CausalLM) -> None:
    system = random_prompt(120, seed=8)
    busy = endless.stream([*system, 4], Sampling(800, temperature=0))
    next(busy)
    expected = generate(ternary, [[*system, 77, 78]], max_new_tokens=8, eos_token_id=None)[0]
    assert ids(endless.stream([*system, 77, 78], replace(GREEDY, max_tokens=8))) == expected
    busy.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_64_cancelled_requests_free_their_slots(endless: NativeEngine, prompt: list[int]) -> None:
    for index in range(64):
        stream = endless.stream(prompt, Sampling(900, temperature=0))
        if index % 2:
            next(stream)
        stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(ids(endless.stream(prompt, GREEDY))) == 16


def test_refusals(engine: NativeEngine, prompt: list[int]) -> None:
    with pytest.raises(ConfigError, match="the context holds 1024"):
        engine.stream(prompt, Sampling(1024))
    with pytest.raises(ConfigError, match="the vocabulary ends at 4095"):
        engine.stream([4096], GREEDY)
    assert ids(engine.stream(prompt, Sampling(0))) == []


def test_the_last_position_of_the_context(packed: PackedModel, tokenizer: TextTokenizer) -> None:
    small = NativeEngine(packed, tokenizer, name="tiny", context_length=33, slots=1, threads=1)
    small._end_tokens = frozenset()
    assert len(ids(small.stream(random_prompt(20), Sampling(13, temperature=0)))) == 13
    small.close()


def test_stops_before_an_end_token(packed: PackedModel, ternary: CausalLM, tokenizer: TextTokenizer) -> None:
    start = random_prompt(9, seed=2)
    free = generate(ternary, [start], max_new_tokens=16, eos_token_id=None)[0]
    end = free[3]
    stopping = NativeEngine(
        packed, tokenizer, name="tiny", context_length=64, slots=1, threads=1, cache="f32", end_tokens=[end]
    )
    assert stopping.end_tokens >= {end, tokenizer.eos_token_id}
    assert ids(stopping.stream(start, GREEDY)) == free[: free.index(end)]
    stopping.close()


def test_closing_ends_requests_and_refuses_new_ones(endless: NativeEngine, prompt: list[int]) -> None:
    stream = endless.stream(prompt, Sampling(1000))
    next(stream)
    endless.close()
    endless.close()
    with pytest.raises(EngineError, match="closed before the answer was complete"):
        list(stream)
    with pytest.raises(EngineError, match="closed"):
        endless.stream(prompt, GREEDY)


def test_a_failing_step_does_not_take_the_engine_along(
    endless: NativeEngine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ids(endless.stream(prompt, GREEDY))
    with monkeypatch.context() as patch:
        patch.setattr(endless._model, "step", lambda *_: (_ for _ in ()).throw(EngineError("no")))
        with pytest.raises(EngineError, match="no"):
            list(endless.stream(prompt, GREEDY))
    assert ids(endless.stream(prompt, GREEDY)) == expected


def test_an_artifact_is_loaded(
    ternary: CausalLM, packed: PackedModel, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    write_artifact(tmp_path / "student", ternary, tokenizer, {"stage": "test"})
    loaded, found = load_packed(tmp_path / "student", "f32")
    assert found.json == tokenizer.json
    assert loaded.linears.keys() == packed.linears.keys()
    for name, linear in packed.linears.items():
        assert (loaded.linears[name].tiles == linear.tiles).all()
        assert loaded.linears[name].scale == linear.scale


def test_a_full_precision_artifact_is_refused(tiny: Artifact) -> None:
    with pytest.raises(ConfigError, match="holds a full-precision model"):
        load_packed(tiny.folder)


def test_a_gguf_file_of_others_is_refused(tiny_gguf: Path) -> None:
    with pytest.raises(ConfigError, match="was not written by wrinklefree"):
        load_packed(tiny_gguf)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no artifact"):
        load_packed(tmp_path)


def test_a_model_in_its_warm_up_is_announced(
    packed: PackedModel, tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    young = replace(packed, bitnet=packed.bitnet.model_copy(update={"quantization_lambda": 0.5}))
    NativeEngine(young, tokenizer, name="young", context_length=64, slots=1, threads=1).close()
    assert "young was saved at lambda 0.5 and SubLN strength 1 and is served at 1 and 1" in caplog.text


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0", "Q2_0", "Q4_0", "I2_S"])
def test_our_gguf_files_hold_the_same_codes(
    packed: PackedModel, ternary: CausalLM, tokenizer: TextTokenizer, tmp_path: Path, kind: str
) -> None:
    write_artifact(tmp_path / "student", ternary, tokenizer, {"stage": "test"})
    options = ConversionOptions(input=tmp_path / "student", output=tmp_path / "model.gguf", weight_type=kind, run=False)
    convert(options)
    loaded, found = load_packed(tmp_path / "model.gguf", "f32")
    assert found.encode("The sea was calm") == tokenizer.encode("The sea was calm")
    assert loaded.architecture == packed.architecture
    assert loaded.linears.keys() == packed.linears.keys()
    for name, linear in packed.linears.items():
        assert (loaded.linears[name].tiles == linear.tiles).all()
        assert loaded.linears[name].scale == pytest.approx(linear.scale, rel=2**-10)  # a 16-bit scale in most types
