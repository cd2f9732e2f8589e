"""Influence of data sources on probe sets, from projected group gradients (DataInf, arXiv:2310.00902).

Single-sample gradients are mostly noise, so the rows of a source are dealt into groups and a group's mean gradient is
one observation; the spread over a source's groups says how sure its score is. Gradients are taken at the model as it
is: under quantization they are the straight-through gradients of the present lambda.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cheapertraining import collectives
from cheapertraining.errors import CheaperTrainingError
from cheapertraining.projection import GradientProjector, LayerFilter, LayerInput, PerSampleLoss, group_means
from cheapertraining.scores import Score, benefits
from cheapertraining.state import preserved_training_state

DrawBatches = Callable[[int], Iterable[Any]]
"""`draw(number) -> batches` to score at update `number` (0, 1, ...). A pure function of the number makes resume exact.
Under data parallelism each rank draws its own rows, and equally many batches."""


@dataclass(frozen=True)
class Probe:
    """A set of texts whose loss the mixture should lower."""

    draw: DrawBatches
    weight: float = 1.0
    """Its share in the combined score; negative steers away from it."""


@dataclass(frozen=True)
class SourceScores:
    """Benefits by source, a value for each group of rows (all ranks' groups, rank 0's first); higher is better."""

    combined: dict[str, list[float]]
    """Weighted sum over probes."""
    by_probe: dict[str, dict[str, list[float]]]
    """Probe -> source -> groups."""
    rows: int
    """Rows that this rank ran forward and backward, probes included."""
    cache_bytes: int
    """Memory of the gradients of all groups and probes and of the random matrices."""


class DataInfCalculator:
    """Scores data sources by how much their gradients help the probes.

    Args:
        model: The module being trained; with FSDP the sharded one, with DDP either.
        loss: `loss(model, batch) -> (sums [B], counts [B])`, see `PerSampleLoss`.
        lambda_val: Damping of the curvature, in units of a layer's mean squared gradient norm. Small trusts the
            estimated curvature, large ignores it; the scores "datainf" and "exact" use it, "dot" does not.
        score: "exact", "datainf" or "dot", see `cheapertraining.scores`. The default is the inverse that DataInf
            approximates: with group gradients it costs the same (what separates them: README, "Proofs").
        projection_size: k; gradients cost k * k floats a layer.
        groups: Groups that a source's rows are dealt into on each rank, at least two. Every rank holds those of all ranks.
        choose: Which linear layers; by default all but output heads.
        layer_input: For layers that transform their input, see `GradientProjector`.
        seed: Of the random projections; every update draws its own from it.
        process_group: Ranks that share the scoring; None is the default group, if there is one.

    Raises:
        CheaperTrainingError: when a knob is out of range or the model has no layer to use.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        *,
        lambda_val: float = 0.1,
        score: Score = "exact",
        projection_size: int = 32,
        groups: int = 8,
        choose: LayerFilter | None = None,
        layer_input: LayerInput | None = None,
        seed: int = 0,
        process_group: collectives.Group = None,
    ) -> None:
        if groups < 2:
            raise CheaperTrainingError(f"groups is {groups}: the standard error of a score needs at least 2")
        # Refuses a wrong score or damping now, not after the first interval.
        benefits(torch.zeros(1, 1), torch.zeros(1, 1), [slice(0, 1)], score=score, lambda_val=lambda_val)
        self.projector = GradientProjector(
            model, size=projection_size, choose=choose, seed=seed, layer_input=layer_input
        )
        self.lambda_val, self.groups = lambda_val, groups
        self.score: Score = score
        self._loss = loss
        self.process_group = process_group

    def scores(
        self, sources: Mapping[str, DrawBatches], probes: Mapping[str, Probe], *, update: int = 0
    ) -> SourceScores:
        """Score every source at the present parameters; equal on all ranks. Changes nothing of the training state.

        Every batch is drawn before the first forward pass, so that a rank that cannot draw stops all ranks instead of
        leaving the others waiting.

        Raises:
            CheaperTrainingError: for no sources or probes, rows that do not fill the groups, a loss that is not per
                row, or ranks that draw unequally.
        """
        with preserved_training_state(self.projector.model):
            drawn = self._draw(sources, probes, update)
            self.projector.redraw(update)
            rows = 0
            by_source: list[Tensor] = []
            for name in sources:
                gradients, counts = self._gradients(drawn["source", name])
                rows += len(counts)
                by_source.append(self._gather(name, gradients, counts))
            probe_means: list[Tensor] = []
            for name in probes:
                gradients, counts = self._gradients(drawn["probe", name])
                rows += len(counts)
                probe_means.append(self._probe_mean(name, gradients, counts))
            return self._combine(list(sources), probes, by_source, probe_means, rows)

    def cache_bytes(self, sources: int, probes: int) -> int:
        """Memory of one update's gradients and random matrices on a rank: 4 width (groups + probes) + signs.

        Groups are counted over all ranks, because every rank holds them all.
        """
        groups = sources * self.groups * collectives.world_size(self.process_group)
        return self.projector.cache_bytes(groups + probes)

    def _draw(
        self, sources: Mapping[str, DrawBatches], probes: Mapping[str, Probe], update: int
    ) -> dict[tuple[str, str], list[Any]]:
        drawn: dict[tuple[str, str], list[Any]] = {}
        error: str | None = None
        try:
            if not sources or not probes:
                raise CheaperTrainingError(
                    f"{len(sources)} sources and {len(probes)} probes: at least one of each is needed"
                )
            draws = {("source", name): draw for name, draw in sources.items()}
            draws |= {("probe", name): probe.draw for name, probe in probes.items()}
            for (kind, name), draw in draws.items():
                drawn[kind, name] = list(draw(update))
                if not drawn[kind, name]:
                    raise CheaperTrainingError(
                        f"{kind} {name} drew no batch at update {update}: it must never be empty"
                    )
        except Exception as problem:  # told to every rank, then raised
            if collectives.world_size(self.process_group) == 1:
                raise
            error = f"{type(problem).__name__}: {problem}"
        collectives.agree({f"{kind} {name}": len(b) for (kind, name), b in drawn.items()}, error, self.process_group)
        return drawn

    def _gradients(self, batches: list[Any]) -> tuple[Tensor, Tensor]:
        parts = [self.projector.per_sample(batch, self._loss) for batch in batches]
        return torch.cat([gradients for gradients, _ in parts]), torch.cat([counts for _, counts in parts])

    def _gather(self, name: str, gradients: Tensor, counts: Tensor) -> Tensor:
        means, error = None, None
        try:
            means = group_means([gradients], [counts], self.groups)
        except CheaperTrainingError as problem:
            error = f"source {name}: {problem}"
        collectives.agree("groups", error, self.process_group)
        assert means is not None
        return collectives.gather_rows(means, self.process_group)

    def _probe_mean(self, name: str, gradients: Tensor, counts: Tensor) -> Tensor:
        """[width], over the targets of all ranks."""
        total = collectives.gather_rows(gradients.sum(0, keepdim=True), self.process_group).sum(0)
        targets = collectives.gather_rows(counts.sum().reshape(1).float(), self.process_group).sum()
        if not targets > 0:
            raise CheaperTrainingError(f"probe {name} has no target: draw rows that hold targets")
        return total / targets

    def _combine(
        self, names: list[str], probes: Mapping[str, Probe], by_source: list[Tensor], means: list[Tensor], rows: int
    ) -> SourceScores:
        stacked, v = torch.cat(by_source), torch.stack(means)
        values = benefits(stacked, v, self.projector.spans, score=self.score, lambda_val=self.lambda_val).cpu()
        table: list[list[list[float]]] = values.reshape(len(probes), len(names), -1).tolist()
        table = collectives.from_first_rank(table, self.process_group)
        by_probe = {probe: dict(zip(names, row, strict=True)) for probe, row in zip(probes, table, strict=True)}
        weights = [probe.weight for probe in probes.values()]
        combined = {
            name: [
                math.fsum(w * x for w, x in zip(weights, parts, strict=True)) for parts in zip(*columns, strict=True)
            ]
            for name, columns in ((name, [by_probe[probe][name] for probe in probes]) for name in names)
        }
        return SourceScores(combined, by_probe, rows, self.projector.cache_bytes(len(stacked) + len(v)))
