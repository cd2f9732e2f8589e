"""The CPU engine's speed beside stock llama.cpp's, in one run: engines take turns, so that they share the machine's moods.

    uv run python -m benchmark.engine_speed --models 135m 1b --threads 1 --node FOLDER

FOLDER is one where `npm install node-llama-cpp` was run; without it only the package xllamacpp is measured. Every figure is
the median over the rounds, of tokens per CPU second (of all threads) and per second on the wall; a ratio is the median of
the rounds' ratios. `--isa` adds our engine held to other instruction sets, `--heads` other precisions of its head, `--f16` the
same model unquantized in stock llama.cpp, `--also-threads` ours with other numbers of threads, and `--neighbours` that many
processes that never rest beside everything.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

TASKS: dict[str, dict[str, int]] = {
    "prefill 512": {"prefill": 512},
    "decode 64 at 64": {"decode": 64, "context": 64},
    "decode 64 at 1000": {"decode": 64, "context": 1000},
}
BATCHED = {"decode 64 at 64, 8 sequences": {"decode": 64, "context": 64, "sequences": 8}}


class Process:
    """A worker and the pipes to it."""

    def __init__(self, command: Sequence[str], *, folder: Path | None = None, isa: str | None = None) -> None:
        environment = os.environ | ({} if isa is None else {"WRINKLEFREE_ENGINE_ISA": isa})
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment
        )
        self._read()

    def ask(self, task: dict[str, int]) -> dict[str, float]:
        """Seconds that a task took."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self._process.args} ended with {self._process.wait()}")


def measure(model: str, arguments: argparse.Namespace) -> list[str]:
    """Rows of the table for one model."""
    from benchmark.engine_models import write_stock

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stock = Path(folder) / f"{model}.gguf"
        write_stock(model, stock)
        threads, worker = str(arguments.threads), [sys.executable, "-m", "benchmark.engine_worker"]
        engines: dict[str, Process] = {}
        for head in arguments.heads:
            engines[f"ours, {head} head"] = Process([*worker, "ours", model, threads, "--head", head])
        for isa in arguments.isa:
            engines[f"ours, {isa}"] = Process([*worker, "ours", model, threads], isa=isa)
        for count in arguments.also_threads:
            engines[f"ours, {count} threads"] = Process([*worker, "ours", model, str(count)])
        script = str(Path(__file__).with_name("engine_stock.mjs"))
        if arguments.node is not None:
            engines["llama.cpp, npm"] = Process(["node", script, str(stock), threads], folder=arguments.node)
        if not arguments.skip_xllamacpp:
            engines["llama.cpp, xllamacpp"] = Process([*worker, "xllamacpp", str(stock), threads])
        if arguments.f16 and arguments.node is not None:
            write_stock(model, full := Path(folder) / f"{model}-f16.gguf", block="F16")
            engines["llama.cpp, npm, F16"] = Process(["node", script, str(full), threads], folder=arguments.node)
        for process in engines.values():
            stack.callback(process.close)
        for _ in range(arguments.neighbours):
            neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(neighbour.wait)
            stack.callback(neighbour.kill)
        rows: list[str] = []
        for task in arguments.tasks:
            batched = task in BATCHED
            taking_turns = {name: engine for name, engine in engines.items() if name.startswith("ours") or not batched}
            rows += _compare(model, task, (TASKS | BATCHED)[task], taking_turns, arguments.rounds)
        return rows


def _compare(model: str, name: str, task: dict[str, int], engines: dict[str, Process], rounds: int) -> list[str]:
    """All engines in turn, some rounds; the first engine is what the others are compared with."""
    tokens = task.get("prefill", task.get("decode", 0)) * task.get("sequences", 1)
    speeds = {engine: {"cpu": list[float](), "wall": list[float]()} for engine in engines}
    for _ in range(rounds):
        for engine, process in engines.items():
            for kind, seconds in process.ask(task).items():
                speeds[engine][kind].append(tokens / seconds)
    first = speeds[next(iter(engines))]
    rows: list[str] = []
    for engine, measured in speeds.items():
        ratios = {
            kind: statistics.median(ours / theirs for ours, theirs in zip(first[kind], measured[kind], strict=True))
            for kind in measured
        }
        cpu, wall = (statistics.median(measured[kind]) for kind in ("cpu", "wall"))
        rows.append(
            f"| {model} | {name} | {engine} | {cpu:.1f} | {wall:.1f} | {ratios['cpu']:.2f} | {ratios['wall']:.2f} |"
        )
        sys.stdout.write(rows[-1] + "\n")
        sys.stdout.flush()
    return rows


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["135m", "1b"], choices=["135m", "1b", "4b"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heads", nargs="+", default=["int8"], choices=["int8", "int4", "f16", "f32"])
    parser.add_argument("--tasks", nargs="+", default=[*TASKS, *BATCHED], choices=[*TASKS, *BATCHED])
    parser.add_argument("--also-threads", type=int, nargs="*", default=[])
    parser.add_argument("--neighbours", type=int, default=0)
    parser.add_argument("--f16", action="store_true")
    parser.add_argument("--skip-xllamacpp", action="store_true")
    parser.add_argument("--isa", nargs="*", default=[])
    parser.add_argument("--node", type=Path, default=None)
    arguments = parser.parse_args()
    sys.stdout.write(
        "| model | task | engine | tokens / CPU s | tokens / s | ours / this, CPU | ours / this, wall |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    for model in arguments.models:
        measure(model, arguments)


if __name__ == "__main__":
    main()
