"""How good are the scores? Against the exact inverse, and against retraining without a source.

A byte-level model is trained on all six sources (see `texts`), uniformly. At checkpoints of it:

1. group gradients are scored with "datainf", "exact" and "dot" for a range of lambdas: correlation of the two cheaper
   scores with the exact inverse, over all groups, and the share of it that is left when sources' means are taken out;
2. training goes on from the checkpoint, once with all sources and once without each (equal steps; the same rows of the
   sources that stay); a source's truth is how much higher the probe's kind of held-out text loses without it. Each
   score's rank correlation with the truth over the six sources, averaged over seeds, checkpoints and probes.

    python -m benchmarks.accuracy
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.texts import PROBES, SOURCES, ByteLM, Corpus, load_corpus, mean_loss, row_loss
from cheapertraining import GradientProjector, Score, benefits
from cheapertraining.projection import group_means

LAMBDAS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
GROUPS = 8
ROWS = 8
"""Rows a source gives to each step, and to each group."""


def make_optimizer(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    """AdamW, or gradient descent with momentum, for which the dot product is the first-order truth."""
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, corpus: Corpus, *, first: int, steps: int, seed: int,
    without: str | None = None,
) -> None:  # fmt: skip
    """ROWS rows of every source a step; the other sources fill the place of the one left out, with rows of their own."""
    kept = [name for name in SOURCES if name != without]
    for step in range(first, first + steps):
        draw = torch.Generator().manual_seed(10_000 * seed + step)
        picks = {name: torch.randint(0, len(corpus.train[name]), (2 * ROWS,), generator=draw) for name in SOURCES}
        parts = [corpus.train[name][picks[name][:ROWS]] for name in kept]
        if without is not None:
            spare = torch.cat([corpus.train[name][picks[name][ROWS:]] for name in kept])
            parts.append(spare[torch.randperm(len(spare), generator=draw)[:ROWS]])
        sums, counts = row_loss(model, torch.cat(parts))
        (sums.sum() / counts.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def gradients(model: nn.Module, corpus: Corpus, seed: int, size: int) -> tuple[Tensor, Tensor, Sequence[slice]]:
    """Group gradients [6 x GROUPS, width], probe gradients [2, width], and the layers' entries."""
    projector = GradientProjector(model, size=size, seed=seed)
    draw = torch.Generator().manual_seed(77 + seed)
    groups = []
    for name in SOURCES:
        rows = corpus.train[name]
        rows = rows[torch.randint(0, len(rows), (GROUPS * ROWS,), generator=draw)]
        values, counts = projector.per_sample(rows, row_loss)
        groups.append(group_means([values], [counts], GROUPS))
    probes = []
    for name in PROBES:
        values, counts = projector.per_sample(corpus.probe[name], row_loss)
        probes.append(values.sum(0) / counts.sum())
    return torch.cat(groups), torch.stack(probes), projector.spans


def pearson(x: Tensor, y: Tensor) -> float:
    """Correlation of two vectors."""
    return float(torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1])


def spearman(x: Tensor, y: Tensor) -> float:
    """Correlation of ranks; values are distinct."""
    return pearson(x.argsort().argsort(), y.argsort().argsort())


def within_sources(scores: Tensor) -> Tensor:
    """[48] scores without the mean of each source."""
    table = scores.view(len(SOURCES), GROUPS)
    return (table - table.mean(1, keepdim=True)).flatten()


def retraining_truth(
    model: nn.Module, state: dict[str, object], kind: str, corpus: Corpus, *, first: int, steps: int, seed: int
) -> Tensor:
    """[2, 6]: held-out loss of each probe's kind without a source, minus that with all."""

    def losses(without: str | None) -> Tensor:
        again = copy.deepcopy(model)
        optimizer = make_optimizer(again, kind)
        optimizer.load_state_dict(copy.deepcopy(state))
        train(again, optimizer, corpus, first=first, steps=steps, seed=seed, without=without)
        return torch.tensor([mean_loss(again, corpus.test[name]) for name in PROBES])

    everything = losses(None)
    return torch.stack([losses(name) - everything for name in SOURCES], dim=1)


