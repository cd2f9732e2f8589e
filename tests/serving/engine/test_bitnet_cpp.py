"""BitNet.cpp's server as an engine, against a stand-in that speaks its API: the real one cannot be built here."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from wrinklefree.serving.engine import bitnet_cpp, guard
from wrinklefree.serving.engine.bitnet_cpp import BINARY_VARIABLE, BitNetCppEngine
from wrinklefree.serving.engine.protocol import Sampling, Token
from wrinklefree.utils.errors import ConfigError, EngineError
from wrinklefree.utils.tokenizer import TextTokenizer

STAND_IN = Path(__file__).with_name("stand_in_server.py")
FOUR = Sampling(4)
Open = Callable[..., BitNetCppEngine]


@pytest.fixture
def open_engine(tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Starts the engine on a stand-in in some mode; all are closed at the end."""
    opened: list[BitNetCppEngine] = []
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")

    def start(mode: str = "plain", **options: Any) -> BitNetCppEngine:
        binary = tmp_path / "llama-server"
        binary.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" {mode} "$@"\n')
        binary.chmod(0o755)
        monkeypatch.setenv(BINARY_VARIABLE, str(binary))
        settings = {"name": "m", "context_length": 64, "slots": 2, "threads": 1, "start_seconds": 20} | options
        opened.append(BitNetCppEngine(model, tokenizer, **settings))
        return opened[-1]

    yield start
    for engine in opened:
        engine.close()


def ids(tokens: Iterator[Token]) -> list[int]:
    return [token.id for token in tokens]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone(pid: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def test_streams_tokens_with_logprobs(open_engine: Open) -> None:
    engine = open_engine()
    assert engine.info.engine == "bitnet.cpp"
    assert ids(engine.stream([1, 2, 3], FOUR)) == [103, 104, 105, 106]
    tokens = list(engine.stream([7], Sampling(2, logprobs=2)))
    assert tokens == [Token(107, -0.5, ((107, -0.5), (108, -1.5))), Token(108, -0.5, ((108, -0.5), (109, -1.5)))]


def test_end_tokens_end_an_answer(open_engine: Open) -> None:
    engine = open_engine(end_tokens=[105])
    assert ids(engine.stream([3], FOUR)) == [103, 104]


def test_builds_without_token_ids_are_read_by_their_text(open_engine: Open) -> None:
    engine = open_engine("no_ids")
    tokens = ids(engine.stream([3], FOUR))
    assert engine.tokenizer.decode(tokens).startswith("ab")
    with pytest.raises(EngineError, match="gives no log-probabilities"):
        list(engine.stream([3], Sampling(4, logprobs=1)))


def test_waits_for_a_slow_start(open_engine: Open) -> None:
    assert ids(open_engine("slow_start").stream([3], FOUR)) == [103, 104, 105, 106]


def test_a_crash_at_start_says_what_the_server_said(open_engine: Open) -> None:
    with pytest.raises(EngineError, match=r"did not start; it ended with status 3, and said last: .*bitnet-25"):
        open_engine("crash_at_start")


def test_a_server_that_is_never_ready_is_stopped(open_engine: Open, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"was not ready after 1 s; it still runs"):
        open_engine("never_ready", start_seconds=1)
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_crash_in_an_answer_reaches_its_reader(open_engine: Open) -> None:
    engine = open_engine("crash_mid_stream")
    stream = engine.stream([3], FOUR)
    assert [next(stream).id, next(stream).id] == [103, 104]
    with pytest.raises(EngineError, match=r"ended with status 134, and said last: .*weights are tired"):
        next(stream)
    with pytest.raises(EngineError, match="broke off an answer"):
        list(engine.stream([3], FOUR))


def test_garbage_is_an_error_of_its_request_only(open_engine: Open) -> None:
    engine = open_engine("garbage")
    for _ in range(2):
        stream = engine.stream([3], FOUR)
        assert next(stream).id == 103
        with pytest.raises(EngineError, match="sent a line that is no event"):
            next(stream)


def test_an_answer_without_an_end_is_an_error(open_engine: Open) -> None:
    with pytest.raises(EngineError, match="without its last message"):
        list(open_engine("no_end").stream([3], FOUR))


def test_megabytes_of_log_block_nothing(open_engine: Open) -> None:
    engine = open_engine("flood")
    assert len(ids(engine.stream([3], Sampling(30)))) == 30


def test_refusals(open_engine: Open) -> None:
    engine = open_engine("refuse")
    with pytest.raises(EngineError, match="refused the request: the slots are tired"):
        list(engine.stream([3], FOUR))
    with pytest.raises(ConfigError, match="the context holds 64"):
        engine.stream([3], Sampling(64))


def test_eight_requests_at_once_never_exceed_the_slots(open_engine: Open) -> None:
    engine = open_engine(slots=2)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda last: ids(engine.stream([last], FOUR)), range(8)))
    assert answers == [[100 + last + index for index in range(4)] for last in range(8)]
    assert "TOO MANY" not in " ".join(engine._server._last_lines)


