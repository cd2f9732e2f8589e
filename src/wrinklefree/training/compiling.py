"""Whether the blocks of a run's models are compiled, and the check that what was compiled is right.

Compiling merges the element-wise operations between products (norms, rotations, gates, roundings): measured on two CPU
cores, a bfloat16 step of a 135M model takes two thirds of the time and keeps half as much for its backward pass
(docs/training_performance.md). It costs about a minute at the start, so `auto` takes it for long runs only; the decision
reads the run's arithmetic, never a clock, since a resumed run must decide alike.
"""

import importlib.util
import logging
import shutil
import sysconfig
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from wrinklefree.models.bitlinear import quantization_of, set_quantization
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.training.device import Compute
from wrinklefree.utils.errors import ConfigError

logger = logging.getLogger(__name__)

WORTH_COMPILING = 2e14
"""Floating-point operations of a run: a quarter of an hour on two CPU cores. Compiling takes one minute of it."""
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest relative error of a compiled block's values and gradients against the plain one's. Another order of sums moves
an activation over a rounding threshold now and then: about 0.02 in bfloat16. What is wrong is wrong by about 1."""


@dataclass(frozen=True)
class CompileChoice:
    """Whether to compile, and why (not)."""

    compiles: bool
    reason: str


def choose_compile(
    wanted: Literal["auto"] | bool, *, model: CausalLM, compute: Compute, sharded: bool, flops: float
) -> CompileChoice:
    """What `training.compile` means for this run.

    Args:
        wanted: The key's value.
        model: The student; its attention backend and checkpointing are settled.
        compute: Device and type.
        sharded: Whether several processes share the model.
        flops: Arithmetic of the whole run.

    Raises:
        ConfigError: it was asked for, and cannot be.
    """
    if wanted is False:
        return CompileChoice(False, "training.compile=false")
    obstacle = _obstacle(model, compute, sharded=sharded)
    if wanted is True:
        if obstacle is not None:
            raise ConfigError(f"training.compile=true does not work here: {obstacle}; use training.compile=auto")
        return CompileChoice(True, "training.compile=true")
    if obstacle is None and compute.device.type != "cpu":
        obstacle = "not measured on a GPU yet; training.compile=true compiles"
    if obstacle is None and compute.dtype == torch.float32:
        obstacle = "in float32 products take the time; training.compile=true compiles"
    if obstacle is None and flops < WORTH_COMPILING:
        obstacle = "the run is short"
    return (
        CompileChoice(False, obstacle) if obstacle is not None else CompileChoice(True, "pays for a run of this length")
    )


def _obstacle(model: CausalLM, compute: Compute, *, sharded: bool) -> str | None:
    """Why blocks cannot be compiled, None if they can."""
    if sharded:
        return "distributed=fsdp_* gathers weights inside the blocks"
    if model.activation_checkpointing == "selective":
        return "distributed.activation_checkpointing=selective tells products apart, which a graph hides"
    if model.attention_backend == "flex":
        return "packing.attention=flex compiles itself"
    if model.bitnet is not None and not model.bitnet.is_plain:
        return "model.quantization.weight_scale and dead_zone_bias read lambda as a number, a graph for every step"
    return missing_tools(compute.device.type)


def missing_tools(device_type: str) -> str | None:
    """What torch.compile lacks on this machine, None where it has everything."""
    if device_type == "cpu":
        if not any(shutil.which(name) for name in ("g++", "clang++")):
            return "there is no C++ compiler (g++ or clang++)"
        if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
            return "Python's headers are missing (Python.h)"
    elif importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def compile_model(
    model: CausalLM, compute: Compute, rows: int, length: int, *, gradients: bool, warms_up: bool = False
) -> str | None:
    """Compile the blocks, and check what they compute against the plain ones; what is wrong, None if nothing.

    Args:
        model: On its device; left uncompiled if anything is wrong.
        compute: Device and type.
        rows: Of a micro-batch.
        length: Of a row.
        gradients: For training; false: for a teacher.
        warms_up: Whether lambda will be below 1: that is a graph of its own, to be checked too.
    """
    before = quantization_of(model)
    started = time.perf_counter()
    model.compile_blocks(rows, length, gradients=gradients)
    problem: str | None = None
    try:
        for value in (0.5, 1.0) if warms_up and before < 1 else (1.0,):
            set_quantization(model, value)
            error = compiled_error(model, compute, rows, length, gradients=gradients)
            if not error <= TOLERANCES[compute.dtype]:
                problem = f"its values differ from the plain block's by {error:.2g}"
                break
    except Exception as failure:  # noqa: BLE001 - whatever a compiler raises means that it cannot be used here
        problem = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
    set_quantization(model, before)
    model.zero_grad(set_to_none=True)
    if problem is None:
        logger.info("blocks compiled and checked in %.0f s", time.perf_counter() - started)
    else:
        model.forget_compiled()
    return problem


def compiled_error(model: CausalLM, compute: Compute, rows: int, length: int, *, gradients: bool = True) -> float:
    """Relative error of the compiled blocks' output, and of the last one's gradients, for two documents a row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.architecture.vocab_size, (rows, length), generator=generator)
    index = torch.arange(length).expand(rows, length)
    cut = length * 2 // 3
    batch = Batch(ids, ids, torch.where(index < cut, index, index - cut), 1 + (index >= cut).long())
    batch = batch.to(compute.device)
    results: list[list[Tensor]] = []
    for plain in (False, True):
        model.zero_grad(set_to_none=True)
        way = model.uncompiled() if plain else nullcontext()
        with compute.autocast(), way, torch.set_grad_enabled(gradients):
            hidden = model(batch).hidden
        if gradients:
            slope = torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device)
            (hidden.float() * slope).sum().div(hidden.numel()).backward()
        last = [p.grad for p in model.blocks[-1].parameters() if p.grad is not None]
        results.append([hidden.detach(), *last])
    pairs = zip(*results, strict=True)
    return max(float((mine - theirs).norm() / theirs.norm().clamp(min=1e-30)) for mine, theirs in pairs)
