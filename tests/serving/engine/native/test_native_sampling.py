"""Choosing tokens: frequencies against the closed form, truncation against a full sort."""

import numpy as np
import pytest
from numpy.typing import NDArray

from wrinklefree.serving.engine.native.sampling import choose
from wrinklefree.serving.engine.protocol import Sampling
from wrinklefree.utils.errors import EngineError

SHARES = [0.5, 0.3, 0.15, 0.05]


def frequencies(logits: NDArray[np.float32], **settings: float) -> list[float]:
    random = np.random.default_rng(0)
    sampling = Sampling(1, **settings)  # type: ignore[arg-type]
    drawn = [choose(logits, sampling, random).id for _ in range(6000)]
    return (np.bincount(drawn, minlength=len(logits)) / len(drawn)).tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, SHARES),
        ({"temperature": 0.5}, [share**2 / sum(s**2 for s in SHARES) for share in SHARES]),
        ({"temperature": 1.0, "top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_k": 4}, SHARES),
        ({"temperature": 1.0, "top_k": 9}, SHARES),
        ({"temperature": 1.0, "top_p": 0.9}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"temperature": 1.0, "top_p": 1.0}, SHARES),
        ({"temperature": 1.0, "top_p": 0.01}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.6}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1e-6}, [1, 0, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
    ],
)
def test_frequencies(settings: dict[str, float], expected: list[float]) -> None:
    order = [2, 0, 3, 1]
    logits = np.log(np.array(SHARES, np.float32))[order] + np.float32(17)
    found = frequencies(logits, **settings)
    assert found == pytest.approx([expected[index] for index in order], abs=0.025)


def kept_by(logits: NDArray[np.float32], top_k: int | None, top_p: float | None) -> list[int]:
    """The tokens that may be drawn, from a full sort in float64."""
    order = np.argsort(-logits.astype(np.float64), kind="stable")[:top_k]
    shares = np.exp(logits[order].astype(np.float64))
    before = (shares.cumsum() - shares) / shares.sum()
    return order.tolist() if top_p is None else order[before < top_p].tolist()


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.9), (None, 0.05), (50, None), (50, 0.5), (2000, 0.97)])
def test_truncation_keeps_what_a_full_sort_keeps(spread: float, top_k: int | None, top_p: float | None) -> None:
    logits = (np.random.default_rng(1).standard_normal(3000) * spread).astype(np.float32)
    random = np.random.default_rng(2)
    drawn = [choose(logits, Sampling(1, top_k=top_k, top_p=top_p), random).id for _ in range(1000)]
    kept = kept_by(logits, top_k, top_p)
    assert set(drawn) <= set(kept)
    # Each kept token comes as often as its share says: a sum over tokens, to four standard errors.
    shares = np.exp(logits[kept].astype(np.float64) - logits.max())
    shares /= shares.sum()
    values = np.cos(np.arange(len(kept)))
    place = dict(zip(kept, values, strict=True))
    mean, variance = float(shares @ values), float(shares @ values**2 - (shares @ values) ** 2)
    assert abs(np.mean([place[token] for token in drawn]) - mean) <= 4 * (variance / 1000) ** 0.5 + 1e-9


def test_equal_logits_go_to_the_earliest() -> None:
    logits = np.zeros(2000, np.float32)
    random = np.random.default_rng(0)
    assert choose(logits, Sampling(1, temperature=0), random).id == 0
    assert {choose(logits, Sampling(1, top_k=3), random).id for _ in range(200)} == {0, 1, 2}


def test_logprobs_are_before_temperature_and_truncation() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32)) * 1
    random = np.random.default_rng(0)
    token = choose(logits, Sampling(1, temperature=0, logprobs=2), random)
    assert (token.id, token.logprob) == (1, pytest.approx(np.log(0.6), abs=1e-6))
    assert token.alternatives == ((1, pytest.approx(np.log(0.6), abs=1e-6)), (2, pytest.approx(np.log(0.3), abs=1e-6)))
    token = choose(logits, Sampling(1, temperature=3.0, top_k=1, logprobs=0), random)
    assert (token.logprob, token.alternatives) == (pytest.approx(np.log(0.6), abs=1e-6), ())
    assert choose(logits, Sampling(1), random).logprob is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(EngineError, match="not finite"):
        choose(np.array([0, bad, 1], np.float32), Sampling(1), np.random.default_rng(0))


def test_a_logit_of_minus_infinity_is_never_drawn() -> None:
    logits = np.array([0, -np.inf, 0], np.float32)
    assert frequencies(logits, temperature=1.0) == pytest.approx([0.5, 0, 0.5], abs=0.025)
