"""Threads and buffers with which C runs single operations for PyTorch on the CPU.

The threads are PyTorch's own where they can be had: OpenMP keeps its team waiting busily for a while after every operation,
and a second team would find its cores taken.
"""

import ctypes
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from wrinklefree.native.library import ISA_VARIABLE, chosen_isa, load_library
from wrinklefree.utils.errors import EngineError


class _Runner:
    """WfRunner of csrc/runner.h; one call at a time."""

    def __init__(self, isa: bytes, threads: int) -> None:
        library = load_library()
        self.handle = library.wf_runner_create(isa, threads, openmp_parallel() if threads > 1 else None)
        if not self.handle:
            raise EngineError(f"the CPU kernels could not start {threads} threads; ask for fewer")
        self.lock = threading.Lock()
        weakref.finalize(self, library.wf_runner_free, self.handle)


_runners: dict[tuple[str | None, int, int], _Runner] = {}
_runners_lock = threading.Lock()


@contextmanager
def borrowed_runner() -> Iterator[int]:
    """The handle of a runner with as many threads as PyTorch uses now, for one call.

    Raises:
        EngineError: the library is not there.
        ConfigError: `WRINKLEFREE_ENGINE_ISA` asks for instructions that this CPU lacks.
    """
    # A forked process has none of its parent's threads.
    key = (os.environ.get(ISA_VARIABLE), torch.get_num_threads(), os.getpid())
    with _runners_lock:
        runner = _runners.get(key)
        if runner is None:
            runner = _runners[key] = _Runner(chosen_isa(), torch.get_num_threads())
    with runner.lock:
        yield runner.handle


def run_kernel(name: str, *arguments: object) -> None:
    """Call a function of C that takes a runner first and returns 0.

    Raises:
        EngineError: it refused its arguments, or as `borrowed_runner`.
    """
    with borrowed_runner() as runner:
        problem = getattr(load_library(), name)(runner, *arguments)
    if problem:
        raise EngineError(f"{name} refused its arguments: too large, empty, or memory is short")


@cache
def openmp_parallel() -> int | None:
    """Address of the function GOMP_parallel in the OpenMP library that PyTorch has loaded; None where it has another."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*")):
        try:
            loaded = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
            return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
