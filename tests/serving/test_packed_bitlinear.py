"""PackedBitLinear against BitLinear, bit for bit, and inside other people's nets."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from wrinklefree.models.bitlinear import BitLinear
from wrinklefree.quantization.activation_quant import quantize_activation
from wrinklefree.quantization.weight_quant import ternarize
from wrinklefree.serving.packed_bitlinear import PackedBitLinear, pack_bitlinears
from wrinklefree.utils.errors import ConfigError

TUTORIAL = Path(__file__).resolve().parents[2] / "docs/tutorials/serving.md"


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (576, 192), (70, 33), (1, 1), (2048, 100)])
def test_results_are_bitlinears(inputs: int, outputs: int, bias: bool, bits: int) -> None:
    layer = BitLinear(inputs, outputs, bias, activation_bits=bits)  # type: ignore[arg-type]
    layer.forward_products = "float"
    packed = PackedBitLinear.pack(layer)
    for shape in [(inputs,), (1, inputs), (3, 7, inputs), (130, inputs), (0, inputs)]:
        x = torch.randn(shape) * 3
        with torch.no_grad():
            expected = layer(x)
        assert torch.equal(packed(x), expected)
        assert packed(x).shape == expected.shape


def test_unquantized_activations() -> None:
    layer = BitLinear(256, 64, activation_bits=None)
    x = torch.randn(9, 256)
    with torch.no_grad():
        expected = layer(x)
    assert (PackedBitLinear.pack(layer)(x) - expected).norm() / expected.norm() < 1e-4


def test_a_plain_linear_layer_is_made_ternary() -> None:
    layer = nn.Linear(96, 40)
    packed = PackedBitLinear.pack(layer)
    assert torch.equal(packed.weight, ternarize(layer.weight).dequantize())
    with torch.no_grad():
        wide = nn.functional.linear(x := torch.randn(5, 96), packed.weight, layer.bias)
    assert (packed(x) - wide).norm() / wide.norm() < 0.02


def test_a_net_of_other_people_is_packed_in_place() -> None:
    net = nn.Sequential(BitLinear(32, 64), nn.GELU(), nn.ModuleDict({"out": BitLinear(64, 8)})["out"])
    x = torch.randn(4, 32)
    with torch.no_grad():
        expected = net(x)
    assert pack_bitlinears(net) == 2
    assert torch.equal(net(x), expected)
    assert pack_bitlinears(net) == 0
    assert sum(buffer.numel() for name, buffer in net.named_buffers() if "tiles" in name) == (32 * 64 + 64 * 64) // 4


def test_state_dicts_and_other_dtypes() -> None:
    packed = PackedBitLinear.pack(BitLinear(64, 64))
    other = PackedBitLinear.pack(BitLinear(64, 64))
    x = torch.randn(3, 64)
    assert not torch.equal(other(x), packed(x))
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x), packed(x))
    assert other.half().scale == packed.scale
    halves = x.bfloat16()
    assert other(halves).dtype == torch.bfloat16
    assert torch.equal(packed(halves), packed(halves.float()).bfloat16())


def test_calls_from_several_threads_do_not_mix() -> None:
    layers = [BitLinear(128, 128) for _ in range(4)]
    inputs = [torch.randn(20, 128) for _ in range(4)]
    with torch.no_grad():
        expected = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    packed = [PackedBitLinear.pack(layer) for layer in layers]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            found = pool.map(lambda index: packed[index](inputs[index]), range(4))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_refusals() -> None:
    packed = PackedBitLinear.pack(BitLinear(64, 64))
    with pytest.raises(ConfigError, match="the input has 65 features, this layer takes 64"):
        packed(torch.randn(65))
    with pytest.raises(ConfigError, match="no backward pass"):
        packed(torch.randn(64, requires_grad=True))
    with torch.no_grad():
        packed(torch.randn(64, requires_grad=True))
    with pytest.raises(ConfigError, match="runs on the CPU"):
        packed(torch.empty(64, device="meta"))


def test_the_tutorials_net() -> None:
    [block] = re.findall(r"^```python\n(.*?)^```$", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, TUTORIAL.name, "exec"), names)
    net, output = names["net"], names["output"]
    assert isinstance(net, nn.Sequential)
    assert isinstance(output, torch.Tensor)
    first, second = (net[index] for index in (0, 2))
    assert isinstance(first, PackedBitLinear)
    assert isinstance(second, PackedBitLinear)
    assert output.shape == (8, 576)
    assert first.tiles.nbytes == 576 * 1536 // 4
    x = torch.randn(4, 576)
    by_hand = quantize_activation(torch.relu(quantize_activation(x).dequantize() @ first.weight.T + first.bias))
    expected = by_hand.dequantize() @ second.weight.T + second.bias
    assert (net(x) - expected).norm() < 1e-2 * expected.norm()
