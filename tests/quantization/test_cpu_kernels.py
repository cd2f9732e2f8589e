"""The C kernels as operators: every bit of the readable functions, any shape and number of threads, compiled graphs."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from wrinklefree.native import runner
from wrinklefree.native.pack import pack_ternary
from wrinklefree.quantization import cpu_kernels
from wrinklefree.quantization.activation_quant import ActivationCodes, quantize_activation
from wrinklefree.quantization.weight_quant import ternarize
from wrinklefree.utils.errors import EngineError

pytestmark = pytest.mark.skipif(not cpu_kernels.has_kernels(), reason="needs the C kernels")

SHAPES = [(1, 1), (3, 7), (17, 4), (49, 12), (64, 64), (65, 130), (192, 576)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the readable code."""

    def run(function: Any, *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(cpu_kernels, "takes", lambda x, dtype: False)
            return function(*arguments)

    return run


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 7), (3, 64), (40, 1003)])
def test_activations(shape: tuple[int, ...], dtype: torch.dtype, bits: int, without: Any) -> None:
    x = random(*shape).to(dtype)
    x[0] = 0
    found = quantize_activation(x, bits)
    expected: ActivationCodes = without(quantize_activation, x, bits)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    for out in DTYPES:
        assert torch.equal(found.dequantize(out), without(expected.dequantize, out))


def test_ties_of_activations_go_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 126.5]])
    assert quantize_activation(x).codes.tolist() == [[127, 0, 2, -2, 126]]


