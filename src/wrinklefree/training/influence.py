"""Influence in a run: sources and probes to score, the wrapped optimizer, and what it tells the log.

The library `cheapertraining` measures and decides; here it meets our models, streams and errors. What is measured is
next-token cross-entropy, at the lambda and SubLN strength of the step, also where the stage's loss has further terms:
held-out text is what the mixture is for. Under quantization the gradients are straight-through gradients, and the input
of a layer is what its codes stand for.

Every process scores its own part of the same rows, the gradients of all are gathered, and rank 0's scores hold for all.
New weights go to the stream of every process in the same step, and hold from the batch that the stream promises.
"""

import logging
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cheapertraining import (
    CheaperTrainingError,
    DataInfCalculator,
    InfluenceAwareOptimizer,
    InfluenceReport,
    MixtureWeightCalculator,
    Probe,
)
from wrinklefree.data.prefetch import PrefetchedStream
from wrinklefree.data.scored_rows import RowPool, mixed_text, probe_pools, source_pools
from wrinklefree.data.tokens import Tokenizer
from wrinklefree.distillation.head_losses import head_losses
from wrinklefree.models.bitlinear import BitLinear
from wrinklefree.models.records import IGNORE, Batch
from wrinklefree.quantization.ste import integer_activation
from wrinklefree.training.callbacks import Callback, StepReport
from wrinklefree.training.config import MIXING_STAGES, RunConfig, StageConfig
from wrinklefree.training.device import Compute
from wrinklefree.training.placement import Student
from wrinklefree.training.sharded_state import is_cut
from wrinklefree.utils import distributed
from wrinklefree.utils.errors import ConfigError

logger = logging.getLogger(__name__)

GROUPS = 8
"""Gradients that a source's rows are averaged to, over all processes; at least two a process."""


class MixtureOptimizer(InfluenceAwareOptimizer):
    """`InfluenceAwareOptimizer` that brings the model up to date before it scores, and speaks in our errors."""

    before_update: Callable[[], None] | None = None
    """Makes what is derived from the masters (gathered codes) those of the step just taken."""
    after_update: Callable[[], None] | None = None
    """Gives gathered weights back."""
    updates_here = 0
    """Updates of this process, and the seconds that they took."""
    seconds = 0.0

    def update_weights(self) -> InfluenceReport:
        """Score the sources and move the weights.

        Raises:
            ConfigError: rows that cannot be scored.
        """
        if self.before_update is not None:
            self.before_update()
        try:
            report = super().update_weights()
        except CheaperTrainingError as error:
            raise ConfigError(f"influence: {error}") from error
        finally:
            if self.after_update is not None:
                self.after_update()
        self.updates_here += 1
        self.seconds += report.seconds
        return report


def moves_mixture(config: RunConfig) -> bool:
    """Whether this run weighs its sources by influence; a pipeline's other steps do not, whatever the command says."""
    return config.influence.enabled and config.training.stage in MIXING_STAGES


