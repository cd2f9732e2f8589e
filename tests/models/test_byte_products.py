"""Products in bytes, forward and backward: integers against numpy, bounds on errors, every way in which layers run."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

from wrinklefree.models import byte_products
from wrinklefree.models.bitlinear import BitLinear, set_products, set_quantization
from wrinklefree.models.byte_products import (
    LONGEST_INT8_SUM,
    TernaryWeight,
    fits,
    float8_product,
    grad_input,
    grad_weight,
    integer_product,
    output_product,
)
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.quantization import cpu_kernels
from wrinklefree.quantization.activation_quant import ActivationCodes, quantize_activation
from wrinklefree.quantization.options import BackwardProducts
from wrinklefree.quantization.weight_quant import Ternary, ternarize

CUDA = torch.cuda.is_available()
TOKENS, OUT, IN = 1040, 48, 64
"""More tokens than float32 sums exactly, and both types' multiples."""


needs_kernels = pytest.mark.skipif(not cpu_kernels.has_kernels(), reason="needs the C kernels")


def errors_of(mine: Tensor, exact: Tensor) -> float:
    return float((mine - exact).norm() / exact.norm())


def operands(
    tokens: int = TOKENS, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Ternary, ActivationCodes]:
    """A gradient [2, tokens / 2, OUT] of small numbers, a weight and an input."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(2, tokens // 2, OUT, generator=generator) * 1e-6
    x = torch.randn(2, tokens // 2, IN, generator=generator)
    weight = torch.randn(OUT, IN, generator=generator) * 0.02
    return grad.to(device, dtype), ternarize(weight.to(device)), quantize_activation(x.to(device))


def for_products(weight: Ternary, dtype: torch.dtype, *, packed: bool = False) -> TernaryWeight:
    values = cpu_kernels.pack_ternary(weight.codes) if packed else weight.codes.to(dtype)
    return TernaryWeight(values, weight.scale, (weight.codes.shape[0], weight.codes.shape[1]), dtype)


def both(kind: BackwardProducts, **how: Any) -> tuple[Tensor, Tensor]:
    grad, weight, x = operands(**how)
    of_x = grad_input(grad, for_products(weight, grad.dtype), dtype=torch.float32, kind=kind)
    return of_x, grad_weight(grad, x.codes, x.scale, dtype=torch.float32, kind=kind)


def rounded_by_numpy(rows: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(int64 codes, float32 scales) of float32 rows."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    return np.rint(rows * np.float32(127) / largest).astype(np.int64), largest / np.float32(127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_equals_numpy_integers_bit_for_bit(dtype: torch.dtype) -> None:
    grad, weight, x = operands(dtype=dtype)
    rows = grad.float().numpy().reshape(TOKENS, OUT)
    codes, scales = rounded_by_numpy(rows)
    integers = codes @ weight.codes.numpy().astype(np.int64)
    expected_x = integers.astype(np.float32) * (scales * weight.scale.numpy())

    columns = (rows * x.scale.numpy().reshape(TOKENS, 1)).T
    codes, scales = rounded_by_numpy(columns)
    integers = codes @ x.codes.numpy().reshape(TOKENS, IN).astype(np.int64)
    expected_weight = integers.astype(np.float32) * scales

    of_x, of_weight = both("int8", dtype=dtype)
    assert of_x.shape == (2, TOKENS // 2, IN)
    assert np.array_equal(of_x.numpy().reshape(TOKENS, IN), expected_x)
    assert np.array_equal(of_weight.numpy(), expected_weight)


@pytest.mark.parametrize("multiplies_int8", [False, True])
@pytest.mark.parametrize("summed", [8, 1024, 1032, 2056])
def test_both_ways_of_a_cpu_make_the_same_integers(
    monkeypatch: pytest.MonkeyPatch, multiplies_int8: bool, summed: int
) -> None:
    monkeypatch.setattr(byte_products, "CPU_MULTIPLIES_INT8", multiplies_int8)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-127, 128, (n, summed), generator=generator).to(torch.int8) for n in (17, 24))
    left[0], right[0], right[1] = 127, 127, -128  # the largest sums of all
    exact = left.to(torch.int64) @ right.to(torch.int64).T
    assert torch.equal(integer_product(left, right).to(torch.int64), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(integer_product(left, right).to(torch.int64), exact)


def test_the_longest_sum_fits_an_int32() -> None:
    assert LONGEST_INT8_SUM * 127 * 128 < 2**31 <= (LONGEST_INT8_SUM + 1) * 127 * 128
    assert byte_products.EXACT_IN_FLOAT32 * 127 * 128 < 2**24


@pytest.mark.parametrize("tokens", [TOKENS, 14])
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_kernels)])
def test_int8_forward_products_are_exact(tokens: int, packed: bool) -> None:
    _, weight, x = operands(tokens)
    how: Any = {"x_codes": x.codes, "x_scale": x.scale, "overwrite": True}
    sums = x.codes.numpy().astype(np.int64) @ weight.codes.numpy().astype(np.int64).T
    expected = sums.astype(np.float32) * (x.scale * weight.scale).numpy()
    exact = for_products(weight, torch.float32, packed=packed)
    for kind in ("auto", "int8", "float"):
        assert np.array_equal(output_product(weight=exact, kind=kind, **how).numpy(), expected)
    narrow = for_products(weight, torch.bfloat16, packed=packed)
    rounded_once = torch.from_numpy(expected).to(torch.bfloat16)
    once, twice, auto = (output_product(weight=narrow, kind=kind, **how) for kind in ("int8", "float", "auto"))
    assert torch.equal(once, rounded_once) == (tokens == TOKENS), "14 tokens do not fit"
    assert not torch.equal(twice, rounded_once), "bfloat16 rounds the sum before the scale"
    assert torch.equal(auto, rounded_once if packed else twice)
    assert errors_of(twice.float(), rounded_once.float()) < 4e-3


def test_float8_multiplies_what_the_types_hold() -> None:
    grad, weight, x = operands()
    rows = grad.reshape(TOKENS, OUT)
    scale = rows.abs().amax(1, keepdim=True) / 57344
    rounded = (rows / scale).to(torch.float8_e5m2).double() * scale
    of_x, of_weight = both("fp8")
    expected = (rounded @ weight.codes.double()) * weight.scale.double()
    torch.testing.assert_close(
        of_x.reshape(TOKENS, IN).double(), expected, rtol=1e-4, atol=1e-4 * float(expected.max())
    )

    columns = (rows * x.scale.reshape(TOKENS, 1)).T
    scale = columns.abs().amax(1, keepdim=True) / 57344
    rounded = (columns / scale).to(torch.float8_e5m2).double() * scale
    expected = rounded @ x.codes.to(torch.float8_e4m3fn).double().reshape(TOKENS, IN)
    torch.testing.assert_close(of_weight.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


def test_which_codes_e4m3_holds() -> None:
    codes = torch.arange(-128, 128)
    kept = codes[codes.to(torch.float8_e4m3fn).float() == codes]
    assert set(range(-16, 17)) <= set(kept.tolist()), "ternary weights and 4-bit activations are exact"
    assert 17 not in kept.tolist()
    relative = (codes.to(torch.float8_e4m3fn).float() - codes).abs() / codes.abs().clamp(min=1)
    assert float(relative.max()) == pytest.approx(1 / 17)


@pytest.mark.parametrize(("kind", "least", "most"), [("int8", 2e-3, 2e-2), ("fp8", 3e-2, 8e-2)])
def test_errors_of_random_gradients(kind: BackwardProducts, least: float, most: float) -> None:
    for mine, exact in zip(both(kind), both("exact"), strict=True):
        assert least < errors_of(mine, exact) < most


@needs_kernels
@pytest.mark.parametrize("kind", ["exact", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_gives_the_same_gradient(kind: BackwardProducts, dtype: torch.dtype) -> None:
    grad, weight, _ = operands(dtype=dtype)
    dense, packed = (
        grad_input(grad, for_products(weight, dtype, packed=packed), dtype=torch.float32, kind=kind)
        for packed in (False, True)
    )
    if (kind, dtype) == ("exact", torch.float32):
        assert errors_of(packed, dense) < 1e-6, "the scale is inside the sums"
    else:
        assert torch.equal(packed, dense)


def test_exact_rounds_nothing_but_the_input() -> None:
    grad, weight, x = operands(dtype=torch.bfloat16)
    codes = weight.codes.to(torch.bfloat16)
    of_x, of_weight = both("exact", dtype=torch.bfloat16)
    assert torch.equal(of_x, (grad @ codes).float().mul_(weight.scale))
    inputs = (x.codes.float() * x.scale).to(torch.bfloat16).flatten(0, -2)
    assert torch.equal(of_weight, (grad.flatten(0, -2).T @ inputs).float())


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("exact", (64, 64, 64), False),
        ("int8", (17, 8, 8), True),
        ("int8", (16, 8, 8), False),
        ("int8", (17, 12, 8), False),
        ("int8", (17, 8, 12), False),
        ("int8", (17, 0, 8), False),
        ("int8", (17, 132_096, 8), True),
        ("int8", (17, 132_104, 8), True),
        ("int8", (17, 132_112, 8), False),
        ("fp8", (1, 16, 16), True),
        ("fp8", (17, 8, 16), False),
        ("fp8", (17, 16, 8), False),
        ("fp8", (0, 16, 16), False),
        ("fp8", (17, 132_112, 16), True),
    ],
)
def test_what_fits(kind: BackwardProducts, shape: tuple[int, int, int], expected: bool) -> None:
    assert fits(kind, *shape) is expected


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_what_does_not_fit_is_exact(kind: BackwardProducts) -> None:
    # 14 tokens: too few rows for an int8 dX, and no multiple for either dW; float8 takes any number of rows.
    for index, (mine, exact) in enumerate(zip(both(kind, tokens=14), both("exact", tokens=14), strict=True)):
        assert torch.equal(mine, exact) == (kind == "int8" or index == 1)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_inputs_that_are_not_quantized_leave_the_weights_gradient_exact(kind: BackwardProducts) -> None:
    grad, _, x = operands()
    values = x.dequantize()
    exact = grad_weight(grad, values, None, dtype=torch.float32)
    assert torch.equal(grad_weight(grad, values, None, dtype=torch.float32, kind=kind), exact)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_gradient_that_is_not_finite_stays_so(kind: BackwardProducts) -> None:
    grad, weight, x = operands()
    grad[0, 5, 7] = torch.inf
    of_x = grad_input(grad, for_products(weight, grad.dtype), dtype=torch.float32, kind=kind)
    of_weight = grad_weight(grad, x.codes, x.scale, dtype=torch.float32, kind=kind)
    assert not of_x[0, 5].isfinite().any()
    assert of_x[1].isfinite().all()
    assert not of_weight[7].isfinite().any()
    assert of_weight[8].isfinite().all()


# A layer, and a model.


@pytest.mark.parametrize("bits", [8, 4, None])
def test_a_layer_with_int8_forward_products_is_the_same_layer(bits: Any) -> None:
    layer, x = make_layer(bits)
    exact = layer_gradients(layer, layer, x)
    set_products(layer, "int8", "exact")
    for mine, theirs in zip(layer_gradients(layer, layer, x), exact, strict=True):
        assert torch.equal(mine, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def layer_gradients(layer: BitLinear, call: Any, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    output = call(leaf)
    slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output.device)
    (output.float() * slope).sum().backward()
    assert leaf.grad is not None
    return [output.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


def make_layer(bits: Any = 8) -> tuple[BitLinear, Tensor]:
    torch.manual_seed(0)
    return BitLinear(IN, OUT, activation_bits=bits), torch.randn(2, 24, IN)


@pytest.mark.parametrize("bits", [8, 4, None])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_layer_changes_nothing_but_the_two_products(bits: Any, kind: BackwardProducts) -> None:
    layer, x = make_layer(bits)
    exact = layer_gradients(layer, layer, x)
    set_products(layer, "auto", kind)
    output, of_x, of_weight, of_bias = layer_gradients(layer, layer, x)
    assert torch.equal(output, exact[0])
    assert torch.equal(of_bias, exact[3])
    assert 1e-3 < errors_of(of_x, exact[1]) < 0.1
    if bits is None:
        assert torch.equal(of_weight, exact[2])
    else:
        assert 1e-3 < errors_of(of_weight, exact[2]) < 0.1
    set_products(layer, "auto", "exact")
    for mine, theirs in zip(layer_gradients(layer, layer, x), exact, strict=True):
        assert torch.equal(mine, theirs)


def test_below_lambda_one_the_option_does_nothing() -> None:
    layer, x = make_layer()
    set_quantization(layer, 0.5)
    exact = layer_gradients(layer, layer, x)
    set_products(layer, "float", "int8")
    for mine, theirs in zip(layer_gradients(layer, layer, x), exact, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_gathered_weight_multiplies_like_a_whole_one(kind: BackwardProducts) -> None:
    layer, x = make_layer()
    set_products(layer, "float", kind)
    expected = layer_gradients(layer, layer, x)
    ternary = layer.ternary()
    gathered, _ = make_layer()
    gathered.bias = layer.bias
    set_products(gathered, "float", kind)
    with torch.no_grad():
        gathered.weight.copy_(ternary.codes)
    gathered.gathered_scale = ternary.scale
    for mine, theirs in zip(layer_gradients(gathered, gathered, x), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture
def clean_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", ["exact", "int8", "fp8"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_layer_is_one_graph(kind: BackwardProducts, backend: str) -> None:
    layer, x = make_layer()
    set_products(layer, "float" if kind == "exact" else "int8", kind)
    plain = layer_gradients(layer, layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for mine, theirs in zip(layer_gradients(layer, compiled, x), plain, strict=True):
        # Fused arithmetic moves a value over a rounding threshold now and then.
        assert errors_of(mine, theirs) < (1e-6 if backend == "aot_eager" else 1e-2)


ARCHITECTURE = Architecture(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


def make_model(kind: BackwardProducts) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(ARCHITECTURE, BitNetSpec(placement="output", gain="ones", quantization_lambda=1.0)).train()
    set_products(model, "float", kind)
    return model


def model_gradients(model: CausalLM) -> list[Tensor]:
    ids = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(1))
    output = model(Batch(ids, ids.roll(-1, 1), torch.arange(32).expand(2, 32), torch.ones_like(ids)))
    logits = functional.linear(output.hidden, output.head_weight)
    functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputed_blocks_have_the_same_gradients(kind: BackwardProducts, checkpointing: Any) -> None:
    recomputing = make_model(kind)
    recomputing.activation_checkpointing = checkpointing
    kept, exact = model_gradients(make_model(kind)), model_gradients(make_model("exact"))
    for mine, theirs, exactly in zip(model_gradients(recomputing), kept, exact, strict=True):
        assert torch.equal(mine, theirs)
        assert errors_of(mine, exactly) < 0.2
    assert not torch.equal(kept[1], exact[1])


@pytest.mark.usefixtures("clean_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_compiled_blocks_stay_one_graph(kind: BackwardProducts) -> None:
    model, counter = make_model(kind), CompileCounterWithBackend("aot_eager")
    compiler: Any = counter
    model.compile_blocks(2, 32, gradients=True, compiler=compiler)
    for mine, theirs in zip(model_gradients(model), model_gradients(make_model(kind)), strict=True):
        assert errors_of(mine, theirs) < 1e-2
    assert counter.frame_count == 1


# What only a GPU can show.


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability() < (7, 5), reason="needs a GPU with int8 products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_makes_the_same_integers(dtype: torch.dtype) -> None:
    # Between equal integers lie one division and two multiplications, in which devices may differ by a bit.
    for mine, theirs in zip(both("int8", device="cuda", dtype=dtype), both("int8", dtype=dtype), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability() < (7, 5), reason="needs a GPU with int8 products")
@pytest.mark.parametrize(("rows", "summed", "columns"), [(17, 8, 8), (1024, 576, 1536), (1536, 1024, 576)])
def test_integer_products_of_a_gpu_are_exact(rows: int, summed: int, columns: int) -> None:
    left, right = (torch.randint(-127, 128, (n, summed)).to(torch.int8) for n in (rows, columns))
    assert torch.equal(integer_product(left.cuda(), right.cuda()).cpu(), integer_product(left, right))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with float8 products")
@pytest.mark.parametrize(("rows", "summed", "columns"), [(1, 16, 16), (1024, 576, 1536), (1536, 1024, 576)])
def test_float8_products_of_a_gpu_are_those_of_the_emulation(rows: int, summed: int, columns: int) -> None:
    left = (torch.randn(rows, summed) * 1000).to(torch.float8_e5m2)
    right = torch.randint(-127, 128, (columns, summed)).float().to(torch.float8_e4m3fn)
    expected = float8_product(left, right)
    # Tensor cores sum with fewer bits than float32 has.
    assert errors_of(float8_product(left.cuda(), right.cuda()).cpu(), expected) < 2e-3


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability() < (7, 5), reason="needs a GPU with int8 products")
def test_a_gpus_int8_forward_pass_is_the_cpus() -> None:
    layer, x = make_layer()
    set_products(layer, "int8", "exact")
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with float8 products")
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_nothing_waits_for_the_gpu(kind: BackwardProducts) -> None:
    grad, weight, x = operands(device="cuda", dtype=torch.bfloat16)
    ternary = for_products(weight, grad.dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        grad_input(grad, ternary, dtype=torch.bfloat16, kind=kind)
        grad_weight(grad, x.codes, x.scale, dtype=torch.float32, kind=kind)
    finally:
        torch.cuda.set_sync_debug_mode("default")
