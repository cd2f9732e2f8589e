"""BitLinear: the fused path against the readable one, gradients, and a cache of codes that is never stale."""

import copy
import io
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from wrinklefree.models.bitlinear import BitLinear, project, quantization_of, set_quantization
from wrinklefree.quantization.weight_quant import ternarize


def make_layer(
    in_features: int = 32, out_features: int = 24, *, bias: bool = True, bits: Any = 8, seed: int = 0
) -> BitLinear:
    torch.manual_seed(seed)
    return BitLinear(in_features, out_features, bias, bits)


def make_input(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(layer: BitLinear, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output and gradients of x, weight and bias for a fixed random slope."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    output = call(leaf)
    (output.float() * make_input(*output.shape, seed=7)).sum().backward()
    grads = [leaf.grad, layer.weight.grad, *([] if layer.bias is None else [layer.bias.grad])]
    return [output.detach(), *(cast("Tensor", grad).clone() for grad in grads)]


def test_hand_computed_output() -> None:
    layer = BitLinear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -3.0], [0.5, 3.5]]))  # scale 2, codes [[0, -1], [0, 1]]
    output = layer(torch.tensor([[127.0, 10.4]]))  # codes [127, 10], scale 1
    assert output.tolist() == [[-20.0, 20.0]]


@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_path_equals_the_reference_in_float32(bits: int | None, bias: bool) -> None:
    layer = make_layer(bias=bias, bits=bits)
    x = make_input(3, 5, 32)
    fused, reference = gradients(layer, layer, x), gradients(layer, layer.reference_forward, x)
    for mine, theirs in zip(fused, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)
    assert fused[2].dtype == torch.float32


@pytest.mark.parametrize(
    "options", [{"scale_rule": "median"}, {"scale_rule": "learned"}, {"dead_zone_bias": 0.1}], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
def test_fused_path_equals_the_reference_with_every_option(options: dict[str, Any], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = BitLinear(32, 24, bias, **options), make_input(3, 5, 32)
    plain = make_layer(bias=bias)
    plain.weight.data.copy_(layer.weight)
    assert not torch.equal(layer(x), plain(x)) or options["scale_rule"] == "learned"
    if layer.scale_gain is not None:
        with torch.no_grad():
            layer.scale_gain.fill_(1.2)
        assert not torch.equal(layer(x), plain(x))
    found: list[list[Tensor]] = []
    for call in (layer, layer.reference_forward):
        values = gradients(layer, call, x)
        found.append([*values, *([] if layer.scale_gain is None else [cast("Tensor", layer.scale_gain.grad).clone()])])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=5e-6, atol=5e-6)


def test_the_dead_zone_adds_its_sum_and_gives_it_a_gradient() -> None:
    layer = BitLinear(3, 2, dead_zone_bias=0.5)
    with torch.no_grad():
        # Scale 1, codes [[1, 0, 0], [-1, 0, 1]].
        layer.weight.copy_(torch.tensor([[2.0, 0.4, -0.2], [-2.0, -0.4, 1.0]]))
        cast("Tensor", layer.bias).copy_(torch.tensor([10.0, 20.0]))
    folded = layer.folded_bias()
    assert folded is not None
    torch.testing.assert_close(folded, torch.tensor([10.1, 19.8]))
    x = torch.tensor([[127.0, 0.0, 0.0]])
    torch.testing.assert_close(layer(x), torch.tensor([[127 + 10.1, -127 + 19.8]]))
    layer(x).sum().backward()
    # The product's gradient is the input; weights of code 0 get half of the output's on top.
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[127.0, 0.5, 0.5], [127.0, 0.5, 0.0]]


def test_a_changed_gain_gets_new_codes() -> None:
    torch.manual_seed(0)
    layer, x = BitLinear(32, 24, scale_rule="learned"), make_input(3, 32)
    before = layer(x)
    with torch.no_grad():
        cast("Tensor", layer.scale_gain).mul_(2)
    torch.testing.assert_close(layer(x), layer.reference_forward(x), rtol=5e-6, atol=5e-6)
    assert not torch.allclose(layer(x), before)


