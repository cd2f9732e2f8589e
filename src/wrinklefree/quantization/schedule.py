"""Warm-ups as pure functions of the step: a resumed run needs no state to continue them."""

import math
from typing import Literal

WarmupShape = Literal["none", "linear", "cosine", "sigmoid"]

STEEPNESS = 6.0
"""The sigmoid shape covers the logistic function from -6 to 6, stretched so that it starts and ends exactly."""


def warmup_value(step: int, *, start: float, steps: int, shape: WarmupShape) -> float:
    """Value used at `step` of a rise from `start` at step 0 to 1 at step `steps`; exactly 1.0 from there on.

    linear: constant slope. cosine: half a cosine period, flat at both ends. sigmoid: a logistic curve, flatter at
    the ends and twice as steep as the cosine in the middle. none: 1 at every step.
    """
    if shape == "none" or step >= steps:
        return 1.0
    progress = step / steps
    if shape == "cosine":
        progress = (1.0 - math.cos(math.pi * progress)) / 2.0
    elif shape == "sigmoid":
        progress = (1.0 + math.tanh(STEEPNESS * (progress - 0.5)) / math.tanh(STEEPNESS / 2.0)) / 2.0
    return start + (1.0 - start) * progress
