"""Which device a run uses, in which dtype it computes, and how long that will take there."""

import logging
import time
from dataclasses import dataclass
from typing import Literal

import torch

from wrinklefree.models.byte_products import CPU_MULTIPLIES_INT8
from wrinklefree.models.config import Architecture
from wrinklefree.models.llama import CausalLM
from wrinklefree.quantization.cpu_kernels import has_kernels
from wrinklefree.quantization.options import BackwardProducts, ForwardProducts
from wrinklefree.training.device_kinds import kind_by_name
from wrinklefree.utils.errors import ConfigError

logger = logging.getLogger(__name__)

MODEL_FLOP_UTILIZATION = 0.15
"""Share of the measured matrix-multiplication rate that a small-model training step reaches (measured on CPUs)."""

FIRST_CAPABILITY = {"int8": (7, 5), "fp8": (8, 9)}
"""CUDA capability from which on a GPU multiplies the type in hardware: int8 from Turing, float8 from Ada on."""

REFERENCE_GPU = "H100"
REFERENCE_PEAK_FLOPS = 989e12
"""Dense bfloat16 operations a second of its data sheet."""
REFERENCE_UTILIZATION = 0.30
"""Assumed share of that peak: what good full-precision training reaches, less the time that fake quantization takes."""


@dataclass(frozen=True)
class Compute:
    """A device and the dtype that matrix multiplications run in; parameters stay float32."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """Context in which forward passes run."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @property
    def dtype_name(self) -> str:
        """`bfloat16` or `float32`, for records."""
        return str(self.dtype).removeprefix("torch.")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware (elsewhere it is emulated, and slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def choose_compute(dtype: Literal["auto", "bfloat16", "float32"]) -> Compute:
    """The first GPU, else the CPU; `dtype` as asked, or the fastest that the device has."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if dtype == "auto":
        dtype = "bfloat16" if multiplies_bfloat16(device) else "float32"
    return Compute(device, {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype])


def check_products(forward: ForwardProducts, backward: BackwardProducts, device: torch.device) -> None:
    """Refuse what the GPU does not have; say where a CPU gains nothing.

    Raises:
        ConfigError: the GPU lacks the type.
    """
    for key, kind, usual in (
        ("training.forward_products", forward, "float"), ("training.backward_products", backward, "exact"),
    ):  # fmt: skip
        if kind in (usual, "auto"):
            continue
        if device.type == "cpu":
            if kind == "int8" and (CPU_MULTIPLIES_INT8 or has_kernels()):
                continue
            how = "float8 is emulated on a CPU" if kind == "fp8" else "this CPU has no int8 instructions"
            logger.warning("%s=%s: %s; use it to see what it costs, %s is faster", key, kind, how, usual)
            continue
        has, needed = torch.cuda.get_device_capability(device), FIRST_CAPABILITY[kind]
        if has < needed:
            instead = f"int8 or {usual}" if kind == "fp8" and has >= FIRST_CAPABILITY["int8"] else usual
            raise ConfigError(
                f"{key}={kind} needs a GPU of capability {needed[0]}.{needed[1]}, and this one has {has[0]}.{has[1]}: "
                f"use {key}={instead}"
            )


def measured_flops_per_second(compute: Compute, size: int = 1024) -> float:
    """Matrix-multiplication rate, from a fraction of a second of multiplying square matrices."""
    a = torch.randn(size, size, device=compute.device, dtype=compute.dtype)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        for _ in range(3):
            torch.mm(a, a)
        if compute.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / 3)
    return 2 * size**3 / best


def peak_flops_per_second(compute: Compute, *, measure: bool) -> float | None:
    """The rate that a run's share is taken of: measured if asked for, else a known GPU's data sheet, else unknown."""
    if measure:
        return measured_flops_per_second(compute, size=1024 if compute.device.type == "cpu" else 8192)
    if compute.device.type != "cuda":
        return None
    kind = kind_by_name(torch.cuda.get_device_name(compute.device))
    return None if kind is None else kind.flops(compute.dtype.itemsize)


def count_parameters(architecture: Architecture) -> int:
    """Parameters of the full-precision model, without making one."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CausalLM(architecture).parameters())


def training_flops(parameters: int, tokens: int, *, with_teacher: bool) -> float:
    """6 N a token for forward and backward, 2 N more for the teacher's forward."""
    return (8.0 if with_teacher else 6.0) * parameters * tokens


def reference_gpu_hours(parameters: int, tokens: int, *, with_teacher: bool) -> float:
    """Hours of a training run on one `REFERENCE_GPU`: an estimate from its data sheet, never measured here."""
    rate = REFERENCE_PEAK_FLOPS * REFERENCE_UTILIZATION
    return training_flops(parameters, tokens, with_teacher=with_teacher) / rate / 3600


def estimated_seconds(compute: Compute, parameters: int, tokens: int, *, with_teacher: bool) -> float:
    """Time of a training run at this device's measured matrix-multiplication rate and our usual share of it."""
    flops = training_flops(parameters, tokens, with_teacher=with_teacher)
    return flops / (measured_flops_per_second(compute) * MODEL_FLOP_UTILIZATION)


def refuse_endless_cpu_run(seconds: float, *, allow_slow: bool, command_hint: str) -> None:
    """On a CPU, say once and loudly how long the run will take; above 24 hours refuse unless told.

    Raises:
        ConfigError: when the estimate is above 24 hours and `allow_slow` is false.
    """
    hours = seconds / 3600
    text = f"{hours:.1f} hours" if hours >= 1 else f"{max(seconds / 60, 0.1):.1f} minutes"
    if hours > 24 and not allow_slow:
        raise ConfigError(
            f"no GPU here, and {command_hint} would take about {text} on this CPU. Run it on a GPU, give a smaller "
            "budget (training.total_tokens=...), or insist with allow_slow=true."
        )
    logger.warning("NO GPU: %s runs on the CPU, estimated time %s", command_hint, text)
