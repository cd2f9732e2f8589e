"""llama.cpp in process: PyTorch's tokens and probabilities, no lost tokens, slots that come back, clean failures."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wrinklefree.models.generate import generate
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.serving.engine import llama_cpp
from wrinklefree.serving.engine.completions import completion_body
from wrinklefree.serving.engine.llama_cpp import LlamaCppEngine
from wrinklefree.serving.engine.protocol import Sampling, Token
from wrinklefree.utils.errors import ConfigError, EngineError
from wrinklefree.utils.tokenizer import TextTokenizer

pytest.importorskip("xllamacpp", reason="needs the package xllamacpp, which has no wheel for this platform")

GREEDY = Sampling(16, temperature=0)
SAMPLED = Sampling(12, temperature=0.9, top_k=40, top_p=0.95, seed=7)


def open_tiny(path: Path, tokenizer: TextTokenizer, **options: Any) -> LlamaCppEngine:
    settings = {"name": "tiny", "context_length": 512, "slots": 3, "threads": 1} | options
    return LlamaCppEngine(path, tokenizer, **settings)


@pytest.fixture(scope="module")
def engine(tiny_gguf: Path, tokenizer: TextTokenizer) -> Iterator[LlamaCppEngine]:
    built = open_tiny(tiny_gguf, tokenizer)
    yield built
    built.close()


def ids(tokens: Iterator[Token]) -> list[int]:
    return [token.id for token in tokens]


def biased(monkeypatch: pytest.MonkeyPatch, bias: list[list[float]]) -> None:
    """Every request of the engine gets this logit bias."""
    monkeypatch.setattr(llama_cpp, "completion_body", lambda *a, **k: {"logit_bias": bias} | completion_body(*a, **k))


def test_greedy_tokens_equal_those_of_pytorch(
    engine: LlamaCppEngine, model: CausalLM, tokenizer: TextTokenizer, prompt: list[int]
) -> None:
    for text in ("The sea was calm and the", "In the year 1900 a man", "for i in range("):
        start = tokenizer.encode(text)
        expected = generate(model, [start], max_new_tokens=16, eos_token_id=tokenizer.eos_token_id)[0]
        assert ids(engine.stream(start, GREEDY)) == expected


def test_logprobs_are_those_of_pytorch_before_temperature(
    engine: LlamaCppEngine, model: CausalLM, prompt: list[int]
) -> None:
    tokens = list(engine.stream(prompt, replace(SAMPLED, logprobs=3)))
    assert tokens
    row = torch.tensor([prompt + [token.id for token in tokens]])
    with torch.no_grad():
        logits = model(Batch(row, row, torch.arange(row.shape[1])[None], torch.ones_like(row))).logits()[0]
    for token, expected in zip(tokens, logits[len(prompt) - 1 : -1].log_softmax(-1), strict=True):
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-2)
        assert len(token.alternatives) == 3
        for index, value in token.alternatives:
            assert value == pytest.approx(float(expected[index]), abs=1e-2)


def test_sampling_settings_bound_the_tokens(engine: LlamaCppEngine, model: CausalLM, prompt: list[int]) -> None:
    row = torch.tensor([prompt])
    with torch.no_grad():
        logits = model(Batch(row, row, torch.arange(len(prompt))[None], torch.ones_like(row))).logits()[0, -1]
    hot = (logits / 2.0).softmax(-1).sort(descending=True)
    kept = int((hot.values.cumsum(0) < 0.3).sum()) + 1
    one = Sampling(1, temperature=2.0, top_p=0.3)
    seen = {token for seed in range(40) for token in ids(engine.stream(prompt, replace(one, seed=seed)))}
    assert len(seen) > 1
    assert seen <= set(hot.indices[:kept].tolist())
    only_three = Sampling(1, temperature=2.0, top_k=3)
    seen = {token for seed in range(40) for token in ids(engine.stream(prompt, replace(only_three, seed=seed)))}
    assert seen == set(logits.topk(3).indices.tolist())


def test_a_seed_gives_the_same_tokens(engine: LlamaCppEngine, prompt: list[int]) -> None:
    once, again = (ids(engine.stream(prompt, SAMPLED)) for _ in range(2))
    assert once == again
    assert len({tuple(ids(engine.stream(prompt, replace(SAMPLED, seed=seed)))) for seed in range(6)}) > 3


def test_eight_requests_at_once_on_three_slots(engine: LlamaCppEngine, tokenizer: TextTokenizer) -> None:
    prompts = [tokenizer.encode(f"The number {index} is") for index in range(8)]
    alone = [ids(engine.stream(prompt, GREEDY)) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: ids(engine.stream(prompt, GREEDY)), prompts))
    assert together == alone


def test_each_slot_has_the_whole_context(engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    biased(monkeypatch, [[engine.tokenizer.eos_token_id, -1e4]])
    prompt = [5, 6, 7] * 40
    with ThreadPoolExecutor(3) as pool:
        lengths = list(pool.map(lambda _: len(ids(engine.stream(prompt, Sampling(392, temperature=0)))), range(3)))
    assert lengths == [392, 392, 392]
    with pytest.raises(ConfigError, match="the context holds 512"):
        engine.stream(prompt, Sampling(393))


def test_64_cancelled_requests_free_their_slots(
    engine: LlamaCppEngine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ids(engine.stream(prompt, GREEDY))
    with monkeypatch.context() as patch:
        biased(patch, [[engine.tokenizer.eos_token_id, -1e4]])
        for index in range(64):
            stream = engine.stream(prompt, Sampling(450, temperature=0))
            if index % 2:
                next(stream)
            stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert ids(engine.stream(prompt, GREEDY)) == expected


def test_end_tokens_are_not_part_of_the_answer(
    engine: LlamaCppEngine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = ids(engine.stream(prompt, GREEDY))
    with monkeypatch.context() as patch:
        biased(patch, [[engine.tokenizer.eos_token_id, 1e4]])
        assert ids(engine.stream(prompt, GREEDY)) == []
    monkeypatch.setattr(engine, "_end_tokens", frozenset({free[3]}))
    assert ids(engine.stream(prompt, GREEDY)) == free[: free.index(free[3])]


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("count", [1, 7, 24])
def test_no_token_inside_a_character_is_lost(
    engine: LlamaCppEngine, prompt: list[int], monkeypatch: pytest.MonkeyPatch, count: int, logprobs: int | None
) -> None:
    """The model is made to write bytes of characters, whole and broken; a reply at once has every id."""
    vocabulary = engine._vocabulary
    values = [*"é€😀".encode(), 0x41, 0xFF]
    bias = [[vocabulary.ids[bytes([value])], 60.0] for value in sorted(set(values))]
    biased(monkeypatch, bias)
    sampling = Sampling(count, temperature=0, logprobs=logprobs)
    body = completion_body(prompt, sampling, stream=False) | {"logit_bias": bias}
    expected = engine._ask(engine._server, body)["__verbose"]["tokens"]
    tokens = list(engine.stream(prompt, sampling))
    assert [token.id for token in tokens] == expected
    assert len(tokens) == count
    if logprobs is not None:
        assert all(token.logprob is not None and token.logprob < 0 for token in tokens)


def test_whole_characters_of_several_tokens_keep_their_draw(
    engine: LlamaCppEngine, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C3 with A0 to AF is always a whole character: nothing is asked for again, so the seed's draw stands."""
    vocabulary = engine._vocabulary
    ids_ = [vocabulary.ids[bytes([value])] for value in (0xC3, 0xA9)]
    bias = [[index, 60.0] for index in ids_]
    biased(monkeypatch, bias)
    for seed in range(12):
        sampling = Sampling(2, seed=seed)
        body = completion_body(prompt, sampling, stream=False) | {"logit_bias": bias}
        expected = engine._ask(engine._server, body)["__verbose"]["tokens"]
        if expected == ids_:
            assert ids(engine.stream(prompt, sampling)) == expected
            return
    pytest.fail("no seed drew the two bytes in order")


