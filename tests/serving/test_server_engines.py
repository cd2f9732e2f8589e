"""OpenAI's own client against the server with each engine; BitNet.cpp's is a stand-in, as it cannot be built everywhere."""

import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tests.serving.conftest import TINY, running

from wrinklefree.cli import convert_main
from wrinklefree.native import library
from wrinklefree.serving.engine import llama_cpp
from wrinklefree.serving.engine.bitnet_cpp import BINARY_VARIABLE, BitNetCppEngine
from wrinklefree.serving.engine.choose import open_engine
from wrinklefree.serving.engine.protocol import Engine, Sampling
from wrinklefree.utils.tokenizer import TextTokenizer

STAND_IN = Path(__file__).parent / "engine" / "stand_in_server.py"
PROMPT = "The capital of"
ENGINES = ["torch, folder", "torch, GGUF", "llama.cpp, GGUF", "native, ternary folder", "native, ternary GGUF"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny.gguf"
    assert convert_main(["--input", str(TINY), "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module", params=ENGINES)
def kind(request: pytest.FixtureRequest) -> str:
    """Engine, and what it is given."""
    return request.param


@pytest.fixture(scope="module")
def client(kind: str, file: Path, ternary_folder: Path, ternary_gguf: Path) -> Iterator[openai.OpenAI]:
    name, given = kind.split(", ")
    if name == "llama.cpp" and not llama_cpp.is_installed():
        pytest.skip("needs the package xllamacpp, which has no wheel for this platform")
    if name == "native" and not library.is_available():
        pytest.skip("needs the CPU engine, which was not built")
    models = {"folder": TINY, "GGUF": file, "ternary folder": ternary_folder, "ternary GGUF": ternary_gguf}
    engine = open_engine(models[given], engine=name, context_length=128, slots=2, threads=1)
    assert engine.info.engine == name
    with (
        running(engine) as server,
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def expected(kind: str, ternary_folder: Path) -> str:
    """What PyTorch says, without a server."""
    model = ternary_folder if "ternary" in kind else TINY
    engine = open_engine(model, engine="torch", context_length=128, slots=1, threads=1)
    try:
        return greedy(engine)
    finally:
        engine.close()


def greedy(engine: Engine) -> str:
    tokens = engine.stream(engine.tokenizer.encode(PROMPT), Sampling(10, temperature=0))
    return engine.tokenizer.decode([token.id for token in tokens])


def name_of(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_every_engine_gives_the_same_greedy_text_streamed_or_not(client: openai.OpenAI, expected: str) -> None:
    name = name_of(client)
    whole = client.completions.create(model=name, prompt=PROMPT, temperature=0, max_tokens=10)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "length")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 10
    stream = client.completions.create(model=name, prompt=PROMPT, temperature=0, max_tokens=10, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_stop_strings(client: openai.OpenAI, expected: str) -> None:
    stop = expected[6:9]
    answer = client.completions.create(model=name_of(client), prompt=PROMPT, temperature=0, max_tokens=10, stop=stop)
    assert answer.choices[0].text == expected[: expected.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_seeds_and_logprobs(client: openai.OpenAI) -> None:
    name = name_of(client)
    ask = [client.completions.create(model=name, prompt=PROMPT, seed=seed, max_tokens=20) for seed in (1, 1, 2)]
    texts = [answer.choices[0].text for answer in ask]
    assert texts[0] == texts[1] != texts[2]
    scored = client.completions.create(model=name, prompt=PROMPT, temperature=0, max_tokens=5, logprobs=3).choices[0]
    assert scored.logprobs is not None
    assert scored.logprobs.top_logprobs is not None
    assert scored.logprobs.token_logprobs is not None
    assert "".join(scored.logprobs.tokens or []) == scored.text
    for logprob, top in zip(scored.logprobs.token_logprobs, scored.logprobs.top_logprobs, strict=True):
        assert logprob == pytest.approx(max(top.values()))
        assert len(top) == 3


def test_chats_and_errors(client: openai.OpenAI) -> None:
    name = name_of(client)
    answer = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": "Hi"}], max_tokens=6, seed=1
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 6
    with pytest.raises(openai.BadRequestError, match="the context holds 128 tokens"):
        client.completions.create(model=name, prompt=PROMPT, max_tokens=126)
    with pytest.raises(openai.BadRequestError, match="the prompt has 300 tokens"):
        client.completions.create(model=name, prompt="7" * 300)


def test_leaving_a_stream_leaves_the_engine_usable(client: openai.OpenAI, expected: str) -> None:
    name = name_of(client)
    for _ in range(6):
        with client.completions.create(model=name, prompt=PROMPT, max_tokens=100, stream=True) as stream:
            next(iter(stream))
    answer = client.completions.create(model=name, prompt=PROMPT, temperature=0, max_tokens=10)
    assert answer.choices[0].text == expected


def test_bitnet_cpp_by_a_stand_in_of_its_api(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "llama-server"
    binary.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" plain "$@"\n')
    binary.chmod(0o755)
    monkeypatch.setenv(BINARY_VARIABLE, str(binary))
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    engine = BitNetCppEngine(model, tokenizer, name="m", context_length=64, slots=2, threads=1, start_seconds=20)
    with (
        running(engine) as server,
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client,
    ):
        answer = client.completions.create(model="m", prompt=[1, 2, 3], max_tokens=4)
        expected = tokenizer.decode([103, 104, 105, 106])
        assert answer.choices[0].text == expected
        stream = client.completions.create(model="m", prompt=[1, 2, 3], max_tokens=4, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == expected
        with pytest.raises(openai.NotFoundError, match="the one that is: 'm'"):
            client.completions.create(model="other", prompt="x")
