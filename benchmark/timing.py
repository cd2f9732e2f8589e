"""Comparing variants in one process: interleaved times, what a graph keeps, the allocator's peak, gradient errors.

A machine's speed changes from second to second with its neighbours. So variants run by turns, the smallest time of each
counts, and ratios of these are what is reported.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


@dataclass(frozen=True)
class Timing:
    """The smallest of several rounds, each of its own."""

    cpu: float
    """Seconds of processor time, of all threads together."""
    wall: float
    """Seconds by the clock."""


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Times of each variant over `rounds` turns, after one turn that does not count."""
    times: dict[str, list[Timing]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, call in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            timing = Timing(time.process_time() - cpu, time.perf_counter() - wall)
            if turn:
                times[name].append(timing)
    return {
        name: Timing(min(timing.cpu for timing in all_times), min(timing.wall for timing in all_times))
        for name, all_times in times.items()
    }


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module | None = None) -> int:
    """Bytes of distinct storages that the graph of `forward` keeps for its backward pass, parameters not counted."""
    known: set[int] = set() if model is None else {key for p in model.parameters() for key in _storages(p)}
    storages: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storages.update((key, size) for key, size in _storages(tensor).items() if key not in known)
        held.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storages.values())


def _storages(tensor: Tensor) -> dict[int, int]:
    """Address and bytes of a tensor's storage, of its parts' where it is a subclass that wraps others."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        parts = [getattr(tensor, name) for name in flatten()[0]]
        return {key: size for part in parts for key, size in _storages(part).items()}
    storage = tensor.untyped_storage()
    return {storage.data_ptr(): storage.nbytes()}


def allocated_peak(call: Callable[[], object]) -> int:
    """Largest running sum of the CPU allocator's events during `call`, in bytes: what it needs beyond its inputs."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler
    events = results.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    current = peak = 0
    for _, change in changes:
        current += change
        peak = max(peak, current)
    return peak


def relative_error(mine: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of the reference, over all tensors together, in double precision."""
    squares = [
        (float((a.double() - b.double()).square().sum()), float(b.double().square().sum()))
        for a, b in zip(mine, reference, strict=True)
    ]
    return (sum(square for square, _ in squares) / sum(square for _, square in squares)) ** 0.5


def gradients(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the gradients, in float32; every leaf must have one."""
    copies: list[Tensor] = []
    for leaf in leaves:
        assert leaf.grad is not None
        copies.append(leaf.grad.detach().float().clone())
    return copies


@dataclass(frozen=True)
class Variant:
    """One way to compute a value and its gradients."""

    run: Callable[[], object]
    """Forward and backward; gradients are left in the leaves."""
    leaves: Sequence[Tensor]

    def __call__(self) -> None:
        """One run from clean leaves."""
        for leaf in self.leaves:
            leaf.grad = None
        self.run()

    def gradients(self) -> list[Tensor]:
        """Gradients of one run, in float32."""
        self()
        return gradients(self.leaves)


def comparison(variants: Mapping[str, Variant], rounds: int, reference: Sequence[Tensor]) -> str:
    """A Markdown table of times, peaks and gradient errors; ratios are to the first variant."""
    errors = {name: relative_error(variant.gradients(), reference) for name, variant in variants.items()}
    peaks: dict[str, int] = {}
    for name, variant in variants.items():
        for leaf in variant.leaves:
            leaf.grad = None
        peaks[name] = allocated_peak(variant.run)
    times = interleaved(variants, rounds)
    first = next(iter(variants))
    lines = [
        "| variant | CPU s | ratio | wall s | ratio | peak MiB | ratio | gradient error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, timing in times.items():
        lines.append(
            f"| {name} | {timing.cpu:.3f} | {timing.cpu / times[first].cpu:.3f} | {timing.wall:.3f} | "
            f"{timing.wall / times[first].wall:.3f} | {peaks[name] / MIB:.0f} | {peaks[name] / peaks[first]:.3f} | "
            f"{errors[name]:.1e} |"
        )
    return "\n".join(lines) + "\n"
