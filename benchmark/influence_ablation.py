"""Does influence find the bad source? Four sources of real text, one of them raw e-mail, a uniform prior, equal tokens.

    uv run python -m benchmark.influence_ablation --output /tmp/influence            # all; resumable, run it again
    uv run python -m benchmark.influence_ablation --output /tmp/influence --report   # the tables of what is there

Fixed in advance: Wikipedia passages, State of the Union addresses, the World Factbook and the e-mail of a spam corpus (with
its headers) at a quarter each; the probe is news summarised in XSum; the measure is bits per byte of BBC news articles,
which are neither source nor probe (film reviews stand beside them). Every arm of a seed starts from the same weights and
tokenizer and trains through the ordinary stage on the same number of tokens:

- uniform: a quarter each, all the way;
- hand-tuned: a person left the e-mail out, a third each;
- influence: starts uniform.

Tokens saved: each curve of bits per byte over its second half is fitted with a line in log(tokens); an arm has reached
uniform's end where its line meets the end of uniform's. What hand-tuned saves is what can be saved by knowing the answer.
A fourth arm has four disjoint parts of one source: there is nothing to find, and the weights should stay where they are.
"""

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from wrinklefree.cli import set_up_logging
from wrinklefree.composition import compose
from wrinklefree.data.config import LocalSource, PretrainData
from wrinklefree.data.corpora import load_corpus
from wrinklefree.data.pretrain_dataset import held_out_rows
from wrinklefree.training import run
from wrinklefree.training.config import RunConfig
from wrinklefree.training.device import Compute
from wrinklefree.training.evaluation import score_language
from wrinklefree.training.plan import StagePlan, plan_stage
from wrinklefree.utils.tokenizer import TextTokenizer

GOOD = ("boolq_passages", "state_of_the_union", "factbook")
BAD = "spam_assassin"
PROBE = "xsum_articles"
HELD_OUT = ("bbc_news", "movie_reviews_text")
CHARACTERS = 1_600_000
"""Of each source, so that no arm meets a text twice."""
PASSAGE = 3000
"""Longest document: addresses and books become passages."""
ARMS = ("uniform", "hand_tuned", "influence", "identical")
ARCHITECTURE = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


@dataclass(frozen=True)
class Bed:
    """What all arms share."""

    folder: Path
    steps: int
    batch: int
    length: int
    lr: float
    interval: int
    stage: str
    evaluations: int

    @property
    def tokens(self) -> int:
        """Of every arm."""
        return self.steps * self.batch * self.length


