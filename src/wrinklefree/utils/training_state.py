"""Nested training state as named tensors plus JSON, and back, bit for bit; no pickle.

`pack` walks a tree of dicts, lists and tuples. Tensors go out by name; everything else becomes JSON in which each
container is tagged with its kind, because JSON alone would turn integer keys into strings and tuples into lists.
"""

import logging
import random
from collections.abc import Mapping
from typing import Any, cast

import numpy
import torch
from torch import Tensor
from torch.optim import Optimizer

from wrinklefree.utils.distributed import world_size
from wrinklefree.utils.errors import CheckpointError

logger = logging.getLogger(__name__)

PackedState = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and the JSON-able rest."""


def pack(tree: Any, prefix: str) -> tuple[dict[str, Tensor], Any]:
    """Split `tree` into tensors, named by their path below `prefix`, and a JSON-able rest.

    A tensor that occurs several times (an 8-bit optimizer shares its quantile maps) is stored once and comes back as one.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def encode(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            if id(node) not in names:
                names[id(node)] = path
                tensors[path] = node
            return ["tensor", names[id(node)]]
        if node is None or isinstance(node, bool | int | float | str):
            return node
        if isinstance(node, Mapping):
            items = cast("Mapping[Any, Any]", node).items()
            return ["dict", [[encode(key, path), encode(value, f"{path}/{key}")] for key, value in items]]
        if isinstance(node, list | tuple):
            kind = "list" if isinstance(node, list) else "tuple"
            elements = enumerate(cast("list[Any] | tuple[Any, ...]", node))
            return [kind, [encode(element, f"{path}/{index}") for index, element in elements]]
        raise TypeError(f"{path}: cannot store a {type(node).__name__} in a checkpoint")

    return tensors, encode(tree, prefix)


def unpack(tensors: Mapping[str, Tensor], packed: Any) -> Any:
    """The tree that `pack` took apart; `tensors` may hold others too.

    Raises:
        CheckpointError: when a tensor is missing.
    """
    loaded: dict[str, Tensor] = {}

    def decode(node: Any) -> Any:
        if not isinstance(node, list):
            return node
        kind, content = cast("list[Any]", node)
        if kind == "tensor":
            if content not in loaded:
                if content not in tensors:
                    raise CheckpointError(
                        f"the checkpoint lacks the tensor {content}: it was written by another version"
                    )
                loaded[content] = tensors[content]
            return loaded[content]
        if kind == "dict":
            return {decode(key): decode(value) for key, value in content}
        elements = [decode(element) for element in content]
        return elements if kind == "list" else tuple(elements)

    return decode(packed)


def pack_optimizer_state(optimizer: Optimizer) -> PackedState:
    """The state of any optimizer whose `state_dict` holds tensors, numbers, strings, None and containers of them."""
    tensors, packed = pack(optimizer.state_dict(), "optimizer")
    return tensors, {"type": type(optimizer).__name__, "state": packed}


def unpack_optimizer_state(optimizer: Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Load what `pack_optimizer_state` returned; `tensors` may hold others too.

    Raises:
        CheckpointError: when it is the state of another kind of optimizer, or of other parameters.
    """
    if state["type"] != type(optimizer).__name__:
        raise CheckpointError(
            f"the checkpoint holds the state of {state['type']}, this run uses {type(optimizer).__name__}: set "
            "optimizer.type as it was, or start afresh with skip_recovery=true"
        )
    saved = unpack(tensors, state["state"])
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        raise CheckpointError(
            f"the checkpoint's optimizer state does not fit this model's parameters: {error}"
        ) from None


def rng_state() -> PackedState:
    """The random generators of this process: Python, NumPy, PyTorch on the CPU and on every CUDA device."""
    kind, keys, position, has_gauss, gauss = cast(
        "tuple[str, Any, int, int, float]", numpy.random.get_state(legacy=True)
    )
    devices = [torch.cuda.get_rng_state(device) for device in _cuda_devices()]
    tensors, packed = pack(
        {
            "python": random.getstate(),
            # 32-bit unsigned words; int64 holds them in a type that every tensor format has.
            "numpy": (kind, torch.tensor(keys.astype("int64")), int(position), int(has_gauss), float(gauss)),
            "torch": torch.get_rng_state(),
            "cuda": devices,
        },
        "rng",
    )
    return tensors, {"state": packed}


def restore_rng_state(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Put the generators back to where `rng_state` saw them; `tensors` may hold others too."""
    saved = unpack(tensors, state["state"])
    random.setstate(saved["python"])
    kind, keys, position, has_gauss, gauss = saved["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), position, has_gauss, gauss))
    torch.set_rng_state(saved["torch"])
    devices = _cuda_devices()
    if len(devices) != len(saved["cuda"]):
        logger.warning(
            "the checkpoint holds random states of %d CUDA devices, this machine has %d: the run continues with other "
            "random numbers on them",
            len(saved["cuda"]),
            len(devices),
        )
    for device, device_state in zip(devices, saved["cuda"], strict=False):
        torch.cuda.set_rng_state(device_state, device)


def _cuda_devices() -> list[int]:
    """All devices, or this process's own where several share a machine's: to ask for another's would occupy it."""
    if not torch.cuda.is_available():
        return []
    return list(range(torch.cuda.device_count())) if world_size() == 1 else [torch.cuda.current_device()]


def require_string_keys(node: Any, path: str) -> None:
    """Raise `TypeError` for a mapping key that JSON would silently turn into a string."""
    if isinstance(node, Mapping):
        for key, value in cast("Mapping[Any, Any]", node).items():
            if not isinstance(key, str):
                raise TypeError(f"{path}: key {key!r} is not a string and would come back as one")
            require_string_keys(value, f"{path}.{key}")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(cast("list[Any]", node)):
            require_string_keys(value, f"{path}[{index}]")
