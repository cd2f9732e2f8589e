"""Accuracy of a task's test split from the exported files in llama.cpp, beside the PyTorch student's.

    uv run python -m benchmark.export_accuracy FOLDER --task recall
    uv run python -m benchmark.export_accuracy FOLDER --task movie_reviews --examples 400 --rows 256

The same prompts, label words and rule (the most probable label words) for every row; PyTorch in float32 with the activation
quantization that training used, llama.cpp with its own.
"""

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from benchmark.export_table import header, show
from benchmark.llama_cpp_library import LlamaCpp
from wrinklefree.data.finetune_dataset import encode_choices
from wrinklefree.data.tasks import get_task
from wrinklefree.models.artifact import Artifact, read_artifact
from wrinklefree.serving.converter import ConversionOptions, convert
from wrinklefree.training.comparison import ratio_interval
from wrinklefree.training.device import Compute
from wrinklefree.training.evaluation import choice_scores

TYPES = ("TQ2_0", "TQ1_0", "Q2_0", "Q4_0")


def pytorch_choices(
    artifact: Artifact, prompts: Sequence[list[int]], choices: Sequence[Sequence[list[int]]]
) -> list[int]:
    """The student's choice for each example."""
    model, pad = artifact.load_model().eval(), artifact.load_tokenizer().pad_token_id
    compute = Compute(torch.device("cpu"), torch.float32)
    scores = choice_scores(model, prompts, choices, pad_token_id=pad, compute=compute, rows_per_batch=16)
    return [int(np.argmax(row)) for row in scores]


def llama_cpp_choices(
    path: Path, prompts: Sequence[list[int]], choices: Sequence[Sequence[list[int]]], context: int
) -> list[int]:
    """The file's choice for each example."""
    found: list[int] = []
    with closing(LlamaCpp(path, context=context)) as runtime:

        def score(prompt: list[int], words: list[int]) -> float:
            logits = torch.from_numpy(runtime.logits([*prompt, *words[:-1]]))[len(prompt) - 1 :]
            return float(logits.log_softmax(-1)[torch.arange(len(words)), words].sum())

        for prompt, options in zip(prompts, choices, strict=True):
            if all(len(option) == 1 for option in options):
                last = runtime.logits(prompt)[-1]
                found.append(int(np.argmax([last[option[0]] for option in options])))
            else:
                found.append(int(np.argmax([score(prompt, option) for option in options])))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="accuracy of exported files in llama.cpp")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", default="recall")
    parser.add_argument("--examples", type=int, default=1_000_000, help="of the test split (all)")
    parser.add_argument("--rows", type=int, default=128, help="longest prompt with its answer, in tokens (128)")
    options = parser.parse_args()
    artifact, task = read_artifact(options.folder), get_task(options.task)
    tokenizer, examples = artifact.load_tokenizer(), task.load("test")[: options.examples]
    encoded = [encode_choices(task, example, tokenizer, options.rows) for example in examples]
    prompts, choices = [list(prompt) for prompt, _ in encoded], [list(map(list, c)) for _, c in encoded]
    labels = [example.label for example in examples]
    header("engine", "type", f"{task.name} accuracy", "95% interval", "same choice as PyTorch", "examples")

    def row(engine: str, name: str, found: list[int], reference: list[int]) -> None:
        hits = [float(a == b) for a, b in zip(found, labels, strict=True)]
        interval = ratio_interval(hits, [1.0] * len(hits))
        same = np.mean([a == b for a, b in zip(found, reference, strict=True)])
        between = f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
        show(f"| {engine} | {name} | {100 * np.mean(hits):.1f}% | {between} | {100 * same:.1f}% | {len(hits)} |")

    reference = pytorch_choices(artifact, prompts, choices)
    row("PyTorch", "as trained", reference, reference)
    with tempfile.TemporaryDirectory() as folder:
        for name in TYPES:
            made = convert(ConversionOptions(artifact.folder, Path(folder) / "m.gguf", weight_type=name, verify=False))
            row("llama.cpp", name, llama_cpp_choices(made.path, prompts, choices, options.rows), reference)


if __name__ == "__main__":
    main()
