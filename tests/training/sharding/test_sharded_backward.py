"""Cheaper backward products where the weights are gathered as codes: near the exact run, and the same on every rank."""

import pytest

from benchmark.sharded_equality import ARCHITECTURE, Bed, Ranks, build
from wrinklefree.models.bitlinear import set_products
from wrinklefree.quantization.options import BackwardProducts

FITTING = ARCHITECTURE.model_copy(update={"hidden_size": 32, "intermediate_size": 64, "head_dim": 8})
"""Sizes that int8 and float8 products take; a rank has 48 tokens."""


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_sharded_losses_stay_near_those_of_exact_products(ranks: Ranks, kind: BackwardProducts) -> None:
    [exact, _] = ranks.run(2, losses, "exact")
    [mine, other] = ranks.run(2, losses, kind)
    [alone] = ranks.run(1, losses, kind)
    assert mine == other
    assert mine != exact
    for cheap in (mine, alone):
        assert cheap == pytest.approx(exact, abs=0.05)


def losses(kind: BackwardProducts) -> list[float]:
    """Of four steps, fully quantized."""
    trainer, refresh = build(Bed(steps=4, warmup=False, architecture=FITTING))
    set_products(trainer.model, "float", kind)
    refresh()
    return [trainer.train_step().loss for _ in range(4)]