def test_closing_a_stream_interrupts_a_silent_server_and_frees_the_slot(open_engine: Open) -> None:
    engine = open_engine("hang", slots=1)
    for _ in range(64):
        stream = engine.stream([3], FOUR)
        assert next(stream).id == 103
        stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert ids(engine.stream([3], Sampling(1))) == [103]


def test_closing_the_engine_stops_the_server(open_engine: Open, tmp_path: Path) -> None:
    engine = open_engine("hang")
    stream = engine.stream([3], FOUR)
    next(stream)
    pid = int((tmp_path / "pid").read_text())
    assert is_alive(pid)
    engine.close()
    engine.close()
    assert gone(pid)
    with pytest.raises(EngineError, match="closed before the answer was complete"):
        next(stream)


def test_a_deaf_server_is_killed(open_engine: Open, tmp_path: Path) -> None:
    engine = open_engine("deaf")
    began = time.monotonic()
    engine.close()
    assert gone(int((tmp_path / "pid").read_text()))
    assert time.monotonic() - began < bitnet_cpp.STOP_SECONDS


SCRIPT = """
import os, sys, threading
from pathlib import Path
from wrinklefree.serving.engine.bitnet_cpp import BitNetCppEngine
from wrinklefree.utils.tokenizer import TextTokenizer
def start():
    BitNetCppEngine(Path(sys.argv[1]), TextTokenizer.from_folder(sys.argv[2]), name="m", context_length=64, slots=1)
thread = threading.Thread(target=start)  # a thread that ends: the server must not end with it
thread.start()
thread.join()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["killed", "ends"])
def test_the_server_dies_with_us(open_engine: Open, tmp_path: Path, tiny: Any, how: str) -> None:
    open_engine().close()  # writes the program
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model.gguf"), str(tiny.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        pid = int((tmp_path / "pid").read_text())
        time.sleep(0.2)
        assert is_alive(pid)
        if how == "killed":
            process.send_signal(signal.SIGKILL)
        process.stdin.close()
        process.wait(30)
    assert gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's death signal")
def test_the_server_dies_with_its_guard(open_engine: Open, tmp_path: Path) -> None:
    engine = open_engine()
    os.kill(engine._server.pid, signal.SIGKILL)
    assert gone(int((tmp_path / "pid").read_text()))


def test_the_key_is_on_no_command_line(open_engine: Open, tmp_path: Path) -> None:
    engine = open_engine()
    pid = int((tmp_path / "pid").read_text())
    for process in (pid, engine._server.pid):
        assert engine._server.key not in Path(f"/proc/{process}/cmdline").read_text()


def test_there_must_be_a_server(tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BINARY_VARIABLE, str(tmp_path / "nothing"))
    assert not bitnet_cpp.is_built()
    with pytest.raises(EngineError, match=f"build BitNet.cpp there, or name the program in {BINARY_VARIABLE}"):
        BitNetCppEngine(tmp_path / "m.gguf", tokenizer, name="m", context_length=64)


def test_the_guard_returns_its_programs_status() -> None:
    def status(code: str) -> int:
        command = [sys.executable, "-I", "-S", guard.__file__, sys.executable, "-c", code]
        return subprocess.run(command, stdin=subprocess.PIPE, timeout=30).returncode

    # A closed input stops the program, so only what ends at once keeps its status.
    with subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, sys.executable, "-c", "raise SystemExit(7)"], stdin=subprocess.PIPE
    ) as process:
        assert process.wait(30) == 7
    assert status("import time; time.sleep(60)") == 128 + signal.SIGTERM
