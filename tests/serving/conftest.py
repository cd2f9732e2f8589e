"""A scripted engine and a server around it; the shipped tiny model, and the same rounded to ternary weights."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import wrinklefree
from wrinklefree.cli import convert_main
from wrinklefree.models.artifact import Artifact, read_artifact, write_artifact
from wrinklefree.models.bitlinear import set_quantization
from wrinklefree.models.convert import to_bitnet
from wrinklefree.serving.engine.protocol import EngineInfo, Sampling, Token
from wrinklefree.serving.server import Server, ServerSettings
from wrinklefree.utils.errors import EngineError
from wrinklefree.utils.tokenizer import TextTokenizer

TINY = Path(wrinklefree.__file__).parent / "assets" / "tiny"
FAIL = "FAIL"


class ScriptedEngine:
    """Says what it was told to, token by token; counts what is at work. A prompt that holds FAIL breaks it midway."""

    def __init__(
        self, text: str = "Hello, wörld! 🙂 bye", *, slots: int = 2, context_length: int = 512, delay: float = 0.0
    ) -> None:
        self.tokenizer = TextTokenizer.from_folder(TINY)
        self.info = EngineInfo("scripted", "tiny-scripted", context_length, slots)
        self.end_tokens = frozenset({self.tokenizer.eos_token_id})
        self.text = text
        self.delay = delay
        self.requests: list[tuple[list[int], Sampling]] = []
        self.at_work = 0
        self.most_at_work = 0
        self.closed_streams = 0
        self.closed = False
        self.go = threading.Event()
        self.go.set()
        self._lock = threading.Lock()

    def prompts(self) -> list[str]:
        return [self.tokenizer.decode(prompt) for prompt, _ in self.requests]

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Token]:
        with self._lock:
            self.requests.append((list(prompt), sampling))
            self.at_work += 1
            self.most_at_work = max(self.most_at_work, self.at_work)
        try:
            text = self.text if sampling.seed is None else f"{self.text} seed {sampling.seed}"
            breaks = FAIL in self.tokenizer.decode(prompt)
            for index, token in enumerate(self.tokenizer.encode(text)[: sampling.max_tokens]):
                self.go.wait(30)
                time.sleep(self.delay)
                if breaks and index == 2:
                    raise EngineError("the engine broke")
                logprob = None if sampling.logprobs is None else -0.5
                alternatives = ((token, -0.5), (token + 1, -1.5))[: sampling.logprobs or 0]
                yield Token(token, logprob, alternatives)
        finally:
            with self._lock:
                self.at_work -= 1
                self.closed_streams += 1

    def close(self) -> None:
        self.closed = True


@contextmanager
def running(engine: object, settings: ServerSettings | None = None, *, wait: bool = True) -> Iterator[Server]:
    """A server in a thread of this process, on a free port, stopped in order at the end."""
    server = Server(settings or ServerSettings(port=0), engine if callable(engine) else lambda: engine)  # type: ignore[arg-type, return-value]
    thread = threading.Thread(target=server.run_until_stopped)
    thread.start()
    try:
        if wait:
            until(lambda: server.service.state != "loading")
        yield server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the awaited condition did not come about"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.from_folder(TINY)


@pytest.fixture(scope="session")
def tiny() -> Artifact:
    return read_artifact(TINY)


@pytest.fixture(scope="session")
def ternary_folder(tiny: Artifact, tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model rounded to ternary weights, as an artifact."""
    folder = tmp_path_factory.mktemp("ternary") / "artifact"
    rounded = to_bitnet(
        tiny.load_model(), placement="output", gain="ones", activation_bits=8, strength=1.0, calibration=[]
    )
    set_quantization(rounded, 1.0)
    assert rounded.bitnet is not None
    rounded.bitnet = rounded.bitnet.model_copy(update={"quantization_lambda": 1.0})
    write_artifact(folder, rounded, tokenizer, {})
    return folder


@pytest.fixture(scope="session")
def ternary_gguf(ternary_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its TQ2_0 file."""
    file = tmp_path_factory.mktemp("ternary_gguf") / "rounded.gguf"
    assert convert_main(["--input", str(ternary_folder), "--output", str(file), "--no-verify"]) == 0
    return file
