"""The doctor's look at the machine: versions, devices, attention, optimizers, compilation, disk."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from wrinklefree.doctor import Check, Request, one_line

GIB = 2**30
LITTLE_MEMORY = 4 * GIB
LITTLE_DISK = 20 * GIB
"""A checkpoint of a model of 1.7 billion weights with AdamW's state."""
EXTRAS = {
    "dedup": "near duplicates in prepare_data.py",
    "benchmark": "run_benchmark.py",
    "eval": "tasks of lm-evaluation-harness in run_evaluation.py",
    "track": "tracking=tensorboard, trackio, wandb",
}
PYTHON = (3, 11)


def versions(request: Request) -> Iterator[Check]:
    """Python and the packages, against what the installed wrinklefree asks for."""
    from packaging.requirements import Requirement

    enough = sys.version_info >= PYTHON
    yield Check(
        "versions", "python", "ok" if enough else "missing", f"{platform.python_version()} on {platform.system()} "
        f"{platform.machine()}", "" if enough else "use Python 3.11 or newer: uv python install 3.11", needed=not enough,
    )  # fmt: skip
    yield Check("versions", "wrinklefree", "ok", importlib.metadata.version("wrinklefree"))
    asked = [Requirement(text) for text in importlib.metadata.requires("wrinklefree") or []]
    for requirement in asked:
        if "extra" not in str(requirement.marker or "") and (
            requirement.marker is None or requirement.marker.evaluate()
        ):
            yield _package(requirement.name, requirement.specifier)
    for extra, purpose in EXTRAS.items():
        parts = [
            part for part in asked
            if part.marker and not part.marker.evaluate({"extra": ""}) and part.marker.evaluate({"extra": extra})
        ]  # fmt: skip
        absent = [part.name for part in parts if _version(part.name) is None]
        text = ", ".join(f"{part.name} {_version(part.name)}" for part in parts if part.name not in absent)
        if absent:
            lack = f"{', '.join(absent)} not installed: for {purpose}"
            fix = f"uv sync --extra {extra} (pip install 'wrinklefree[{extra}]')"
            yield Check("versions", f"extra {extra}", "missing", lack, fix)
        elif parts:
            yield Check("versions", f"extra {extra}", "ok", text)