def test_python_keeps_its_signal_handlers(tiny_gguf: Path, tokenizer: TextTokenizer) -> None:
    built: list[LlamaCppEngine] = []
    thread = threading.Thread(target=lambda: built.append(open_tiny(tiny_gguf, tokenizer)))
    thread.start()
    thread.join()
    caught: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        kept = signal.signal(number, lambda number, _: caught.append(number))
        other = open_tiny(tiny_gguf, tokenizer)
        signal.raise_signal(number)
        signal.signal(number, kept)
        other.close()
    assert caught == [signal.SIGINT, signal.SIGTERM]
    built[0].close()


def test_its_http_listener_is_a_private_socket_that_goes_away(tiny_gguf: Path, tokenizer: TextTokenizer) -> None:
    private = open_tiny(tiny_gguf, tokenizer)
    folder = private._folder
    assert private._server.listening_address == f"unix://{folder / 'http.sock'}"
    assert folder.stat().st_mode & 0o077 == 0
    private.close()
    private.close()
    assert not folder.exists()


def test_closing_ends_requests_and_refuses_new_ones(
    tiny_gguf: Path, tokenizer: TextTokenizer, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    biased(monkeypatch, [[tokenizer.eos_token_id, -1e4]])
    closing = open_tiny(tiny_gguf, tokenizer, slots=1)
    running, waiting = (closing.stream(prompt, Sampling(450)) for _ in range(2))
    next(running)
    closing.close()
    for stream in (running, waiting):
        with pytest.raises(EngineError, match="closed before the answer was complete"):
            list(stream)
    with pytest.raises(EngineError, match="closed"):
        closing.stream(prompt, GREEDY)


def test_a_file_that_does_not_load_is_an_error(tiny_gguf: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_gguf.read_bytes()[:2_000_000])
    with pytest.raises(EngineError, match=r"llama\.cpp does not load .*broken\.gguf \(.*not within the file bounds"):
        open_tiny(broken, tokenizer)


def test_a_file_that_makes_it_abort_does_not_take_us_along(
    tiny_gguf: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    content = bytearray(tiny_gguf.read_bytes())
    value = content.find(b"llama.block_count") + len(b"llama.block_count") + 4
    content[value : value + 4] = (5000).to_bytes(4, "little")
    broken = tmp_path / "aborts.gguf"
    broken.write_bytes(content)
    with pytest.raises(EngineError, match=r"llama\.cpp died of signal 6 on .*aborts\.gguf \(.*GGML_ASSERT"):
        open_tiny(broken, tokenizer)


def test_refused_settings_are_errors_of_the_request(engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "completion_body", lambda *a, **k: completion_body(*a, **k) | {"temperature": "warm"})
        with pytest.raises(EngineError, match=r"refused the request: .*temperature"):
            list(engine.stream([5], GREEDY))
    assert len(list(engine.stream([5], replace(GREEDY, max_tokens=1)))) <= 1


SCRIPT = """
import sys
from pathlib import Path
from wrinklefree.serving.engine.llama_cpp import LlamaCppEngine
from wrinklefree.serving.engine.protocol import Sampling
from wrinklefree.utils.tokenizer import TextTokenizer
engine = LlamaCppEngine(Path(sys.argv[1]), TextTokenizer.from_folder(sys.argv[2]), name="tiny", context_length=2048,
                        slots=1, threads=1)
stream = engine.stream([5] * 1500, Sampling(500))
next(stream)
"""


def test_a_process_ends_cleanly_and_silently_with_requests_under_way(tiny_gguf: Path, tiny: Any) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tiny_gguf), str(tiny.folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
