"""Peak memory of a trial: of tensors on a GPU, of the process on a CPU.

The kernel keeps two high-water marks of a process. `ru_maxrss` survives an `exec`, so a child of a large parent begins
with the parent's peak; `VmHWM` of `/proc/self/status` belongs to the address space, and begins anew. Hence the latter.
"""

import resource
import sys
from pathlib import Path
from typing import Literal

import torch

_STATUS = Path("/proc/self/status")


def peak_memory(device: torch.device) -> tuple[int, Literal["device", "process"]]:
    """Most bytes in use at once since the process began, and what they are of."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "device"
    return process_peak(), "process"


def process_peak() -> int:
    """Most bytes of physical memory that this process had at once."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere else
