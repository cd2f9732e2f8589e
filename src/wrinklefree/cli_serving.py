"""The flags of `scripts/serve.py` and `scripts/generate.py`; what they start is imported once the flags are right."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wrinklefree.utils.errors import ConfigError

ENGINES = ("auto", "native", "llama.cpp", "bitnet.cpp", "torch")
CACHES = ("f16", "int8", "f32")
HEADS = ("int8", "int4", "f16", "f32")
KEY_VARIABLE = "WRINKLEFREE_API_KEY"
MODEL_HELP = "a GGUF file, or a checkpoint folder (native and torch run those)"


def run_server(argv: Sequence[str] | None, log: Callable[[], None]) -> int:
    """Serve a model until a signal; returns the exit code. `log` switches the log on."""
    parser = argparse.ArgumentParser(
        prog="serve.py", description="Serve a model over OpenAI's HTTP API, with a chat page at /."
    )
    _add_engine_flags(parser)
    add = parser.add_argument
    add("--slots", type=_count(1), default=4, metavar="N", help="requests at the same time (%(default)s)")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s); others than loopback need an API key")
    add("--port", type=int, default=8080, help="port (%(default)s); 0 takes a free one")
    add("--api-key", metavar="KEY", help=f"what clients must send; {KEY_VARIABLE} keeps it out of the process list")
    add("--max-tokens", type=_count(1), metavar="N", help="most tokens of an answer (what the context holds)")
    add("--max-queue", type=_count(0), default=64, metavar="N", help="requests that may wait (%(default)s)")
    add("--max-body", type=_count(1), default=2**20, metavar="BYTES", help="largest request (%(default)s)")
    add("--timeout", type=_seconds, default=600.0, metavar="S", help="longest time of a request (%(default)g s)")
    add("--read-timeout", type=_seconds, default=15.0, metavar="S", help="for headers, and for a body (%(default)g s)")
    add(
        "--grace-period",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="for running requests at the end (%(default)g s)",
    )
    flags = parser.parse_args(argv)
    log()
    from wrinklefree.serving.limits import Limits
    from wrinklefree.serving.server import ServerSettings, serve
    from wrinklefree.serving.service import ServiceSettings

    settings = ServerSettings(
        host=flags.host,
        port=flags.port,
        api_key=flags.api_key if flags.api_key is not None else os.environ.get(KEY_VARIABLE),
        grace_seconds=flags.grace_period,
        limits=Limits(max_body_bytes=flags.max_body, read_seconds=flags.read_timeout),
        service=ServiceSettings(flags.max_tokens, flags.max_queue, flags.timeout),
    )
    return serve(flags.model, settings, slots=flags.slots, **_engine_options(flags))


def run_generate(argv: Sequence[str] | None, log: Callable[[], None]) -> int:
    """Continue a prompt, or hold a conversation; returns the exit code. `log` switches the log on."""
    parser = argparse.ArgumentParser(
        prog="generate.py", description="Continue a prompt, or hold a conversation in the terminal."
    )
    _add_engine_flags(parser)
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="what to continue (standard input when piped); with --chat the first question")
    add("--chat", action="store_true", help="hold a conversation with the model's chat template")
    add("--system", metavar="TEXT", help="instruction before the conversation, with --chat")
    add("--max-tokens", type=_count(1), metavar="N", help="most tokens of an answer (256; with --chat the context)")
    add("--temperature", type=_number(0, 2), metavar="T", help="0 takes the likeliest token (0; with --chat 0.7)")
    add("--top-p", type=_number(0, 1), metavar="P", help="keep the likeliest tokens up to this probability")
    add("--top-k", type=_count(1), metavar="K", help="keep this many of the likeliest tokens")
    add("--seed", type=_count(0), metavar="N", help="the same seed gives the same text")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    flags = parser.parse_args(argv)
    prompt = _prompt(flags)
    log()
    from wrinklefree.serving.engine.choose import open_engine
    from wrinklefree.serving.terminal import Request, Terminal

    request = Request(
        max_tokens=flags.max_tokens,
        usual_tokens=None if flags.chat else 256,
        temperature=flags.temperature if flags.temperature is not None else (0.7 if flags.chat else 0.0),
        top_p=flags.top_p,
        top_k=flags.top_k,
        seed=None if flags.seed is None else flags.seed % 2**31,
        stops=tuple(flags.stop),
    )
    engine = open_engine(flags.model, slots=1, **_engine_options(flags))
    try:
        terminal = Terminal(engine)
        if flags.chat:
            return terminal.converse(request, system=flags.system, first=prompt)
        return terminal.complete(prompt or "", request)
    except BrokenPipeError:  # whoever read the text has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        engine.close()


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="PATH", help=MODEL_HELP)
    add("--engine", choices=ENGINES, default="auto", help="what runs it (auto: the fastest that can)")
    add(
        "--context-length",
        type=_count(1),
        metavar="N",
        help="tokens of a prompt and its answer (the model's, up to 4096)",
    )
    add("--threads", type=_count(1), metavar="N", help="processor threads (the engine's choice)")
    add("--cache-type", choices=CACHES, help="keys and values of the native engine (f16; int8 takes half)")
    add("--head-type", choices=HEADS, help="output layer of the native engine (int8)")


def _engine_options(flags: argparse.Namespace) -> dict[str, Any]:
    return {
        "engine": flags.engine,
        "context_length": flags.context_length,
        "threads": flags.threads,
        "cache": flags.cache_type,
        "head": flags.head_type,
    }


def _prompt(flags: argparse.Namespace) -> str | None:
    """The prompt of the flags, or of a pipe.

    Raises:
        ConfigError: there is none, or flags contradict each other.
    """
    if flags.system is not None and not flags.chat:
        raise ConfigError("--system is for a conversation; add --chat, or put the text into --prompt")
    if flags.prompt is not None or flags.chat:
        return flags.prompt
    if sys.stdin.isatty():
        raise ConfigError("there is no prompt; give --prompt TEXT, pipe a text in, or use --chat")
    return sys.stdin.buffer.read().decode("utf-8", errors="replace")


def _count(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return integer


def _number(least: float, most: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least:g} to {most:g}")
        return value

    return number


def _seconds(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a time above 0")
    return value
