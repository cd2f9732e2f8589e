"""`InfluenceAwareOptimizer`: a torch optimizer that also moves the data mixture every so many steps.

It adds nothing to the update of the parameters: `step` is the base optimizer's step, and after every
`update_interval`-th one the sources are scored and the new weights handed out. Learning-rate schedulers, gradient scalers and
checkpoint code see the base optimizer's parameter groups and state.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from cheapertraining.datainf import DataInfCalculator, DrawBatches, Probe, SourceScores
from cheapertraining.errors import CheaperTrainingError
from cheapertraining.mixture import MixtureUpdate, MixtureWeightCalculator

logger = logging.getLogger(__name__)

STATE_KEY = "influence"
"""Where the state dict keeps what the base optimizer does not know."""


@dataclass(frozen=True)
class InfluenceReport:
    """One update of the mixture, for a log."""

    step: int
    """Optimizer steps taken when it happened."""
    scores: SourceScores
    mixture: MixtureUpdate | None
    """None when a score was not finite; the weights stayed."""
    seconds: float
    overhead: float
    """Seconds of this update over the seconds since the previous one (or since the start), itself left out."""


class InfluenceAwareOptimizer(Optimizer):
    """Wraps `base` and updates the mixture weights every `update_interval` steps.

    Args:
        base: The optimizer that trains the parameters.
        calculator: Scores the sources.
        mixture: Turns scores into weights; its sources are those of `sources`.
        sources: Source -> what to score of it at an update, see `DrawBatches`. Apart from the training stream, which an
            update must not advance.
        probes: What the mixture should become good at.
        on_weights: Called with the new weights after each update, on every rank; usually `MixedDataset.set_weights`.
        update_interval: Steps between updates of the weights. Changes only when updates happen.

    Raises:
        CheaperTrainingError: when the interval is not positive, a probe is missing, or the sources differ from the
            mixture's.
    """

    def __init__(
        self,
        base: Optimizer,
        calculator: DataInfCalculator,
        mixture: MixtureWeightCalculator,
        *,
        sources: Mapping[str, DrawBatches],
        probes: Mapping[str, Probe],
        on_weights: Callable[[Mapping[str, float]], None],
        update_interval: int = 1000,
    ) -> None:
        if update_interval < 1:
            raise CheaperTrainingError(f"update_interval is {update_interval}: it must be at least 1")
        if set(sources) != set(mixture.prior):
            raise CheaperTrainingError(
                f"sources {', '.join(sorted(sources)) or 'none'} to score, weights for "
                f"{', '.join(sorted(mixture.prior))}: they must be the same"
            )
        if not probes:
            raise CheaperTrainingError("no probes: give at least one text set that the mixture should serve")
        self.base = base
        super().__init__(base.param_groups, base.defaults)
        self._share_with_base()
        self.calculator, self.mixture = calculator, mixture
        self.update_interval = update_interval
        self.last_report: InfluenceReport | None = None
        self._sources, self._probes, self._on_weights = dict(sources), dict(probes), on_weights
        self._steps = 0
        self._updates = 0
        self._since = time.perf_counter()

    @property
    def weights(self) -> dict[str, float]:
        """The mixture's current weights."""
        return self.mixture.weights

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The base optimizer's step; then, where one is due, an update of the mixture. Returns the closure's loss."""
        loss = self.base.step(closure) if closure is not None else self.base.step()
        self._steps += 1
        if self._steps % self.update_interval == 0:
            self.update_weights()
        return loss

    def update_weights(self) -> InfluenceReport:
        """Score the sources and move the weights now. Scores that are not finite move nothing and are logged."""
        began = time.perf_counter()
        scores = self.calculator.scores(self._sources, self._probes, update=self._updates)
        self._updates += 1
        update: MixtureUpdate | None = None
        if all(math.isfinite(value) for values in scores.combined.values() for value in values):
            update = self.mixture.update(scores.combined)
            self._on_weights(update.weights)
        else:
            bad = [name for name, values in scores.combined.items() if not all(map(math.isfinite, values))]
            logger.warning("step %d: no finite influence of %s; the mixture stays", self._steps, ", ".join(bad))
        ended = time.perf_counter()
        overhead = (ended - began) / max(began - self._since, 1e-9)
        self._since = ended
        self.last_report = InfluenceReport(self._steps, scores, update, ended - began, overhead)
        logger.info(
            "step %d: mixture %s; took %.2f s, %.2f%% of the time since the last update", self._steps,
            ", ".join(f"{name} {weight:.3f}" for name, weight in self.weights.items()), ended - began, 100 * overhead,
        )  # fmt: skip
        return self.last_report

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's."""
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The base optimizer's. The constructor of `Optimizer` calls it for groups that the base has already."""
        if not any(param_group is group for group in self.base.param_groups):
            self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, and under "influence" steps, updates and the mixture's state."""
        influence = {"steps": self._steps, "updates": self._updates, "mixture": self.mixture.state_dict()}
        return {**self.base.state_dict(), STATE_KEY: influence}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`'s return value. The data set has its own state: `on_weights` is not called.

        A state dict of the base optimizer alone loads too, with a warning: the mixture then starts at its prior.

        Raises:
            CheaperTrainingError: when it was saved with other sources.
        """
        influence = state_dict.get(STATE_KEY)
        if influence is not None:
            # First, so that a refusal leaves the base optimizer untouched.
            self.mixture.load_state_dict(influence["mixture"])
            self._steps, self._updates = int(influence["steps"]), int(influence["updates"])
        else:
            logger.warning("the optimizer's state holds no influence state: the mixture starts at its present weights")
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != STATE_KEY})
        self._share_with_base()

    def _share_with_base(self) -> None:
        """One list of groups and one table of states for both, so that a scheduler that writes to one writes to both."""
        self.param_groups: list[dict[str, Any]] = self.base.param_groups
        self.state: Any = self.base.state
        self.defaults: dict[str, Any] = self.base.defaults

    def __repr__(self) -> str:
        return f"{type(self).__name__}(every {self.update_interval} steps, {self.base!r})"