def weigh_sources(
    config: RunConfig,
    base: Optimizer,
    *,
    student: Student,
    tokenizer: Tokenizer,
    compute: Compute,
    stream: PrefetchedStream,
    total_steps: int,
) -> MixtureOptimizer:
    """Wrap the optimizer of a run, so that it moves the weights of the stream's sources.

    Raises:
        ConfigError: nothing to score, or knobs that do not go together.
        DataError: a source or probe that is missing, damaged or empty.
        NetworkError: a source or probe that needs a network that is not there.
    """
    influence, training = config.influence, config.training
    text = mixed_text(config.data)
    assert isinstance(training, StageConfig)
    assert text is not None, "a validator refuses a task without text"
    length = training.max_seq_length
    if influence.update_interval > total_steps:
        logger.warning(
            "influence.update_interval=%d is longer than the run of %d steps: the weights of the sources never move",
            influence.update_interval, total_steps,
        )  # fmt: skip
    groups, rows = shares(influence.config.rows, distributed.world_size())
    draw = partial(_draw, rows=rows, batch_size=training.batch_size)
    sources = source_pools(text, tokenizer, length=length, seed=config.seed)
    probes = probe_pools(config.data, influence.probes, tokenizer, length=length, seed=config.seed)
    total = math.fsum(source.weight for source in text.sources)
    prior = dict(zip(sources, (source.weight / total for source in text.sources), strict=True))
    shares_of_probes = [probe.weight for probe in influence.probes] or [1.0]
    try:
        optimizer = MixtureOptimizer(
            base,
            DataInfCalculator(
                student.model,
                partial(row_losses, compute),
                lambda_val=influence.config.lambda_val,
                score=influence.config.score,
                groups=groups,
                layer_input=codes_input,
                seed=config.seed,
            ),
            MixtureWeightCalculator(
                prior,
                gamma_val=influence.config.gamma_val,
                temperature=influence.config.temperature,
                learning_rate=influence.learning_rate,
                min_weight=influence.min_weight,
            ),
            sources={name: partial(draw, pool) for name, pool in sources.items()},
            probes={
                name: Probe(partial(draw, pool), share / math.fsum(shares_of_probes))
                for (name, pool), share in zip(probes.items(), shares_of_probes, strict=True)
            },
            on_weights=lambda weights: stream.set_weights([weights[name] for name in prior]),
            update_interval=influence.update_interval,
        )
    except CheaperTrainingError as error:
        raise ConfigError(f"influence: {error}") from error
    optimizer.before_update = student.refresh_weights
    if is_cut(student.model):
        from wrinklefree.training.fsdp_wrapper import reshard

        optimizer.after_update = partial(reshard, student.model)
    logger.info(
        "influence: %s weighed every %d steps by %s, %d rows each; %.1f MB of gradients",
        ", ".join(sources), influence.update_interval, ", ".join(probes), rows,
        optimizer.calculator.cache_bytes(len(sources), len(probes)) / 1e6,
    )  # fmt: skip
    return optimizer


def shares(rows: int, world_size: int) -> tuple[int, int]:
    """Groups a process, and rows of all processes: as asked for, or as many more as give each process two groups.

    Where the processes divide both, the groups are those of one process.
    """
    groups = max(2, -(-GROUPS // world_size))
    return groups, max(groups, -(-rows // world_size)) * world_size


def _draw(pool: RowPool, update: int, *, rows: int, batch_size: int) -> list[Batch]:
    return pool.batches(
        rows, update, batch_size=batch_size, rank=distributed.rank(), world_size=distributed.world_size()
    )


def row_losses(compute: Compute, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over each row's targets, and their number: [B] and [B]."""
    moved = batch.to(compute.device)
    with compute.autocast():
        output = model(moved)
        # The head's gradient is not among those compared, and would be the largest tensor of all.
        head = output.head_weight.detach()
        sums = [
            head_losses(hidden, head, labels, cross_entropy_factor=1.0).total
            for hidden, labels in zip(output.hidden, moved.labels, strict=True)
        ]
    return torch.stack(sums), (moved.labels != IGNORE).sum(1)


def codes_input(layer: nn.Linear, x: Tensor) -> Tensor:
    """The input as the layer's weight multiplies it: rounded to its integer codes as far as lambda goes."""
    if not isinstance(layer, BitLinear) or layer.activation_bits is None or layer.lambda_value == 0.0:
        return x
    return integer_activation(x, layer.activation_bits, layer.lambda_value)


class MixtureMetrics(Callback):
    """Adds each source's weight to the metrics, what an update took, and sums up at the end."""

    def __init__(self, optimizer: MixtureOptimizer) -> None:
        self._optimizer = optimizer
        self._updates = 0
        self._seconds = 0.0

    def on_step(self, report: StepReport) -> None:
        """Add the figures of the step."""
        report.metrics |= {f"mixture/{name}": weight for name, weight in self._optimizer.weights.items()}
        self._seconds += report.step_seconds
        if self._optimizer.updates_here > self._updates and self._optimizer.last_report is not None:
            self._updates = self._optimizer.updates_here
            report.metrics["influence_seconds"] = self._optimizer.last_report.seconds
            mixture = self._optimizer.last_report.mixture
            if mixture is not None:
                report.metrics |= {f"influence_z/{name}": z for name, z in mixture.z.items() if math.isfinite(z)}

    def on_end(self, report: StepReport | None) -> None:
        """Say what influence cost and where the weights went."""
        if self._seconds:
            logger.info(
                "influence: %d updates took %.2f s, %.2f%% of the other time; the mixture ended at %s",
                self._updates, self._optimizer.seconds,
                100 * self._optimizer.seconds / max(self._seconds - self._optimizer.seconds, 1e-9),
                ", ".join(f"{name} {weight:.3f}" for name, weight in self._optimizer.weights.items()),
            )  # fmt: skip
