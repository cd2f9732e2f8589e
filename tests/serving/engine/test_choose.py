"""Opening a model: auto takes the best engine that runs it and is there; everything else is refused in one sentence."""

from collections.abc import Callable
from pathlib import Path

import pytest

from wrinklefree.models.artifact import Artifact
from wrinklefree.native import library
from wrinklefree.serving.engine import choose
from wrinklefree.serving.engine.choose import choose_engine, open_engine, resolve_context
from wrinklefree.serving.engine.protocol import Sampling
from wrinklefree.serving.engine.support import ENGINES
from wrinklefree.utils.errors import CheckpointError, ConfigError, EngineError
from wrinklefree.utils.gguf import read_gguf

WriteHeader = Callable[..., Path]


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    table = {name: (lambda name=name: name in names, reason) for name, (_, reason) in choose._MISSING.items()}
    monkeypatch.setattr(choose, "_MISSING", table)


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        (("llama.cpp", "bitnet.cpp", "torch"), "llama.cpp"),
        (("bitnet.cpp", "torch"), "bitnet.cpp"),
        (("torch",), "torch"),
    ],
)
def test_auto_takes_the_first_that_is_there(
    write_header: WriteHeader, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], chosen: str
) -> None:
    installed(monkeypatch, *there)
    assert choose_engine(read_gguf(write_header("bitnet"))) == chosen


def test_auto_passes_over_who_does_not_run_the_file(write_header: WriteHeader, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "llama.cpp", "bitnet.cpp", "torch")
    assert choose_engine(read_gguf(write_header("wrinklefree"))) == "torch"


def test_auto_takes_the_native_engine_first_and_says_when_it_is_not_there(
    ternary_gguf: Path, ternary_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = read_gguf(ternary_gguf)
    installed(monkeypatch, *ENGINES)
    assert choose_engine(file) == "native"
    assert not caplog.records
    installed(monkeypatch, "llama.cpp", "torch")
    assert choose_engine(file) == "llama.cpp"
    engine = open_engine(ternary_folder, slots=1, threads=1)
    engine.close()
    assert engine.info.engine == "torch"
    assert [record.getMessage().split(":")[1] for record in caplog.records] == [
        " another engine answers, more slowly", " torch answers, more slowly",
    ]  # fmt: skip


@pytest.mark.skipif(not library.is_available(), reason="needs the CPU engine's library, or a compiler")
def test_native_and_torch_give_the_same_tokens(ternary_gguf: Path, ternary_folder: Path, prompt: list[int]) -> None:
    answers, used = [], []
    for model, name in ((ternary_gguf, "auto"), (ternary_folder, "native"), (ternary_gguf, "torch")):
        engine = open_engine(model, engine=name, context_length=128, slots=2, threads=1)
        answers.append([token.id for token in engine.stream(prompt, Sampling(12, temperature=0))])
        used.append(engine.info.engine)
        assert engine.end_tokens == {0}
        engine.close()
    assert used == ["native", "native", "torch"]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.skipif(not library.is_available(), reason="needs the CPU engine's library, or a compiler")
def test_types_of_cache_and_head_reach_the_engine(ternary_gguf: Path, prompt: list[int]) -> None:
    logprobs = []
    for types in ({}, {"cache": "int8"}, {"head": "int4"}, {"cache": "f32", "head": "f32"}):
        engine = open_engine(ternary_gguf, engine="native", context_length=64, slots=1, threads=1, **types)
        token = next(iter(engine.stream(prompt, Sampling(1, temperature=0, logprobs=0))))
        engine.close()
        assert token.logprob is not None
        logprobs.append(token.logprob)
    assert len(set(logprobs)) == 4
    assert max(logprobs) - min(logprobs) < 0.5
    with pytest.raises(ConfigError, match="types of cache and head are the native engine's, and torch runs"):
        open_engine(ternary_gguf, engine="torch", cache="int8")


def test_a_missing_library_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise EngineError("the CPU engine was not built")

    monkeypatch.setattr(library, "load_library", refuse)
    assert not library.is_available()


def test_auto_says_what_to_install(write_header: WriteHeader, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "torch")
    file = read_gguf(write_header("llama"))
    file.tensors["token_embd.weight"] = file.tensors["token_embd.weight"].__class__("x", (3, 32), "Q4_K", 0, 0)
    with pytest.raises(ConfigError) as raised:
        choose_engine(file)
    assert "tensors of type Q4_K, which torch does not run" in str(raised.value)
    assert "llama.cpp would run it, but the package xllamacpp is not installed" in str(raised.value)


def test_a_context_is_the_models_or_less() -> None:
    assert resolve_context(None, 2048) == 2048
    assert resolve_context(None, 131072) == choose.DEFAULT_CONTEXT
    assert resolve_context(100, 2048) == 100
    with pytest.raises(ConfigError, match="a context of 4096 tokens was asked for, the model was made for 2048"):
        resolve_context(4096, 2048)


def test_an_artifact_is_run_by_torch(tiny: Artifact, prompt: list[int]) -> None:
    engine = open_engine(tiny.folder, slots=1, threads=1)
    assert (engine.info.engine, engine.info.model, engine.info.context_length) == ("torch", "tiny", 2048)
    assert len(list(engine.stream(prompt, Sampling(3, temperature=0)))) == 3
    engine.close()


def test_a_file_is_run_by_llama_cpp_and_gives_the_artifacts_tokens(
    tiny: Artifact, tiny_gguf: Path, prompt: list[int]
) -> None:
    pytest.importorskip("xllamacpp", reason="needs the package xllamacpp, which has no wheel for this platform")
    answers, used = [], []
    for model, name in ((tiny.folder, "auto"), (tiny_gguf, "auto"), (tiny_gguf, "torch")):
        engine = open_engine(model, engine=name, context_length=128, slots=2, threads=1)
        answers.append([token.id for token in engine.stream(prompt, Sampling(12, temperature=0))])
        used.append(engine.info.engine)
        assert engine.end_tokens == {0}
        engine.close()
    assert used == ["torch", "llama.cpp", "torch"]
    assert answers[0] == answers[1] == answers[2]


def test_refusals(tiny: Artifact, tmp_path: Path, write_header: WriteHeader) -> None:
    with pytest.raises(ConfigError, match="nothing.gguf does not exist; give a GGUF file or a folder"):
        open_engine(tmp_path / "nothing.gguf")
    with pytest.raises(ConfigError, match=r"is a folder and llama\.cpp reads GGUF files.*convert_to_gguf\.py --input"):
        open_engine(tiny.folder, engine="llama.cpp")
    with pytest.raises(ConfigError, match="slots is 0"):
        open_engine(tiny.folder, slots=0)
    with pytest.raises(ConfigError, match="architecture wrinklefree, which llama.cpp does not run; use --engine torch"):
        open_engine(write_header("wrinklefree"), engine="llama.cpp")
    text = tmp_path / "text.gguf"
    text.write_text("hello there")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        open_engine(text)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is no artifact"):
        open_engine(tmp_path / "empty")


def test_bitnet_cpp_must_be_built(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRINKLEFREE_BITNET_SERVER", str(tmp_path / "nothing"))
    with pytest.raises(EngineError, match="there is no llama-server in extern/BitNet/build/bin"):
        open_engine(tiny_gguf, engine="bitnet.cpp")


def test_threads_beyond_reason_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="threads is 100000, more than"):
        open_engine(tmp_path, threads=100_000)