@pytest.mark.parametrize("bits", [4, 8, None])
def test_fused_path_is_as_close_to_float32_as_the_reference_in_bfloat16(bits: int | None) -> None:
    layer = make_layer(128, 64, bits=bits)
    x = make_input(4, 16, 128)
    exact = gradients(layer, layer.reference_forward, x)

    def autocast(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(value: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return call(value)

        return run

    fused = gradients(layer, autocast(layer), x)
    reference = gradients(layer, autocast(layer.reference_forward), x)
    assert fused[0].dtype == torch.bfloat16
    assert fused[2].dtype == torch.float32
    for value, mine, theirs in zip(exact, fused, reference, strict=True):
        error = ((mine - value).norm() / value.norm()).item()
        assert error < 6e-3
        assert error < 2 * ((theirs - value).norm() / value.norm()).item() + 1e-4


def test_gradient_of_the_weight_is_that_of_the_dequantized_weight() -> None:
    layer = make_layer(bias=False, bits=None)
    x = make_input(6, 32)
    weight = ternarize(layer.weight).dequantize().requires_grad_()
    slope = make_input(6, 24, seed=3)
    ((x @ weight.T) * slope).sum().backward()
    (layer(x) * slope).sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)


def test_codes_are_bit_equal_to_ternarize_in_every_compute_dtype() -> None:
    layer = make_layer(256, 256)
    expected = ternarize(layer.weight)
    for dtype in (torch.float32, torch.bfloat16):
        codes, scale = layer.weight_codes(dtype)
        assert codes.dtype == dtype
        assert torch.equal(codes.to(torch.int8), expected.codes)
        assert torch.equal(scale, expected.scale)


@pytest.mark.parametrize("value", [0.0, 0.37])
def test_below_one_the_layer_mixes_full_precision_and_codes(value: float) -> None:
    layer = make_layer()
    set_quantization(layer, value)
    x = make_input(5, 32)
    weight = layer.weight + value * (ternarize(layer.weight).dequantize() - layer.weight)
    scale = x.abs().amax(-1, keepdim=True) / 127
    mixed = x + value * ((x / scale).round() * scale - x)
    torch.testing.assert_close(layer(x), mixed @ weight.T + layer.bias)
    if value == 0.0:
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_output_is_continuous_as_lambda_reaches_one() -> None:
    layer = make_layer()
    x = make_input(5, 32)
    fused = layer(x)
    set_quantization(layer, 1.0 - 1e-6)
    torch.testing.assert_close(layer(x), fused, rtol=1e-4, atol=1e-4)


def test_set_quantization_reaches_every_layer_and_is_read_back() -> None:
    model = nn.Sequential(make_layer(32, 32), nn.ReLU(), make_layer(32, 8))
    set_quantization(model, 0.25)
    assert quantization_of(model) == 0.25
    assert [m.quantization_lambda.item() for m in model if isinstance(m, BitLinear)] == [0.25, 0.25]
    assert quantization_of(nn.Linear(2, 2)) == 0.0
    assert "quantization_lambda" not in "".join(model.state_dict())


def test_layers_with_one_input_share_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (make_layer(seed=0), make_layer(seed=1), make_layer(seed=2))
    x = make_input(4, 32)
    separate = [layer(x) for layer in layers]
    calls: list[int] = []
    encode = BitLinear.encode_input
    monkeypatch.setattr(BitLinear, "encode_input", lambda self, x: (calls.append(1), encode(self, x))[1])
    assert all(torch.equal(a, b) for a, b in zip(project(x, layers), separate, strict=True))
    assert len(calls) == 1
    plain = (nn.Linear(32, 4), nn.Linear(32, 8))
    assert torch.equal(project(x, plain)[1], plain[1](x))


# --- the cache of weight codes ---------------------------------------------------------------------------------------


def count_ternarize(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def counting(weight: Tensor, scale: Tensor | None = None) -> Any:
        calls.append(1)
        return ternarize(weight, scale)

    monkeypatch.setattr("wrinklefree.models.bitlinear.ternarize", counting)
    return calls


def assert_fresh(layer: BitLinear, x: Tensor) -> None:
    torch.testing.assert_close(layer(x), layer.reference_forward(x), rtol=1e-5, atol=1e-5)


def test_accumulation_recomputation_and_evaluation_quantize_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make_layer(), make_input(4, 32)
    calls = count_ternarize(monkeypatch)
    for _ in range(3):
        cast("Tensor", checkpoint(layer, x.clone().requires_grad_(), use_reentrant=False)).sum().backward()
    with torch.inference_mode():
        layer(x)
    assert len(calls) == 1


def test_codes_cached_in_inference_mode_serve_training() -> None:
    layer, x = make_layer(), make_input(4, 32)
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    assert layer.weight.grad is not None


def new_weight(layer: BitLinear) -> Tensor:
    return make_input(*layer.weight.shape, seed=99)


def step_optimizer(layer: BitLinear) -> None:
    layer.weight.grad = new_weight(layer)
    torch.optim.SGD([layer.weight], lr=1.0).step()


class PointerOptimizer(torch.optim.Optimizer):
    """Writes as fused third-party kernels do: without touching the version of the tensor."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(make_input(*parameter.shape, seed=5))


def step_pointer_optimizer(layer: BitLinear) -> None:
    PointerOptimizer([layer.weight]).step()


def load_state(layer: BitLinear) -> None:
    layer.load_state_dict({"weight": new_weight(layer), "bias": torch.zeros(24)})


def load_state_by_assignment(layer: BitLinear) -> None:
    layer.load_state_dict({"weight": new_weight(layer), "bias": torch.zeros(24)}, assign=True)


def copy_in_place(layer: BitLinear) -> None:
    with torch.no_grad():
        layer.weight.copy_(new_weight(layer))


def assign_data(layer: BitLinear) -> None:
    layer.weight.data = new_weight(layer)


def assign_data_twice(layer: BitLinear) -> None:
    for _ in range(20):  # frees and allocates storage of one size: an address must not come back as a match
        layer.weight.data = new_weight(layer) * 0.5
        layer.weight.data = new_weight(layer)


def copy_behind_the_version_then_set_lambda(layer: BitLinear) -> None:
    layer.weight.data.copy_(new_weight(layer))
    set_quantization(layer, 1.0)


def change_dtype(layer: BitLinear) -> None:
    layer.to(torch.float64)
    layer.to(torch.float32)
    copy_in_place(layer)


@pytest.mark.parametrize(
    "change",
    [
        step_optimizer,
        step_pointer_optimizer,
        load_state,
        load_state_by_assignment,
        copy_in_place,
        assign_data,
        assign_data_twice,
        copy_behind_the_version_then_set_lambda,
        change_dtype,
    ],
)
def test_a_changed_weight_gets_new_codes(change: Callable[[BitLinear], None]) -> None:
    layer, x = make_layer(), make_input(4, 32)
    before = layer(x).detach()
    change(layer)
    assert not torch.allclose(layer(x), before)
    assert_fresh(layer, x)


def test_a_copy_has_codes_of_its_own() -> None:
    layer, x = make_layer(), make_input(4, 32)
    before = layer(x).detach()
    twin = copy.deepcopy(layer)
    copy_in_place(twin)
    assert_fresh(twin, x)
    assert torch.equal(layer(x), before)


def test_weights_in_bfloat16_compute_in_bfloat16() -> None:
    layer, x = make_layer(), make_input(4, 32)
    before = layer(x)
    layer.to(torch.bfloat16)
    output = layer(x.to(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert (output - before).norm() < 0.1 * before.norm()


def test_a_saved_graph_keeps_the_codes_it_used() -> None:
    layer, x = make_layer(bias=False), make_input(4, 32).requires_grad_()
    expected = ternarize(layer.weight).dequantize().sum(0)
    output = layer(x).sum()
    copy_in_place(layer)
    layer(x.detach())
    (grad,) = torch.autograd.grad(output, x)
    torch.testing.assert_close(grad, expected.expand(4, 32))


def test_a_layer_that_ran_can_be_pickled() -> None:
    layer, x = make_layer(), make_input(4, 32)
    before = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), before)


# --- torch.compile ---------------------------------------------------------------------------------------------------


def test_a_changing_lambda_never_recompiles() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    layer, x = make_layer(), make_input(4, 32)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for step in range(6):
        set_quantization(layer, step / 6)
        torch.testing.assert_close(compiled(x), layer.reference_forward(x))
    assert counter.frame_count == 1
    set_quantization(layer, 1.0)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), layer.reference_forward(x), rtol=1e-5, atol=1e-5)
        copy_in_place(layer)
    assert counter.frame_count == 2
    torch._dynamo.reset()
