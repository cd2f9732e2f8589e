"""What a trained model scores in PyTorch, in PyTorch on the engine's kernels, and in the whole CPU engine.

    uv run python -m benchmark.engine_tasks FOLDER --task news_topic --rows 64 --tokens 10000

The same held-out documents, prompts, label words and rules as `scripts/run_evaluation.py` (the test splits) for every row.
PyTorch computes in float32. Its second row is the yardstick, PyTorch held to other vector instructions: two correct programs
differ in last bits, which may round to another activation code, and a model amplifies that.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmark.engine_parity import other_instructions
from wrinklefree.composition import compose
from wrinklefree.data.config import PretrainData
from wrinklefree.data.finetune_dataset import encode_choices
from wrinklefree.data.pretrain_dataset import HeldOut, held_out_rows
from wrinklefree.data.tasks import get_task
from wrinklefree.models.artifact import read_artifact, resolve_artifact
from wrinklefree.models.bitlinear import set_products
from wrinklefree.models.llama import CausalLM
from wrinklefree.serving.engine.native.model import CacheType, HeadType, NativeModel, NativeOptions, PackedModel
from wrinklefree.serving.packed_bitlinear import pack_bitlinears
from wrinklefree.training.comparison import ratio_interval
from wrinklefree.training.device import Compute
from wrinklefree.training.evaluation import choice_scores, score_language

LENGTH = 512
"""Positions of a row of text, as in `scripts/run_evaluation.py`."""
PRECISIONS: tuple[tuple[HeadType, CacheType], ...] = (("f32", "f32"), ("int8", "f16"))

Choices = Sequence[tuple[list[int], list[list[int]]]]
"""Of each example the prompt, and the tokens of each label word."""


def log_probabilities(logits: NDArray[np.float32]) -> torch.Tensor:
    """In float64, [T, V]."""
    return torch.from_numpy(logits).double().log_softmax(-1)


def engine_nats(native: NativeModel, held_out: HeldOut) -> tuple[float, int]:
    """Nats of all targets, and how many there are; a packed row's documents go through the engine one by one."""
    nats, count = 0.0, 0
    for batch in held_out.batches:
        for ids, labels, documents in zip(batch.input_ids, batch.labels, batch.document_ids, strict=True):
            for document in range(1, int(documents.max()) + 1):
                mine = documents == document
                scores = log_probabilities(native.logits(ids[mine].tolist()))
                nats -= float(scores.gather(1, labels[mine, None]).sum())
                count += int(mine.sum())
    return nats, count


def engine_scores(native: NativeModel, encoded: Choices) -> list[list[float]]:
    """Log-probability of each choice after its prompt; choices of one token share a pass."""

    def score(prompt: list[int], words: list[list[int]]) -> list[float]:
        """Of choices that differ in their last token only."""
        ids = prompt + words[0][:-1]
        wanted = range(len(prompt) - 1, len(ids))
        found = log_probabilities(native.step(ids, [0] * len(ids), range(len(ids)), wanted))
        return [float(found[torch.arange(len(word)), word].sum()) for word in words]

    return [
        score(prompt, words) if max(map(len, words)) == 1 else [score(prompt, [word])[0] for word in words]
        for prompt, words in encoded
    ]


def torch_scores(
    model: CausalLM, held_out: HeldOut, encoded: Choices, pad_token_id: int
) -> tuple[float, int, list[list[float]]]:
    """What `engine_nats` and `engine_scores` give, in PyTorch."""
    compute = Compute(torch.device("cpu"), torch.float32)
    language = score_language(model, held_out, compute)
    prompts, choices = [prompt for prompt, _ in encoded], [words for _, words in encoded]
    scores = choice_scores(model, prompts, choices, pad_token_id=pad_token_id, compute=compute, rows_per_batch=16)
    return language.nats_per_token * language.tokens, language.tokens, scores


def on_other_instructions(arguments: Sequence[str]) -> tuple[float, int, list[list[float]]]:
    """`torch_scores` of a process in which PyTorch is held to other vector instructions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.json"
        command = [sys.executable, "-m", "benchmark.engine_tasks", *arguments, "--save", str(path)]
        subprocess.run(command, check=True, env=os.environ | {"ATEN_CPU_CAPABILITY": other_instructions()})
        nats, count, scores = json.loads(path.read_text(encoding="utf-8"))
    return nats, count, scores


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("overrides", nargs="*", help="choose the held-out text, as data=fineweb (data=packaged)")
    parser.add_argument("--task", default="news_topic", help="a classification (news_topic)")
    parser.add_argument("--rows", type=int, default=64, help="longest prompt with its answer, in tokens (64)")
    parser.add_argument("--every", type=int, default=1, help="take every n-th example of the test split (1)")
    parser.add_argument("--tokens", type=int, default=10000, help="of the text (10000)")
    parser.add_argument("--save", type=Path, default=None, help="write PyTorch's scores to this file and stop")
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parser.parse_args(arguments)
    artifact, task = read_artifact(resolve_artifact(given.artifact)), get_task(given.task)
    tokenizer, examples = artifact.load_tokenizer(), task.load("test")[:: given.every]
    encoded = [encode_choices(task, example, tokenizer, given.rows) for example in examples]
    labels = [example.label for example in examples]
    data = compose(["training=fp_pretrain", "data=packaged", *given.overrides]).config.data
    assert isinstance(data, PretrainData)
    held_out = held_out_rows(
        data, tokenizer, split="test", max_tokens=given.tokens, max_seq_length=LENGTH, batch_size=4
    )
    model = artifact.load_model()
    set_products(model, "float", "exact")  # PyTorch's own products
    nats, count, reference = torch_scores(model, held_out, encoded, tokenizer.pad_token_id)
    if given.save is not None:
        given.save.write_text(json.dumps([nats, count, reference]), encoding="utf-8")
        return 0
    sys.stdout.write(
        f"| runtime | text tokens | bits/byte | perplexity | {task.name} examples | accuracy | 95% interval | "
        "same choice as PyTorch |\n|---|---|---|---|---|---|---|---|\n"
    )

    def show(runtime: str, nats: float, count: int, scores: list[list[float]]) -> None:
        chosen, expected = ([int(np.argmax(row)) for row in rows] for rows in (scores, reference))
        hits = [float(a == b) for a, b in zip(chosen, labels, strict=True)]
        interval = ratio_interval(hits, [1.0] * len(hits))
        same = sum(a == b for a, b in zip(chosen, expected, strict=True))
        cells = [runtime, f"{count}", f"{nats / math.log(2) / sum(held_out.document_bytes):.4f}"]
        cells += [f"{math.exp(nats / count):.2f}", f"{len(hits)}", f"{100 * np.mean(hits):.1f}%"]
        cells += [f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]", f"{same}"]
        sys.stdout.write(f"| {' | '.join(cells)} |\n")
        sys.stdout.flush()

    show("PyTorch", nats, count, reference)
    show(f"PyTorch, held to {other_instructions()}", *on_other_instructions(arguments))
    for head, cache in PRECISIONS:
        native = NativeModel(PackedModel.from_model(model, head), NativeOptions(LENGTH, max_tokens=LENGTH, cache=cache))
        show(f"the engine, {head} head, {cache} cache", *engine_nats(native, held_out), engine_scores(native, encoded))
    pack_bitlinears(model)
    show("PyTorch on the engine's kernels", *torch_scores(model, held_out, encoded, tokenizer.pad_token_id))
    return 0


if __name__ == "__main__":
    sys.exit(main())
