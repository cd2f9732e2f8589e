"""Learning rate and weight decay as pure functions of the step, so that a resumed run needs no scheduler state.

Steps count from 0 and a run of `total_steps` updates ends with step `total_steps - 1`. Every decaying shape reaches its
final rate, `min_ratio * peak`, exactly there, however short the run is.
"""

import math

from wrinklefree.training.config import ScheduleConfig
from wrinklefree.utils.errors import ConfigError

TWO_STAGE_DROP = 2 / 3
"""Factor on the rate in the second half of `two_stage`: 1.5e-3 -> 1e-3 and 1.2e-3 -> 8e-4 in the BitNet b1.58 FAQ."""


def warmup_steps(total_steps: int, config: ScheduleConfig) -> int:
    """Number of warm-up steps of a run.

    Raises:
        ConfigError: `warmup_steps` is longer than the run.
    """
    if config.warmup_steps is None:
        # A share is below 1, so at least the last step is left to the decay.
        return min(round(config.warmup_share * total_steps), total_steps - 1)
    if config.warmup_steps > total_steps:
        raise ConfigError(
            f"training.schedule.warmup_steps is {config.warmup_steps}, but the run has only {total_steps} steps: the "
            "rate would never reach its peak; lower warmup_steps, or leave it out and use warmup_share"
        )
    return config.warmup_steps


def learning_rate(step: int, total_steps: int, config: ScheduleConfig, peak: float) -> float:
    """Learning rate of one update.

    The warm-up rises linearly and its last step is at the peak; without a warm-up step 0 is at the peak. `two_stage` is
    the schedule of the BitNet b1.58 FAQ: a linear decay that is cut to 2/3 at half-way. A run of a single step trains
    at the peak, since at its end rate it might not train at all.

    Args:
        step: Index of the update, from 0.
        total_steps: Updates of the whole run.
        config: Shape.
        peak: `training.lr`.

    Raises:
        ConfigError: The warm-up is longer than the run.
    """
    _check(step, total_steps)
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        return peak * (step + 1) / warmup
    at_peak = max(warmup - 1, 0)
    last = total_steps - 1
    if last == at_peak:
        return peak
    progress = (step - at_peak) / (last - at_peak)
    match config.type:
        case "constant":
            return peak
        case "cosine":
            height = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            height = 1 - progress
        case "wsd":
            decay = min(max(round(config.decay_share * total_steps), 1), last - at_peak)
            height = min((last - step) / decay, 1.0)
        case "two_stage":
            height = (1 - progress) * (TWO_STAGE_DROP if _in_second_half(step, total_steps) else 1)
    return peak * (config.min_ratio + (1 - config.min_ratio) * height)


def weight_decay(step: int, total_steps: int, config: ScheduleConfig, base: float) -> float:
    """Weight decay of one update: `base`, or 0 in the second half of `two_stage` (BitNet b1.58 FAQ)."""
    _check(step, total_steps)
    return 0.0 if config.type == "two_stage" and _in_second_half(step, total_steps) else base


def _in_second_half(step: int, total_steps: int) -> bool:
    return 2 * step >= total_steps


def _check(step: int, total_steps: int) -> None:
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside a run of {total_steps} steps")
