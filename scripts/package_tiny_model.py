"""Turn the output of `experiment=tiny_base` into the tiny model that ships with the library.

Casts the weights to bfloat16, measures the result, and writes it with a model card:

    uv run python scripts/train.py experiment=tiny_base
    uv run python scripts/package_tiny_model.py --input outputs/bitdistill_tiny_fp_pretrain
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import wrinklefree
from wrinklefree.composition import compose
from wrinklefree.data.config import PretrainData
from wrinklefree.data.facts import facts_fingerprint, people
from wrinklefree.data.pretrain_dataset import held_out_rows
from wrinklefree.data.tasks import get_task
from wrinklefree.models.artifact import WEIGHTS, read_artifact, write_artifact
from wrinklefree.training.device import choose_compute
from wrinklefree.training.evaluation import LanguageScore, TaskScore, score_language, score_task

DESTINATION = Path(wrinklefree.__file__).parent / "assets" / "tiny"
LARGEST_FILE = 10_000_000

CARD = """# WrinkleFree tiny

A Llama-shaped language model of {parameters:,} parameters ({layers} layers, hidden size {hidden}, FFN {ffn}, vocabulary
{vocabulary}), small enough to go through every stage of BitDistill on two CPU cores. It is a test bed, not an assistant: it
writes grammatical, meaningless English, and it knows {people} people who do not exist.

## Training

`uv run python scripts/train.py experiment=tiny_base` (seed {seed}, {tokens:,} tokens, commit {commit}), from random weights
with a tokenizer trained on the same text, then `uv run python scripts/package_tiny_model.py`, which rounds the weights to
bfloat16.

| text | rights |
|---|---|
| generated biographies (`wrinklefree.data.facts`) | ours, MIT |
| Wikipedia passages of BoolQ | CC BY-SA 3.0 |
| State of the Union addresses | public domain |
| The World Factbook | public domain |
| Moby Dick | public domain |
| reference topics of CPython's documentation | PSF License 2 |

Texts are read from packages at training time; none is part of this repository. The weights are published under the MIT
licence of the library, with attribution to the authors of the texts above.

## Measured

| | |
|---|---|
| held-out text: {scored:,} tokens of Wikipedia passages and Python's reference, test split | |
| bits per byte | {bits:.4f} [{low:.4f}, {high:.4f}] |
| perplexity | {perplexity:.1f} |
| recall of a generated fact among 8 values, people of the test split ({test_questions} questions) | {test:.1%} |
| the same, people of the validation split ({validation_questions} questions) | {validation:.1%} |

Fingerprint of the facts: {facts}.
"""


def main() -> int:
    """Write the shipped model; returns the exit code."""
    parser = argparse.ArgumentParser(description="Package the tiny model.")
    parser.add_argument("--input", required=True, type=Path, help="the output folder of experiment=tiny_base")
    parser.add_argument("--output", type=Path, default=DESTINATION)
    arguments = parser.parse_args()
    source = read_artifact(arguments.input)
    model = source.load_model(dtype=torch.bfloat16).float()  # what a user will load: bfloat16 values
    tokenizer = source.load_tokenizer()
    compute = choose_compute("auto")
    text = compose(["model=tiny", "training=fp_pretrain", "data=packaged"]).config.data
    assert isinstance(text, PretrainData)
    rows = held_out_rows(text, tokenizer, split="test", max_tokens=50_000, max_seq_length=128, batch_size=16)
    language = score_language(model, rows, compute)
    task = get_task("recall")
    recall = {
        split: score_task(model, tokenizer, task, task.load(split), max_seq_length=128, compute=compute)
        for split in ("validation", "test")
    }
    card = render_card(source.lineage, sum(p.numel() for p in model.parameters()), language, recall)
    write_artifact(arguments.output, model.bfloat16(), tokenizer, source.lineage, card=card)
    size = (arguments.output / WEIGHTS).stat().st_size
    if size > LARGEST_FILE:
        raise SystemExit(f"{arguments.output / WEIGHTS} has {size:,} bytes; the repository takes {LARGEST_FILE:,}")
    sys.stdout.write(card)
    return 0


def render_card(
    lineage: Mapping[str, Any], parameters: int, language: LanguageScore, recall: Mapping[str, TaskScore]
) -> str:
    """The model card, from what was recorded and measured."""
    architecture = json.loads(json.dumps(lineage["config"]["model"]["architecture"]))
    return CARD.format(
        parameters=parameters,
        layers=architecture["num_hidden_layers"],
        hidden=architecture["hidden_size"],
        ffn=architecture["intermediate_size"],
        vocabulary=architecture["vocab_size"],
        people=len(people()),
        seed=lineage["seed"],
        tokens=lineage["tokens"],
        commit=lineage["git_commit"][:12],
        scored=language.tokens,
        bits=language.bits_per_byte,
        low=language.interval.low,
        high=language.interval.high,
        perplexity=language.perplexity,
        test=recall["test"].value,
        test_questions=len(recall["test"].per_example),
        validation=recall["validation"].value,
        validation_questions=len(recall["validation"].per_example),
        facts=facts_fingerprint()[:16],
    )


if __name__ == "__main__":
    raise SystemExit(main())