def write_texts(folder: Path) -> None:
    """Every text as a file of passages, in an order drawn once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*GOOD, BAD, PROBE, *HELD_OUT):
        file = folder / f"{name}.jsonl"
        if file.exists():
            continue
        documents = list(load_corpus(name))
        random.Random(0).shuffle(documents)
        passages = [
            text[at : at + PASSAGE] for text in documents for at in range(0, min(len(text), 8 * PASSAGE), PASSAGE)
        ]
        random.Random(1).shuffle(passages)
        kept, total = [], 0
        for passage in passages:
            if total < CHARACTERS and len(passage) > 200:
                kept.append(passage)
                total += len(passage)
        write_lines(file, kept)
        if name == GOOD[0]:
            for part in range(4):
                write_lines(folder / f"part_{part}.jsonl", kept[part::4])


def write_lines(file: Path, texts: Sequence[str]) -> None:
    """A JSON-lines file."""
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def sources_of(bed: Bed, arm: str) -> str:
    """`data.sources` of an arm, as a command gives it."""
    names = (
        [f"part_{part}" for part in range(4)]
        if arm == "identical"
        else [*GOOD, *([] if arm == "hand_tuned" else [BAD])]
    )
    paths = (bed.folder / "texts" / f"{name}.jsonl" for name in names)
    return "[" + ", ".join(f"{{kind: local, path: '{path}', weight: 1.0}}" for path in paths) + "]"


def common(bed: Bed, seed: int) -> list[str]:
    """Overrides of every command of a seed."""
    return [
        "model=tiny",
        *(f"model.architecture.{key}={value}" for key, value in ARCHITECTURE.items()),
        f"training.batch_size={bed.batch}",
        f"training.max_seq_length={bed.length}",
        "data=local",
        "data.normalize_weights=true",
        "data.held_out_percent=0",
        f"seed={seed}",
        "audit.enabled=false",
    ]


def start_of(bed: Bed, seed: int) -> Path:
    """Weights and tokenizer that all arms of a seed start from: random, but for one step at a rate of nothing."""
    output = bed.folder / f"start_{seed}"
    command = [
        "training=fp_pretrain", "training.from_scratch=true", "training.max_steps=1", "training.lr=1e-9",
        "training.evaluation.max_tokens=0", f"data.sources={sources_of(bed, 'uniform')}", f"output_dir={output}",
    ]  # fmt: skip
    plan = plan_of([*common(bed, seed), *command])
    run.run_stage(plan)
    if bed.stage == "fp_pretrain":
        return plan.artifact
    ternary = [
        "training=stage1_subln", f"training.init_from={plan.artifact}", f"data.sources={sources_of(bed, 'uniform')}",
        f"output_dir={output}",
    ]  # fmt: skip
    stage1 = plan_of([*common(bed, seed), *ternary])
    run.run_stage(stage1)
    return stage1.artifact


def plan_of(overrides: Sequence[str]) -> StagePlan:
    """The plan of a command."""
    return plan_stage(*compose(list(overrides)))


def plan_arm(bed: Bed, seed: int, arm: str, start: Path) -> StagePlan:
    """The plan of one training."""
    training = "stage2_pretrain" if bed.stage == "stage2" else bed.stage
    command = [
        f"training={training}", f"training.init_from={start}", f"training.max_steps={bed.steps}", f"training.lr={bed.lr}",
        "training.gradient_accumulation_steps=1", "training.dtype=bfloat16", "training.schedule.type=constant",
        "training.schedule.warmup_share=0.1", "training.quantization_warmup.schedule=none",
        f"training.checkpoint.save_interval={bed.steps}",
        f"training.evaluation.interval={max(1, bed.steps // bed.evaluations)}", "training.logging.log_interval=100",
        f"data.sources={sources_of(bed, arm)}", f"output_dir={bed.folder / f'{arm}_{seed}'}",
    ]  # fmt: skip
    if arm in {"influence", "identical"}:
        probe = bed.folder / "texts" / f"{PROBE}.jsonl"
        command += [
            "influence.enabled=true",
            f"influence.update_interval={bed.interval}",
            f"influence.probes=[{{kind: local, path: '{probe}'}}]",
        ]
    return plan_of([*common(bed, seed), *command])


def measure(
    bed: Bed,
) -> Callable[[RunConfig, Any, TextTokenizer, Compute], Callable[[], Mapping[str, float]]]:
    """What stands in the place of a run's own validation: bits per byte of the held-out texts."""

    def make(
        config: RunConfig, model: Any, tokenizer: TextTokenizer, compute: Compute
    ) -> Callable[[], dict[str, float]]:
        texts = {}
        for name in HELD_OUT:
            data = PretrainData(
                name=name, sources=(LocalSource(path=str(bed.folder / "texts" / f"{name}.jsonl")),), held_out_percent=40
            )
            texts[name] = held_out_rows(
                data, tokenizer, split="validation", max_tokens=4000 if name == HELD_OUT[0] else 1500,
                max_seq_length=bed.length, batch_size=32,
            )  # fmt: skip
        return lambda: {name: score_language(model, rows, compute).bits_per_byte for name, rows in texts.items()}

    return make


