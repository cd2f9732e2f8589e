"""What is sent: codes at an eighth of bfloat16, and full precision while lambda is below 1."""

from dataclasses import replace

import torch

from benchmark.gathered_bytes import compare, matrix_bytes
from benchmark.sharded_equality import ARCHITECTURE, Bed, Ranks, build
from wrinklefree.models.bitlinear import BitLinear
from wrinklefree.models.shards import whole
from wrinklefree.quantization.weight_quant import ternarize


def test_ternary_weights_travel_in_two_bits(ranks: Ranks) -> None:
    results = compare(ranks, ARCHITECTURE)
    base = results["bfloat16"]
    # Gathered before the forward and before the backward pass, two bytes each.
    assert matrix_bytes(base) == 2 * 2 * base.matrices
    assert matrix_bytes(results["float32"]) == 2 * matrix_bytes(base)
    assert 8 * matrix_bytes(results["codes"]) == matrix_bytes(base)


def test_gathered_codes_and_scales_are_those_of_the_whole_weight(ranks: Ranks) -> None:
    for codes_equal, scale_error, active_before, active_after in ranks.run(2, compare_codes):
        assert codes_equal
        assert scale_error < 1e-6
        assert (active_before, active_after) == (False, True)


def compare_codes() -> tuple[bool, float, bool, bool]:
    """Of every layer, before and after the end of the warm-up."""
    trainer, refresh = build(Bed(steps=4))
    layers = [module for module in trainer.model.modules() if isinstance(module, BitLinear)]
    trainer.train_step()
    before = any(layer.gathered_scale is not None for layer in layers)
    for layer in layers:
        layer.set_quantization(1.0)
    refresh()
    expected = [ternarize(whole(layer.weight)) for layer in layers]
    trainer.model.unshard()
    for block in trainer.model.blocks:
        block.unshard()
    equal = all(torch.equal(layer.weight.to(torch.int8), e.codes) for layer, e in zip(layers, expected, strict=True))
    scales = [layer.gathered_scale for layer in layers]
    errors = [abs(float(s / e.scale) - 1) for s, e in zip(scales, expected, strict=True) if s is not None]
    return equal, max(errors), before, len(errors) == len(layers)


def test_rows_that_do_not_divide_are_gathered_in_full(ranks: Ranks) -> None:
    odd = ARCHITECTURE.model_copy(update={"intermediate_size": 37})
    assert ranks.run(2, count_coded, odd) == [5 * 3, 5 * 3]


def count_coded(architecture: object) -> int:
    """Layers with a gathered scale; gate and up have 37 rows, down has 37 columns."""
    trainer, _ = build(replace(Bed(steps=2, warmup=False), architecture=architecture))
    trainer.train_step()
    return sum(isinstance(m, BitLinear) and m.gathered_scale is not None for m in trainer.model.modules())
