"""The next token out of one row of logits, in numpy: a few tens of microseconds for 49,000 of them.

What a request gets is a function of its logits, its settings and its own random numbers, whoever else is served.
"""

import numpy as np
from numpy.typing import NDArray

from wrinklefree.serving.engine.protocol import Sampling, Token
from wrinklefree.utils.errors import EngineError

_FEW = 512
"""Candidates that are sorted first; only a flat distribution needs more of them for its top p."""


def choose(logits: NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> Token:
    """One token from logits [V]: temperature, then top-k, then top-p, as `models.generate.choose_token`.

    Raises:
        EngineError: a logit is not a number.
    """
    largest = logits.max()
    if not np.isfinite(largest):
        raise EngineError("the model computed a value that is not finite; its weights are damaged or diverged")
    chosen = int(logits.argmax()) if sampling.temperature == 0 else _draw(logits - largest, sampling, random)
    if sampling.logprobs is None:
        return Token(chosen)
    shifted = (logits - largest).astype(np.float64)
    logprobs = shifted - np.log(np.exp(shifted).sum())
    best = _largest(logprobs, sampling.logprobs)
    alternatives = tuple(zip(best.tolist(), logprobs[best].tolist(), strict=True))
    return Token(chosen, float(logprobs[chosen]), alternatives)


def _draw(shifted: NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> int:
    """A token from logits whose largest is 0."""
    shares = np.exp(shifted / np.float32(sampling.temperature), dtype=np.float32)
    order: NDArray[np.intp] | None = None
    if sampling.top_k is not None and sampling.top_k < len(shares):
        order = _largest(shares, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        order = _nucleus(shares, sampling.top_p, order)
    kept = (shares if order is None else shares[order]).astype(np.float64)
    cumulative = kept.cumsum()
    index = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
    index = min(index, len(kept) - 1)
    return index if order is None else int(order[index])


def _nucleus(shares: NDArray[np.float32], top_p: float, order: NDArray[np.intp] | None) -> NDArray[np.intp]:
    """The fewest tokens, largest first, whose part of all (or of `order`) reaches top_p; at least one."""
    total = float(shares.sum(dtype=np.float64) if order is None else shares[order].sum(dtype=np.float64))
    if order is None:
        order = _largest(shares, min(_FEW, len(shares)))
        if shares[order].sum(dtype=np.float64) < top_p * total:
            order = _largest(shares, len(shares))
    before = shares[order].astype(np.float64).cumsum() - shares[order]
    return order[: max(1, int(np.count_nonzero(before < top_p * total)))]


def _largest(values: NDArray[np.floating], count: int) -> NDArray[np.intp]:
    """Places of the `count` largest values, largest first, equal ones by place."""
    if count == 0:
        return np.empty(0, np.intp)
    if count < len(values):
        # All that tie with the last one kept, so that the earliest of them are taken.
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        places = np.flatnonzero(values >= threshold)
    else:
        places = np.arange(len(values))
    return places[np.argsort(-values[places], kind="stable")][:count]
