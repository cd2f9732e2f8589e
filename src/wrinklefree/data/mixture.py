"""Which source comes next, so that the tokens served of each follow the weights at any moment.

The next piece comes from the source that is furthest behind its weight. Shares then hold at any moment, whatever the
lengths of the documents, and need no random draw that a resume would have to repeat. The choice is made where rows are
put together, in the main process: no worker holds a weight, so new weights cannot go stale in one.
"""

import math
from collections.abc import Sequence
from typing import Any

from wrinklefree.utils.errors import ConfigError


class Mixture:
    """Tokens served of each source, and the source to serve next."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = _checked(weights, len(weights))
        self._served = [0] * len(self._weights)
        self._balance: list[float] = [0] * len(self._weights)
        """Tokens served since the weights changed, less what a source was owed at that moment."""

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights in force; only their ratios matter."""
        return tuple(self._weights)

    @property
    def served(self) -> tuple[int, ...]:
        """Tokens served of each source so far."""
        return tuple(self._served)

    def next_source(self) -> int:
        """Index of the source that is furthest behind; never one of weight 0."""
        candidates = (index for index, weight in enumerate(self._weights) if weight > 0)
        return min(candidates, key=lambda index: self._balance[index] / self._weights[index])

    def count(self, source: int, tokens: int) -> None:
        """So many tokens of a source were served."""
        self._served[source] += tokens
        self._balance[source] += tokens

    def set_weights(self, weights: Sequence[float]) -> None:
        """Serve by other weights from now on.

        What was served before is not made up for: only the few tokens that a source is owed at this moment under the
        old weights stay owed, and those of a source that is switched off are shared among the others.

        Raises:
            ConfigError: a weight that is negative or not finite, another number of them, or only zeros.
        """
        new = _checked(weights, len(self._weights))
        total, scale = math.fsum(self._balance), math.fsum(self._weights)
        owed = [weight / scale * total - had for weight, had in zip(self._weights, self._balance, strict=True)]
        freed, share = math.fsum(o for o, w in zip(owed, new, strict=True) if w == 0), math.fsum(new)
        self._balance = [-(o + freed * w / share) if w > 0 else 0.0 for o, w in zip(owed, new, strict=True)]
        self._weights = new

    def state_dict(self) -> dict[str, Any]:
        """Weights and counts; JSON."""
        return {"weights": list(self._weights), "served": list(self._served), "balance": list(self._balance)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at `state_dict`."""
        self._weights, self._served = list(state["weights"]), list(state["served"])
        self._balance = list(state["balance"])


def _checked(weights: Sequence[float], count: int) -> list[float]:
    if len(weights) != count:
        raise ConfigError(f"{len(weights)} weights for {count} sources; give each source one")
    wrong = [weight for weight in weights if not (math.isfinite(weight) and weight >= 0)]
    if wrong or not any(weights):
        problem = f"{wrong[0]:g} is negative or not finite" if wrong else "all of them are 0"
        raise ConfigError(f"weights of sources {', '.join(f'{weight:g}' for weight in weights)}: {problem}")
    return list(weights)
