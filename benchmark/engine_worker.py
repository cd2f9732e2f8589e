"""One engine in a process of its own, told what to do by lines of JSON: `python -m benchmark.engine_worker ours 135m 1`.

A line {"prefill": 512} or {"decode": 128, "context": 64, "sequences": 1} is answered by {"cpu": seconds, "wall": seconds}.
What comes before (the context of a decode) is not counted.
"""

import argparse
import importlib
import json
import sys
import time
from typing import Any, Protocol

import numpy as np

CONTEXT = 1536
BATCH = 512


class Worker(Protocol):
    """What an engine does here."""

    def prefill(self, tokens: int) -> None:
        """Read a prompt that was never seen before, and compute the logits of its last token."""
        ...

    def prepare(self, context: int, sequences: int) -> None:
        """Hold prompts of `context` tokens."""
        ...

    def decode(self, tokens: int, context: int, sequences: int) -> None:
        """Produce `tokens` tokens for each prompt, greedily."""
        ...


class Ours:
    """The engine of our own, without its scheduler: what the C call costs, sampling included."""

    def __init__(self, model: str, threads: int, head: str) -> None:
        from benchmark.engine_models import packed
        from wrinklefree.serving.engine.native.model import NativeModel, NativeOptions

        options = NativeOptions(context_length=CONTEXT, slots=8, max_tokens=BATCH, threads=threads)
        self._model = NativeModel(packed(model, head), options)  # pyright: ignore[reportArgumentType]
        self._random = np.random.default_rng(0)

    def prefill(self, tokens: int) -> None:
        """One slot."""
        self._feed(0, tokens)

    def prepare(self, context: int, sequences: int) -> None:
        """One slot each."""
        for slot in range(sequences):
            self._feed(slot, context)

    def decode(self, tokens: int, context: int, sequences: int) -> None:
        """One step a token, for all sequences together."""
        slots, ids = list(range(sequences)), [1] * sequences
        for position in range(context, context + tokens):
            logits = self._model.step(ids, slots, [position] * sequences, slots)
            ids = logits.argmax(axis=1).tolist()

    def _feed(self, slot: int, tokens: int) -> None:
        ids = self._random.integers(1, self._model.vocab_size, tokens).tolist()
        for start in range(0, tokens, BATCH):
            part = ids[start : start + BATCH]
            last = [len(part) - 1] if start + BATCH >= tokens else []
            self._model.step(part, [slot] * len(part), range(start, start + len(part)), last)


class Stock:
    """llama.cpp out of the package xllamacpp (AVX2), its server in this process."""

    def __init__(self, path: str, threads: int) -> None:
        xllamacpp: Any = importlib.import_module("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.verbosity = 1
        params.hostnames, params.port = ["127.0.0.1"], 0
        params.ui, params.n_parallel, params.n_ctx = False, 1, CONTEXT
        params.n_batch = params.n_ubatch = BATCH
        params.cache_ram_mib, params.fit_params, params.use_jinja = 0, False, False
        params.chat_template = "chatml"
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self._server: Any = xllamacpp.Server(params)
        self._random = np.random.default_rng(0)
        self._prompt: list[int] = []

    def prefill(self, tokens: int) -> None:
        """A new prompt and one token."""
        self.prepare(tokens, 1)

    def prepare(self, context: int, sequences: int) -> None:
        """The server keeps the prompt of its one slot."""
        assert sequences == 1
        self._prompt = self._random.integers(1, 30000, context).tolist()
        self._ask(1)

    def decode(self, tokens: int, context: int, sequences: int) -> None:
        """The prompt again, which is held, and its continuation."""
        self._ask(tokens)

    def _ask(self, tokens: int) -> None:
        body = {"prompt": self._prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
        reply = self._server.handle_completions(body)
        produced = reply["usage"]["completion_tokens"]
        if produced != tokens:
            raise RuntimeError(f"asked for {tokens} tokens, got {produced}")


def measure(worker: Worker, task: dict[str, int]) -> dict[str, float]:
    """CPU seconds of all threads, and seconds on the wall."""
    context, sequences = task.get("context", 0), task.get("sequences", 1)
    if "decode" in task:
        worker.prepare(context, sequences)
    cpu, wall = time.process_time(), time.perf_counter()
    if "decode" in task:
        worker.decode(task["decode"], context, sequences)
    else:
        worker.prefill(task["prefill"])
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def main() -> None:
    """Answer lines until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=["ours", "xllamacpp"])
    parser.add_argument("model")
    parser.add_argument("threads", type=int)
    parser.add_argument("--head", default="int8")
    arguments = parser.parse_args()
    worker: Worker
    if arguments.engine == "ours":
        worker = Ours(arguments.model, arguments.threads, arguments.head)
    else:
        worker = Stock(arguments.model, arguments.threads)
    sys.stdout.write('{"ready": 1}\n')
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(measure(worker, json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
