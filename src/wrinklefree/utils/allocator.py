"""Keep the C allocator from returning every large buffer to the kernel.

glibc maps a buffer above a threshold afresh and unmaps it when it is freed, so each temporary of a few megabytes is
zeroed page by page by the kernel. A training step makes hundreds of them; on a CPU that costs more than the arithmetic
of an element-wise operation. `mallopt` raises the threshold; freed buffers then stay with the process.
"""

import ctypes
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST = 2**30
"""Bytes: glibc still maps buffers above this one by one."""


def keep_large_buffers() -> bool:
    """Raise glibc's thresholds for this process; False, and no effect, where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library, musl for one
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(M_TRIM_THRESHOLD, 2 * LARGEST - 1))