def curve(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and bits per byte of a run."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = {r["tokens"]: r["evaluation"][name] for r in records if r["event"] == "evaluation"}
    tokens = np.array(sorted(points), dtype=float)
    return tokens, np.array([points[int(t)] for t in tokens])


def weights(folder: Path) -> list[dict[str, float]]:
    """The mixture at every step."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = []
    for record in records:
        figures = record.get("metrics", record)
        mixture = {key.partition("/")[2]: value for key, value in figures.items() if key.startswith("mixture/")}
        if record["event"] == "step" and mixture:
            found.append(mixture)
    return found


def fit(tokens: np.ndarray, bits: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of bits per byte in log(tokens), over the second half of the tokens."""
    late = tokens >= tokens[-1] / 2
    slope, intercept = np.polyfit(np.log(tokens[late]), bits[late], 1)
    return float(slope), float(intercept)


def saving(arm: Path, uniform: Path, name: str) -> tuple[float, float]:
    """Share of uniform's tokens that the arm did not need, and its fitted end in bits per byte."""
    tokens, bits = curve(uniform, name)
    slope, intercept = fit(tokens, bits)
    end = slope * math.log(tokens[-1]) + intercept
    own_slope, own_intercept = fit(*curve(arm, name))
    reached = math.exp((end - own_intercept) / own_slope)
    return 1 - reached / tokens[-1], own_slope * math.log(tokens[-1]) + own_intercept


def report(bed: Bed, seeds: Sequence[int], folders: Mapping[tuple[str, int], Path]) -> str:
    """Both tables, in Markdown."""
    lines = [
        f"{bed.stage}, {bed.tokens:,} tokens an arm, weights updated every {bed.interval} of {bed.steps} steps; {len(seeds)} "
        "seeds (mean ± standard error)", "",
        "| held-out text | arm | bits per byte at the end | tokens saved against uniform | of what hand-tuned saves |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name in HELD_OUT:
        saved = {
            arm: [saving(folders[arm, seed], folders["uniform", seed], name) for seed in seeds]
            for arm in ("uniform", "hand_tuned", "influence")
        }
        possible = statistics.fmean(value for value, _ in saved["hand_tuned"])
        for arm, values in saved.items():
            shares, ends = zip(*values, strict=True)
            part = "" if arm != "influence" else f"{100 * statistics.fmean(shares) / possible:.0f}%"
            lines.append(f"| {name} | {arm} | {spread(ends, 3)} | {spread([100 * s for s in shares], 1)}% | {part} |")
    lines += ["", "| seed | e-mail's share: mean over the run | first quarter | at the end | identical sources: largest "
              "deviation from 0.25 | at the end |", "|---|---|---|---|---|---|"]  # fmt: skip
    for seed in seeds:
        mixture = [step[BAD] for step in weights(folders["influence", seed])]
        cells = [statistics.fmean(mixture), statistics.fmean(mixture[: len(mixture) // 4]), mixture[-1]]
        same = weights(folders["identical", seed]) if ("identical", seed) in folders else []
        off = [max(abs(value - 0.25) for value in step.values()) for step in same]
        cells += [max(off), off[-1]] if off else []
        lines.append(f"| {seed} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard error."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def main() -> None:
    """Train what is not there yet, seed by seed, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--interval", type=int, default=10)
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--stage", choices=("stage2", "fp_pretrain"), default="stage2")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    bed = Bed(
        options.output.resolve(), options.steps, options.batch, options.length, options.lr, options.interval, options.stage,
        options.evaluations,
    )  # fmt: skip
    set_up_logging()
    write_texts(bed.folder / "texts")
    folders: dict[tuple[str, int], Path] = {}
    # All seeds of what is compared first: the check that comes last needs no company.
    order = [
        (arm, seed) for last in (False, True) for seed in options.seeds for arm in ARMS if (arm == ARMS[-1]) == last
    ]
    with mock.patch.object(run, "make_validation", measure(bed)):
        starts = {seed: start_of(bed, seed) for seed in options.seeds}
        for arm, seed in order:
            plan = plan_arm(bed, seed, arm, starts[seed])
            if arm in options.arms and not options.report:
                run.run_stage(plan)
            if (plan.artifact / "lineage.json").is_file():
                folders[arm, seed] = plan.run_folder
    done = [seed for seed in options.seeds if all((arm, seed) in folders for arm in ARMS[:3])]
    if not done:
        sys.stdout.write("no seed has all of " + ", ".join(ARMS[:3]) + " yet\n")
        return
    sys.stdout.write(report(bed, done, folders))


if __name__ == "__main__":
    main()
