"""Prompts and conversations in a terminal."""

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.serving.conftest import TINY, ScriptedEngine, until

from wrinklefree.cli import generate_main
from wrinklefree.serving.terminal import Request, Statistics, Terminal
from wrinklefree.utils.errors import ConfigError

TEXT = "Hello, wörld! bye"
ROOT = Path(__file__).resolve().parents[2]
GENERATE = ["--model", str(TINY), "--threads", "1"]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(TEXT)


def test_a_prompt_is_continued_on_standard_output(engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert Terminal(engine).complete("Say hello", Request(seed=5, temperature=0.5, top_k=3)) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{TEXT} seed 5\n"
    prompt, sampling = engine.requests[0]
    assert printed.err.startswith(f"[{len(prompt)} prompt tokens, first text after 0.")
    assert printed.err.endswith("; stop]\n")
    assert engine.tokenizer.decode(prompt) == "Say hello"
    assert (sampling.seed, sampling.temperature, sampling.top_k) == (5, 0.5, 3)
    assert sampling.max_tokens == engine.info.context_length - len(prompt)


def test_limits_and_stop_strings(engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    Terminal(engine).complete("x", Request(stops=(" wör",)))
    Terminal(engine).complete("x", Request(max_tokens=2))
    Terminal(engine).complete("x", Request(usual_tokens=3))
    printed = capsys.readouterr()
    assert printed.out == "Hello,\nHell\nHello\n"
    assert [line.rpartition("; ")[2] for line in printed.err.splitlines()] == ["stop]", "length]", "length]"]


def test_a_prompt_that_leaves_no_room_is_one_sentence(engine: ScriptedEngine) -> None:
    with pytest.raises(ConfigError, match=r"the prompt's 600 tokens and an answer do not fit into the context of 512"):
        Terminal(engine).complete("7" * 600, Request())
    with pytest.raises(ConfigError, match="tokens and 600 more do not fit"):
        Terminal(engine).complete("7", Request(max_tokens=600))
    assert engine.requests == []


def test_a_conversation_remembers_forgets_and_ends(
    engine: ScriptedEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("and you?\n\n/reset\nwho?\n/exit\nnever asked\n"))
    assert Terminal(engine).converse(Request(), system="Be brief.", first="Hi") == 0
    assert engine.prompts() == [
        "Be brief.\nUser: Hi\nAssistant:",
        f"Be brief.\nUser: Hi\nAssistant: {TEXT}\nUser: and you?\nAssistant:",
        "Be brief.\nUser: who?\nAssistant:",
    ]
    printed = capsys.readouterr()
    assert printed.out == f"{TEXT}\n" * 3
    assert "[forgotten]" in printed.err


def test_a_conversation_that_outgrows_the_context_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine(TEXT, context_length=40)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\nthree\nfour\n/reset\nfive\n"))
    assert Terminal(engine).converse(Request()) == 0
    assert "do not fit into the context of 40" in capsys.readouterr().err
    assert engine.prompts()[-1] == "User: five\nAssistant:"


def test_ctrl_c_ends_the_answer_and_not_the_conversation(
    engine: ScriptedEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nagain\n"))
    engine.delay = 0.5
    # A shell that starts the tests in the background has interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        until(lambda: engine.at_work == 1)
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: engine.closed_streams == 1)
        engine.delay = 0

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert Terminal(engine).converse(Request()) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    printed = capsys.readouterr()
    assert "; interrupted]" in printed.err
    assert printed.out.endswith(f"{TEXT}\n")
    assert len(engine.requests) == 2


def test_statistics_are_a_line_for_people() -> None:
    line = Statistics(prompt_tokens=3, tokens=11, first_seconds=0.5, seconds=2.5, reason="length").line()
    assert line == "[3 prompt tokens, first text after 0.50 s; 11 tokens in 2.50 s, 5.0 tokens/s; length]"


# The command.


def test_the_command_continues_a_prompt_reproducibly(capsys: pytest.CaptureFixture[str]) -> None:
    outputs: list[str] = []
    for seed in ("3", "3", "4"):
        command = [*GENERATE, "--prompt", "The capital of", "--max-tokens", "12", "--temperature", "1", "--seed", seed]
        assert generate_main(command) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_prompt_may_come_through_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_main([*GENERATE, "--prompt", "The capital of", "--max-tokens", "5"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The capital of")))
    assert generate_main([*GENERATE, "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out == expected


class Keyboard(io.StringIO):
    """Standard input of someone at a keyboard."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "there is no prompt; give --prompt TEXT, pipe a text in, or use --chat"),
        (
            ["--prompt", "x", "--system", "y"],
            "--system is for a conversation; add --chat, or put the text into --prompt",
        ),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Keyboard())
    assert generate_main([*GENERATE, *arguments]) == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")


@pytest.mark.parametrize(
    "flags", [["--temperature", "3"], ["--max-tokens", "0"], ["--engine", "gpu"], ["--top-p", "nan"]]
)
def test_values_out_of_range_are_refused_by_the_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        generate_main([*GENERATE, "--prompt", "x", *flags])
    assert f"argument {flags[0]}" in capsys.readouterr().err


def test_a_reader_that_has_enough_ends_the_command_quietly() -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts" / "generate.py"),
        *GENERATE,
        "--prompt",
        "The",
        "--max-tokens",
        "400",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0
    assert errors == ""
