"""Devices that a run can be estimated for: memory, speed and links from data sheets, prices as an assumption.

Speeds are peaks without sparsity, in the data sheets' units; what a training step reaches of them is the `efficiency`.
That of GPUs is stated, not measured (we had none); that of the CPU was measured. Prices are what specialised clouds
asked for an hour in mid-2026; offers differ by a factor of three, so give your own: `estimation.price_per_hour`.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

GIB = 2**30

DeviceName = Literal[
    "b200", "h200", "h100_80gb", "a100_80gb", "a100_40gb", "l40s", "l4", "rtx_4090", "rtx_3090", "cpu_2_cores",
]  # fmt: skip
"""Values of `estimation.device`."""

STATED_EFFICIENCY = 0.30
"""Share of a GPU's peak that arithmetic of a training step is assumed to reach."""
MEASURED_CPU_EFFICIENCY = 0.15
"""The same on two CPU cores: measured on small models, as `device.MODEL_FLOP_UTILIZATION`."""
PRICES_AS_OF = "mid-2026"


@dataclass(frozen=True)
class DeviceKind:
    """One kind of device. Bytes, bytes a second, operations a second, US dollars an hour."""

    name: DeviceName
    type: Literal["cuda", "cpu"]
    memory: int
    """What the driver reports as total."""
    bfloat16_flops: float
    float32_flops: float
    """Without TF32."""
    memory_bandwidth: float
    link_bandwidth: float
    """To another device of the node, one direction."""
    network_bandwidth: float
    """To another node, one direction, for each device."""
    host_bandwidth: float
    """To the host's memory, one direction."""
    price_per_hour: float
    efficiency: float = STATED_EFFICIENCY

    def flops(self, compute_bytes: int) -> float:
        """Peak of matrix products in the compute dtype."""
        return self.bfloat16_flops if compute_bytes == 2 else self.float32_flops


DEVICE_KINDS = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            DeviceKind("b200", "cuda", 183_359 * 2**20, 2250e12, 75e12, 7.7e12, 900e9, 50e9, 55e9, 5.00),
            DeviceKind("h200", "cuda", 143_771 * 2**20, 989e12, 67e12, 4.8e12, 450e9, 50e9, 55e9, 3.80),
            DeviceKind("h100_80gb", "cuda", 81_559 * 2**20, 989e12, 67e12, 3.35e12, 450e9, 50e9, 55e9, 2.95),
            DeviceKind("a100_80gb", "cuda", 81_920 * 2**20, 312e12, 19.5e12, 2.04e12, 300e9, 25e9, 25e9, 1.40),
            DeviceKind("a100_40gb", "cuda", 40_960 * 2**20, 312e12, 19.5e12, 1.55e12, 300e9, 25e9, 25e9, 1.20),
            DeviceKind("l40s", "cuda", 46_068 * 2**20, 362e12, 91e12, 0.864e12, 25e9, 12.5e9, 25e9, 0.95),
            DeviceKind("l4", "cuda", 23_034 * 2**20, 121e12, 30e12, 0.300e12, 25e9, 12.5e9, 25e9, 0.70),
            DeviceKind("rtx_4090", "cuda", 24_564 * 2**20, 165e12, 82.6e12, 1.008e12, 25e9, 1.25e9, 25e9, 0.45),
            DeviceKind("rtx_3090", "cuda", 24_576 * 2**20, 71e12, 35.6e12, 0.936e12, 25e9, 1.25e9, 25e9, 0.25),
            DeviceKind(
                "cpu_2_cores", "cpu", 16 * GIB, 430e9, 200e9, 40e9, 10e9, 1.25e9, 40e9, 0.10, MEASURED_CPU_EFFICIENCY
            ),
        )
    }
)
"""Name -> kind. The CPU's peaks were measured on two server cores with bfloat16 instructions."""

_NAMES = MappingProxyType(
    {
        "B200": "b200", "H200": "h200", "H100": "h100_80gb", "A100": "a100_80gb", "L40S": "l40s", "L4": "l4",
        "RTX 4090": "rtx_4090", "RTX 3090": "rtx_3090",
    }
)  # fmt: skip
"""What stands in a driver's name of a device -> kind; longer names first."""


def kind_by_name(device_name: str) -> DeviceKind | None:
    """The kind of a GPU, given the driver's name of it; None for one that is not known."""
    words = device_name.replace("-", " ")
    for part, name in _NAMES.items():
        if f" {part} " in f" {words} ":
            return DEVICE_KINDS[name]
    return None