def test_tensors_that_are_not_contiguous() -> None:
    x = random(40, 6).T
    weight = ternarize(random(12, 70).T)
    assert not x.is_contiguous()
    assert torch.equal(quantize_activation(x).codes, quantize_activation(x.contiguous()).codes)
    assert torch.equal(weight.codes, ternarize(random(12, 70).T.contiguous()).codes)
    assert torch.equal(cpu_kernels.pack_ternary(weight.codes.T), cpu_kernels.pack_ternary(weight.codes.T.contiguous()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    x, weight = random(3, 8), ternarize(random(5, 8))
    x[1, 2] = value
    encoded = quantize_activation(x)
    tiles = cpu_kernels.pack_ternary(weight.codes)
    product = cpu_kernels.ternary_product(encoded.codes, encoded.scale, tiles, weight.scale, 5, torch.float32)
    assert not product[1].isfinite().any()
    assert product[[0, 2]].isfinite().all()
    assert not encoded.dequantize()[1].isfinite().any()
    broken = random(4, 8)
    broken[0, 0] = value
    assert not ternarize(broken).scale.isfinite()


@pytest.mark.parametrize("shape", SHAPES)
def test_weights(shape: tuple[int, int], threads: int, without: Any) -> None:
    weight = random(*shape)
    scale = weight.abs().mean()
    weight.view(-1)[0] = 0.5 * scale  # a tie, to even
    weight.view(-1)[-1] = -1e30
    codes = ternarize(weight, scale).codes
    assert torch.equal(codes, without(ternarize, weight, scale).codes)
    assert weight.numel() == 1 or (codes.view(-1)[0], codes.view(-1)[-1]) == (0, -1)
    tiles = cpu_kernels.pack_ternary(codes)
    assert torch.equal(tiles, torch.from_numpy(pack_ternary(codes.numpy())))
    for dtype in DTYPES:
        assert torch.equal(cpu_kernels.unpack_ternary(tiles, shape, None, dtype), codes.to(dtype))
        assert torch.equal(cpu_kernels.unpack_ternary(tiles, shape, scale, dtype), (codes * scale).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 6, 300])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_exact_integers_and_round_once(
    shape: tuple[int, int], tokens: int, dtype: torch.dtype, threads: int
) -> None:
    weight, x = ternarize(random(*shape)), quantize_activation(random(2, tokens, shape[1], seed=1))
    tiles = cpu_kernels.pack_ternary(weight.codes)
    found = cpu_kernels.ternary_product(x.codes, x.scale, tiles, weight.scale, shape[0], dtype)
    sums = (x.codes.double() @ weight.codes.double().T).float()
    assert torch.equal(found, (sums * (x.scale * weight.scale)).to(dtype))


def test_the_largest_sums_are_exact() -> None:
    columns = cpu_kernels.WIDEST
    tiles = cpu_kernels.pack_ternary(torch.ones(1, columns, dtype=torch.int8))
    codes = torch.full((1, columns), -127, dtype=torch.int8)
    one = torch.ones(())
    found = cpu_kernels.ternary_product(codes, one.reshape(1, 1), tiles, one, 1, torch.float32)
    assert found.item() == -127 * columns


def test_threads_of_its_own_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    x, weight = quantize_activation(random(700, 576)), ternarize(random(192, 576))
    tiles = cpu_kernels.pack_ternary(weight.codes)

    def product() -> Tensor:
        monkeypatch.setattr(runner, "_runners", {})
        return cpu_kernels.ternary_product(x.codes, x.scale, tiles, weight.scale, 192, torch.float32)

    torch.set_num_threads(1)
    alone = product()
    torch.set_num_threads(2)
    lent = product()
    monkeypatch.setattr(runner, "openmp_parallel", lambda: None)
    own = product()
    torch.set_num_threads(before)
    assert torch.equal(alone, lent)
    assert torch.equal(alone, own)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PyTorch's wheels for Linux bring OpenMP's library")
def test_openmp_lends_its_threads() -> None:
    assert runner.openmp_parallel()


def test_wrong_tiles_are_refused() -> None:
    x, tiles = quantize_activation(random(3, 64)), cpu_kernels.pack_ternary(torch.zeros(64, 128, dtype=torch.int8))
    with pytest.raises(EngineError, match=r"tiles of shape \(1, 32, 64\) are not a weight of 64 x 64"):
        cpu_kernels.ternary_product(x.codes, x.scale, tiles, torch.ones(()), 64, torch.float32)
    with pytest.raises(EngineError, match=r"not a weight of 200 x 128"):
        cpu_kernels.unpack_ternary(tiles, (200, 128), None, torch.float32)


def test_no_tokens() -> None:
    tiles = cpu_kernels.pack_ternary(torch.zeros(5, 8, dtype=torch.int8))
    nothing = torch.zeros(0, 8, dtype=torch.int8)
    found = cpu_kernels.ternary_product(nothing, torch.zeros(0, 1), tiles, torch.ones(()), 5, torch.bfloat16)
    assert found.shape == (0, 5)


def test_operators_tell_their_shapes() -> None:
    x, weight = random(2, 5, 12), random(70, 12)
    codes, scale = cpu_kernels.encode_activation(x, 8)
    ternary = cpu_kernels.ternarize(weight, weight.abs().mean())
    tiles, one = cpu_kernels.pack_ternary(ternary), torch.ones(())
    calls: dict[str, tuple[Any, ...]] = {
        "encode_activation": (x, 8),
        "decode_activation": (codes, scale, torch.bfloat16),
        "ternarize": (weight, one),
        "pack_ternary": (ternary,),
        "unpack_ternary": (tiles, 70, 12, one, torch.float32),
        "ternary_product": (codes, scale, tiles, one, 70, torch.bfloat16),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.wrinklefree, name).default, arguments)


def test_plain_c_is_no_gain() -> None:
    program = (
        "import torch; from wrinklefree.quantization import cpu_kernels as k;"
        "print(k.has_kernels(), k.multiplies_faster(torch.float32), k.multiplies_faster(torch.float64))"
    )
    for isa, expected in (("plain", "False False False"), (None, "True True False")):
        environment = {**os.environ, **({"WRINKLEFREE_ENGINE_ISA": isa} if isa else {})}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
        )
        assert done.stdout.strip() == expected
