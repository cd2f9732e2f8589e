"""Tensors by name into a `CausalLM`, every one accounted for.

A loader that tolerates a missing tensor hands a partly random model to the next stage; here a missing, unexpected or
misshapen tensor is always an error.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.shards import rows_here
from wrinklefree.utils.errors import CheckpointError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_FREQUENCIES = "rotary_emb.inv_freq"
"""Old Llama checkpoints store this constant of the architecture."""

Cut = Callable[[CausalLM], None]
"""Cuts a model on the meta device over processes, and gives this process's part memory."""


class StoredTensor:
    """A tensor in a safetensors file, of which rows are read as they are asked for."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._stored.get_shape())

    def __getitem__(self, rows: slice) -> Tensor:
        """The values of these rows."""
        return self._stored[rows]


def assemble(
    architecture: Architecture,
    bitnet: BitNetSpec | None,
    tensors: Iterable[tuple[str, Tensor | StoredTensor]],
    *,
    source: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    cut: Cut | None = None,
) -> CausalLM:
    """A model made of exactly these tensors, converted one by one (peak memory: the model and one tensor).

    Args:
        architecture: What the model is.
        bitnet: How it is ternary; None for full precision.
        tensors: Names and values; a tied model's redundant head is accepted when it equals the embedding.
        source: Where they come from, for messages.
        device: Where the parameters go.
        dtype: Of the parameters.
        cut: Cuts the empty model over processes and gives this one's rows memory; only they are then filled, and
            `device` and `dtype` are its matter.

    Raises:
        CheckpointError: tensors are missing, unexpected, doubled or misshapen: the count and the first names.
    """
    model = _empty_model(architecture, bitnet)
    if cut is not None:
        cut(model)
    parts = {name: rows_here(parameter) for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    head: Tensor | None = None
    unexpected: list[str] = []
    misshapen: list[str] = []
    for name, tensor in tensors:
        if name == HEAD and architecture.tie_word_embeddings:
            embedding = parts[EMBEDDING]
            head = tensor[embedding.start : embedding.stop]
        elif name.endswith(_FREQUENCIES):
            continue
        elif name not in parts or name in found:
            unexpected.append(name)
        elif tuple(tensor.shape) != parts[name].shape:
            misshapen.append(f"{name} is {list(tensor.shape)}, expected {list(parts[name].shape)}")
        elif cut is not None:
            part = parts[name]
            found[name] = part.local.copy_(tensor[part.start : part.stop])
        else:
            values = tensor if isinstance(tensor, Tensor) else tensor[:]
            found[name] = values.to(device=device, dtype=dtype, copy=True)
    wrong_shapes = {line.partition(" ")[0] for line in misshapen}
    missing = [name for name in parts if name not in found and name not in wrong_shapes]
    problems = [
        *_problem("missing", missing),
        *_problem("unexpected", unexpected),
        *_problem("of another shape", misshapen),
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems)}{_advice(missing, unexpected)}")
    if head is not None and not torch.equal(head.to(found[EMBEDDING]), found[EMBEDDING]):
        raise CheckpointError(
            f"{source} has an {HEAD} that differs from {EMBEDDING}, but the model ties them; "
            "set model.architecture.tie_word_embeddings=false"
        )
    if cut is not None:
        return model
    model.load_state_dict(found, strict=True, assign=True)
    return model.to(device)


def parameter_shapes(architecture: Architecture, bitnet: BitNetSpec | None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of such a model, which is not built; a tied head is not listed."""
    model = _empty_model(architecture, bitnet)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _empty_model(architecture: Architecture, bitnet: BitNetSpec | None) -> CausalLM:
    with torch.device("meta"), _NoRandomWeights():
        return CausalLM(architecture, bitnet)


class _NoRandomWeights(TorchFunctionMode):
    """Leaves out random initialisation, which on the meta device fills nothing and yet loads seconds of imports."""

    _skipped = frozenset({nn.init.normal_, nn.init.kaiming_uniform_, nn.init.uniform_, Tensor.normal_, Tensor.uniform_})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return the tensor as it is, or call the function."""
        named = kwargs or {}
        if func in self._skipped:
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def read_safetensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of safetensors files, read one at a time.

    Raises:
        CheckpointError: a file is missing, truncated, or not safetensors.
    """
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    yield name, tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {file} ({error}); fetch or write it again") from error


def read_rows(files: Sequence[Path]) -> Iterator[tuple[str, StoredTensor]]:
    """Names and tensors of safetensors files, of which only the rows that are asked for are read.

    Raises:
        CheckpointError: a file is missing, truncated, or not safetensors.
    """
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    yield name, StoredTensor(tensors.get_slice(name))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {file} ({error}); fetch or write it again") from error


def _problem(kind: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:3])
    return [f"{len(names)} {kind} ({shown}{', ...' if len(names) > 3 else ''})"]


def _advice(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    if any("sub_norm" in name or name.endswith("_proj_norm.weight") for name in [*missing, *unexpected]):
        return "; the SubLN placements differ: run training=stage1_subln again, or pass the artifact that it wrote"
    return "; check that model=... names the model that this checkpoint holds"
