"""What to change when memory runs out: overrides that fit, found by the estimator; and the error that offers them.

Out-of-memory errors strike anywhere: when weights are moved to the device, in a forward or backward pass, at the first
step of the optimizer (which makes its state), in an evaluation. `explain_out_of_memory` turns any of them into one line
with the peak, the batch and up to three overrides. Nothing is written on the way, so the last checkpoint is as it was;
overrides that keep the run's identity are offered first, because the same run then goes on from that checkpoint.

A process that the kernel kills for memory gets no chance to say anything.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wrinklefree.training.config import RunConfig, StageConfig
from wrinklefree.training.device_kinds import DEVICE_KINDS
from wrinklefree.training.estimator import HEADROOM, gib, workload_of
from wrinklefree.training.memory_model import peak_of_run
from wrinklefree.utils.distributed import world_size
from wrinklefree.utils.errors import OutOfMemoryError

_CPU_MESSAGES = ("can't allocate memory", "not enough memory", "cannot allocate memory", "std::bad_alloc")
OFFERED = 3


@dataclass(frozen=True)
class Advice:
    """Overrides that the estimator expects to fit."""

    overrides: tuple[str, ...]
    peak: int
    """Estimated bytes of a device."""
    keeps_identity: bool
    """Whether the run stays the same one, so that it resumes."""
    keeps_mathematics: bool
    """Whether the same numbers are computed, up to rounding."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _CPU_MESSAGES)


@contextmanager
def explain_out_of_memory(config: RunConfig) -> Iterator[None]:
    """Raise `OutOfMemoryError` with advice in place of any out-of-memory error inside.

    Raises:
        OutOfMemoryError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # The frames of the failed step hold its tensors; the message needs none of them.
        error.__traceback__ = None
        message = describe(config, "cuda" if torch.cuda.is_available() else "cpu")
    else:
        return
    raise OutOfMemoryError(message)


def describe(config: RunConfig, device_type: str) -> str:
    """The line for the user: peak, batch, overrides."""
    training = config.training
    peak, total = _peak_bytes(device_type), _device_bytes(device_type)
    where = "the GPU" if device_type == "cuda" else "this machine"
    if not isinstance(training, StageConfig):
        return f"out of memory at a peak of {gib(peak)} of {gib(total)} of {where}: use a machine with more"
    batch = f"batch {training.batch_size} x {training.max_seq_length} tokens"
    batch += f", accumulation {training.gradient_accumulation_steps}"
    offers = advise(config, device_type=device_type, memory=total)
    head = (
        f"out of memory at a peak of {gib(peak)} of {gib(total)} of {where}, {batch}; the last checkpoint is intact. "
    )
    if not offers:
        return (
            head
            + "No setting of this run fits by estimate: use distributed=fsdp_large on several GPUs, or a smaller model"
        )
    return head + "Estimated to fit: " + "; or ".join(_say(offer) for offer in offers)


def _say(offer: Advice) -> str:
    effect = "resumes this run" if offer.keeps_identity else "a new run"
    if not offer.keeps_identity and offer.keeps_mathematics:
        effect += " with the same mathematics"
    return f"{' '.join(offer.overrides)} ({gib(offer.peak)}, {effect})"


def advise(config: RunConfig, *, device_type: str, memory: float, shards: int | None = None) -> list[Advice]:
    """Up to three changes of a stage that trains which fit `memory` bytes of a device, the least intrusive first."""
    if not isinstance(config.training, StageConfig):
        return []
    usable = memory * (1 - HEADROOM[device_type])
    fitting: list[Advice] = []
    offered: list[set[str]] = []
    for changes in _candidates(config):
        keys = set(changes)
        if any(earlier <= keys for earlier in offered):
            continue  # the least change of each kind is enough
        candidate, overrides = _changed(config, changes)
        peak = _estimated_peak(candidate, device_type, shards)
        if peak <= usable:
            offered.append(keys)
            identity = keys <= {"training.activation_checkpointing"}
            mathematics = not keys & {"training.max_seq_length", "optimizer.type"}
            fitting.append(Advice(overrides, peak, identity, mathematics))
        if len(fitting) == OFFERED:
            break
    return fitting


def _candidates(config: RunConfig) -> Iterator[dict[str, Any]]:
    """Changes to try: recomputing, then smaller micro-batches, then smaller optimizer state, then shorter rows."""
    training = config.training
    assert isinstance(training, StageConfig)
    splits = _smaller_batches(training.batch_size, training.gradient_accumulation_steps)
    batches: list[dict[str, Any]] = [{}, *splits]
    if not training.activation_checkpointing and config.distributed.activation_checkpointing != "full":
        again = {"training.activation_checkpointing": True}
        batches = [{}, again, *splits, *({**again, **split} for split in splits)]
    optimizers: list[dict[str, Any]] = [{}]
    if config.optimizer.type in {"auto", "adamw"}:
        optimizers += [{"optimizer.type": "adamw_8bit"}, {"optimizer.type": "apollo_mini"}]
    lengths: list[dict[str, Any]] = [{}]
    length = training.max_seq_length // 2
    while length >= 64:
        lengths.append({"training.max_seq_length": length})
        length //= 2
    for shorter in lengths:
        for smaller in optimizers:
            for batch in batches:
                changes = {**batch, **smaller, **shorter}
                if changes:
                    yield changes


def _smaller_batches(rows: int, accumulation: int) -> list[dict[str, Any]]:
    """The same rows a step in more micro-batches."""
    total = rows * accumulation
    return [
        {"training.batch_size": smaller, "training.gradient_accumulation_steps": total // smaller}
        for smaller in range(rows // 2, 0, -1)
        if total % smaller == 0 and rows % smaller == 0
    ]


def _changed(config: RunConfig, changes: dict[str, Any]) -> tuple[RunConfig, tuple[str, ...]]:
    sections: dict[str, dict[str, Any]] = {}
    overrides: list[str] = []
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
        overrides.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    updates = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=updates), tuple(overrides)


def _estimated_peak(config: RunConfig, device_type: str, shards: int | None) -> int:
    training = config.training
    assert isinstance(training, StageConfig)
    # Of the kind, only `type` enters the memory.
    kind = DEVICE_KINDS["h100_80gb" if device_type == "cuda" else "cpu_2_cores"]
    sharded = config.distributed.strategy == "fsdp"
    count = shards if shards is not None else (world_size() if sharded else 1)
    workload = workload_of(config, device=kind, devices=count, target_share=1.0)
    return peak_of_run(workload, warms_up=training.quantization_warmup.schedule != "none").total


def _peak_bytes(device_type: str) -> int:
    """Most memory that this process had so far."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _device_bytes(device_type: str) -> int:
    """Memory that this process may have: the GPU's, or the least of the machine's, its container's and its own limit."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[1]
    import psutil

    limits = [psutil.virtual_memory().total]
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft)
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        text = path.read_text().strip() if path.is_file() else "max"
        if text.isdigit():
            limits.append(int(text))
    return min(limits)