def devices(request: Request) -> Iterator[Check]:
    """Processor, memory, and every GPU that torch sees."""
    import psutil
    import torch

    from wrinklefree.training.device import multiplies_bfloat16

    cpu = torch.device("cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = "multiplies bfloat16" if multiplies_bfloat16(cpu) else "no bfloat16 unit, training.dtype=auto is float32"
    yield Check("devices", "cpu", "ok", f"{cores} cores, {torch.get_num_threads()} threads of torch, {kind}")
    memory = psutil.virtual_memory()
    text = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available < LITTLE_MEMORY:
        fix = "model=tiny runs in it; estimate=true says what a run needs"
        yield Check("devices", "memory", "warning", text, fix)
    else:
        yield Check("devices", "memory", "ok", text)
    if not torch.cuda.is_available():
        yield Check("devices", "gpu", "warning", "none: training runs on the CPU", _gpu_fix(torch.version.cuda))
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        bfloat16 = multiplies_bfloat16(torch.device("cuda", index))
        yield Check(
            "devices", f"gpu {index}", "ok" if bfloat16 else "warning",
            f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, capability "
            f"{major}.{minor}, CUDA {torch.version.cuda}",
            "" if bfloat16 else "no bfloat16 unit: it computes in float32, and slowly",
        )  # fmt: skip


def attention(request: Request) -> Iterator[Check]:
    """Which kernels keep packed documents apart here; each is run, and compared with the masked one."""
    import torch

    from wrinklefree.models.attention_backends import choose_backend
    from wrinklefree.training.device import choose_compute
    from wrinklefree.utils.errors import ConfigError

    compute = choose_compute("auto")
    if compute.device.type != "cuda":
        yield Check("attention", "sdpa", "ok", "in use; varlen, flash and flex need a CUDA device")
        return
    heads, head_dim = (8, 2), 64
    for name in ("varlen", "flash"):
        fix = "uv sync --group flash" if name == "flash" else "uv sync: it comes with torch 2.10 and later"
        try:
            chosen = choose_backend(name, device=compute.device, dtype=torch.bfloat16, heads=heads, head_dim=head_dim)
        except ConfigError as error:
            yield Check("attention", name, "missing", one_line(error), fix)
        else:
            yield Check("attention", name, "ok", chosen.reason)
    yield Check("attention", "flex", "ok", "not tried here, it compiles first: packing.attention=flex")
    yield Check("attention", "sdpa", "ok", "the fallback: a mask")


def optimizers(request: Request) -> Iterator[Check]:
    """Every optimizer takes a step on two small layers, on the device that a run would use."""
    from typing import get_args

    import torch
    from torch import nn

    from wrinklefree.training.config import OptimizerConfig
    from wrinklefree.training.device import choose_compute
    from wrinklefree.training.optimizers import OptimizerType, build_optimizer

    device = choose_compute("auto").device
    state = torch.get_rng_state()
    for name in get_args(OptimizerType):
        try:
            linear = nn.Linear(64, 64, bias=False)
            model = nn.Sequential(linear, nn.RMSNorm(64)).to(device)
            optimizer = build_optimizer(model, name, OptimizerConfig(), 1e-3)
            before = linear.weight.detach().clone()
            model(torch.ones(2, 64, device=device)).square().sum().backward()
            optimizer.step()
            moved = not torch.equal(linear.weight, before) and bool(linear.weight.isfinite().all())
        except Exception as error:  # noqa: BLE001 (bitsandbytes raises what its library finds wrong)
            fix = "uv sync; without it: optimizer.type=adamw" if name == "adamw_8bit" else "report this line"
            yield Check("optimizers", name, "missing", one_line(error), fix, needed=name == "adamw")
        else:
            fix = "" if moved else f"choose another than optimizer.type={name}, and report this line"
            text = f"takes a step on {device.type}" if moved else f"moves no weight on {device.type}"
            yield Check("optimizers", name, "ok" if moved else "warning", text, fix)
    torch.set_rng_state(state)


def compilation(request: Request) -> Iterator[Check]:
    """What torch.compile needs; it is not run, that takes a minute."""
    from wrinklefree.training.compiling import missing_tools
    from wrinklefree.training.device import choose_compute

    device = choose_compute("auto").device
    lack = missing_tools(device.type)
    if lack is None:
        yield Check(
            "compilation", "torch.compile", "ok", "its compiler is here: training.compile=auto uses it in long runs"
        )
    else:
        fix = "install gcc and Python's headers (Debian: apt install g++ python3-dev); training works without"
        yield Check("compilation", "torch.compile", "missing", lack, fix)


def disk(request: Request) -> Iterator[Check]:
    """Room, and whether one may write: where runs, assets and hub downloads go."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from wrinklefree.utils.assets import CACHE_VARIABLE, cache_folder

    places = (
        ("runs", request.output_dir, "set output_dir=... to a folder on a larger disk", True),
        ("asset cache", cache_folder(), f"set {CACHE_VARIABLE} to another folder", False),
        ("hub cache", Path(HF_HUB_CACHE), "set HF_HOME to another folder", False),
        ("temporary", Path(tempfile.gettempdir()), "set TMPDIR to another folder", False),
    )
    for name, folder, fix, needed in places:
        there = _existing(folder)
        free = shutil.disk_usage(there).free
        text = f"{folder.expanduser().absolute()}, {free / GIB:.1f} GiB free"
        if not os.access(there, os.W_OK | os.X_OK):
            yield Check("disk", name, "missing", f"{text}, and may not be written", fix, needed)
        elif free < LITTLE_DISK and name != "temporary":
            yield Check("disk", name, "warning", text, fix)
        else:
            yield Check("disk", name, "ok", text)


def _package(name: str, specifier: "object") -> Check:
    """A package that wrinklefree depends on, against the versions that it was made with."""
    from packaging.specifiers import SpecifierSet

    assert isinstance(specifier, SpecifierSet)
    found = _version(name)
    if found is None:
        return Check("versions", name, "missing", "not installed", "uv sync (pip install wrinklefree)", needed=True)
    if not specifier.contains(found, prereleases=True):
        return Check(
            "versions", name, "warning", f"{found}, made for {specifier}", "uv sync (pip install -U wrinklefree)"
        )
    return Check("versions", name, "ok", found)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu_fix(cuda: str | None) -> str:
    """Why torch sees no GPU, as far as one can tell from here."""
    hides = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hides is not None and hides.strip() in {"", "-1"}:
        return "CUDA_VISIBLE_DEVICES hides them: unset it"
    if shutil.which("nvidia-smi") is None:
        return "fine for small models; on a machine with an NVIDIA GPU install its driver"
    if cuda is None:
        return "this torch is built without CUDA: install one that is (see the selector on pytorch.org)"
    return f"torch is built for CUDA {cuda} and the driver does not serve it: nvidia-smi shows the driver's version"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.expanduser().absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())