def measure(kind: str, seeds: int, first_seed: int, checkpoints: Sequence[int], steps: int, size: int) -> None:
    """Print both tables for one optimizer."""
    corpus = load_corpus()
    agreement: dict[tuple[str, float], list[tuple[float, float]]] = {}
    ranks: dict[tuple[Score, float], list[float]] = {}
    truths: list[Tensor] = []
    for seed in range(first_seed, first_seed + seeds):
        torch.manual_seed(seed)
        model = ByteLM()
        optimizer = make_optimizer(model, kind)
        done = 0
        for checkpoint in checkpoints:
            train(model, optimizer, corpus, first=done, steps=checkpoint - done, seed=seed)
            done = checkpoint
            groups, probes, spans = gradients(model, corpus, seed, size)
            truth = retraining_truth(model, optimizer.state_dict(), kind, corpus, first=done, steps=steps, seed=seed)
            truths.append(truth)
            for value in LAMBDAS:
                table: dict[Score, Tensor] = {
                    score: benefits(groups, probes, spans, score=score, lambda_val=value)
                    for score in ("datainf", "exact", "dot")
                }
                for score, scores in table.items():
                    for p in range(len(PROBES)):
                        means = scores[p].view(len(SOURCES), GROUPS).mean(1)
                        ranks.setdefault((score, value), []).append(spearman(means, truth[p]))
                        inner = pearson(within_sources(scores[p]), within_sources(table["exact"][p]))
                        agreement.setdefault((score, value), []).append((pearson(scores[p], table["exact"][p]), inner))
    report(kind, seeds, checkpoints, steps, size, agreement, ranks, truths)


def report(
    kind: str, seeds: int, checkpoints: Sequence[int], steps: int, size: int,
    agreement: dict[tuple[str, float], list[tuple[float, float]]], ranks: dict[tuple[Score, float], list[float]],
    truths: list[Tensor],
) -> None:  # fmt: skip
    """Markdown tables."""
    write = sys.stdout.write
    write(f"\n{kind}, {seeds} seeds, checkpoints {list(checkpoints)}, {steps} steps of retraining, k = {size}\n\n")
    columns = ("lambda_val", "datainf - exact", "dot - exact", "within sources: datainf", "dot")
    columns += ("truth: datainf", "exact", "dot", "gain over dot: datainf", "exact")
    write(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n")

    def average(values: Sequence[float]) -> str:
        error = statistics.stdev(values) / len(values) ** 0.5
        return f"{statistics.mean(values):.3f} ({error:.3f})"

    for value in LAMBDAS:
        cells = [average([pair[i] for pair in agreement[score, value]]) for i in (0, 1) for score in ("datainf", "dot")]
        cells += [average(ranks[score, value]) for score in ("datainf", "exact", "dot")]
        for score in ("datainf", "exact"):
            pairs = zip(ranks[score, value], ranks["dot", value], strict=True)
            cells.append(average([theirs - dot for theirs, dot in pairs]))
        write(f"| {value:g} | {' | '.join(cells)} |\n")
    mean = torch.stack(truths).mean(0)
    for probe, row in zip(PROBES, mean.tolist(), strict=True):
        effects = ", ".join(f"{name} {effect:+.4f}" for name, effect in zip(SOURCES, row, strict=True))
        write(f"\nMean rise of the loss on {probe} without a source, nats a byte: {effects}\n")
    sys.stdout.flush()


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[60, 240])
    parser.add_argument("--steps", type=int, default=30, help="of retraining")
    parser.add_argument("--size", type=int, default=32, help="projection size k")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "sgd"], choices=["adamw", "sgd"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for kind in arguments.optimizers:
        measure(kind, arguments.seeds, arguments.first_seed, arguments.checkpoints, arguments.steps, arguments.size)


if __name__ == "__main__":
    main()
