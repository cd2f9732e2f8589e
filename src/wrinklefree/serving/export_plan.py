"""What a GGUF file of a model will hold: names, shapes, types, and how to make each tensor when its turn comes.

A plan is made before anything is written, so that whatever cannot be exported is refused at once. Tensors are read from
the checkpoint one at a time; the largest one sets the memory that a conversion takes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wrinklefree.models import gguf_names as names
from wrinklefree.models.attention import rotary_frequencies
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.padding import Padding
from wrinklefree.models.weights import EMBEDDING, HEAD
from wrinklefree.quantization.packing import TernaryFormat
from wrinklefree.quantization.weight_quant import ternarize
from wrinklefree.serving.dense_types import DENSE_TYPES, DenseType
from wrinklefree.serving.gguf_architectures import GGUFArchitecture
from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.gguf_blocks import FORMATS_BY_NAME

_CHUNK_VALUES = 1 << 24
"""Values converted at a time (64 MiB in float32)."""


class TensorSource:
    """Tensors of a safetensors file, mapped: reading one does not read the others."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {path} ({error}); fetch or write it again") from error
        self.names = frozenset(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._file.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """A whole tensor as stored."""
        return self._file.get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor as stored."""
        return self._file.get_slice(name)[start:stop]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file."""

    stored: str
    """The file's name."""
    name: str | None
    """Our parameter; None: a constant."""
    shape: tuple[int, ...]
    """Padded."""
    type: str
    is_ternary: bool
    produce: Callable[[], NDArray[np.uint8] | Iterator[NDArray[np.uint8]]]
    """Its bytes, whole or in pieces."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return FORMATS_BY_NAME[self.type].nbytes(self.shape)


@dataclass(frozen=True)
class ExportPlan:
    """How one model becomes one file."""

    architecture: Architecture
    bitnet: BitNetSpec | None
    row: GGUFArchitecture
    padding: Padding
    weight_format: TernaryFormat | DenseType
    table_type: DenseType
    """Of the embedding and the head."""
    fold_ffn_norm: bool
    """Whether ffn_norm's gain moves to the inputs of gate and up (see `tensors`)."""

    def tensors(self, source: TensorSource) -> Iterator[PlannedTensor]:
        """All tensors, in the order of the model.

        One revision of BitNet.cpp applies `ffn_down_norm_in` only where `ffn_gate_norm_in` exists. For it ffn_norm is
        written as 1 and its gain stands before gate and up: a norm of what a norm of gain 1 returns changes it by less
        than its epsilon.
        """
        placement = "none" if self.bitnet is None else self.bitnet.placement
        modules = names.module_names(placement, norms_at_inputs=self.row.norms_at_inputs)
        for name in _parameter_order(source.names, self.architecture):
            shape = self.padding.shape(name, source.shape(name))
            stored = names.stored_name(name, modules)
            if names.is_ternary_weight(name) and self.bitnet is not None:
                produce = partial(self._ternary, source, name)
                yield PlannedTensor(stored, name, shape, self._weight_type, True, produce)
            elif name in (EMBEDDING, HEAD):
                produce = partial(self._table, source, name)
                yield PlannedTensor(stored, name, shape, self.table_type.name, False, produce)
            elif names.is_ternary_weight(name):
                produce = partial(self._dense, source, name, self._dense_weight_type)
                yield PlannedTensor(stored, name, shape, self._weight_type, False, produce)
            else:
                yield from self._vectors(source, name, stored, shape)
        if self.architecture.rope_scaling is not None:
            divisors = _frequency_divisors(self.architecture)
            make = partial(_f32_bytes, divisors)
            yield PlannedTensor(names.ROPE_FACTORS, None, divisors.shape, "F32", False, make)

    def expected(self, source: TensorSource, name: str) -> tuple[NDArray[np.int8], float]:
        """Codes and scale of a ternary weight as the file must hold them: rounded before padding, rows reordered."""
        ternary = ternarize(source.tensor(name))
        scale = float(ternary.scale)
        if not np.isfinite(scale):
            raise CheckpointError(f"{source.path}: {name} holds NaN or infinity; export an earlier checkpoint")
        return self._arranged(name, self.padding.pad(name, ternary.codes)), scale

    def values(self, source: TensorSource, name: str) -> NDArray[np.float32]:
        """Values of a parameter that stays dense, padded and reordered."""
        values = source.tensor(name).to(torch.float32)
        if not bool(values.isfinite().all()):
            raise CheckpointError(f"{source.path}: {name} holds NaN or infinity; export an earlier checkpoint")
        return self._arranged(name, self.padding.pad(name, values))

    def rescaled_gains(self, source: TensorSource) -> NDArray[np.float32]:
        """Norm gains that padding rescales, as they are in the checkpoint, one behind the other in the tensors' order."""
        wanted = [name for name in _parameter_order(source.names, self.architecture) if self.padding.rescales(name)]
        return torch.cat([source.tensor(name).to(torch.float32) for name in wanted]).numpy()

    @property
    def _weight_type(self) -> str:
        form = self.weight_format
        return form.name if isinstance(form, DenseType) else form.gguf_type

    @property
    def _dense_weight_type(self) -> DenseType:
        assert isinstance(self.weight_format, DenseType), "a full-precision model has no ternary type"
        return self.weight_format

    def _ternary(self, source: TensorSource, name: str) -> NDArray[np.uint8]:
        codes, scale = self.expected(source, name)
        if isinstance(self.weight_format, DenseType):
            return self.weight_format.encode(codes * np.float32(scale)).reshape(-1)
        return self.weight_format.pack(codes, scale)

    def _dense(self, source: TensorSource, name: str, form: DenseType) -> NDArray[np.uint8]:
        values = self.values(source, name)
        return form.encode(values.reshape(-1, values.shape[-1])).reshape(-1)

    def _table(self, source: TensorSource, name: str) -> Iterator[NDArray[np.uint8]]:
        """An embedding or a head, some rows at a time: it is by far the largest tensor."""
        count, width = self.padding.shape(name, source.shape(name))
        step = max(1, _CHUNK_VALUES // width)
        for start in range(0, count, step):
            rows = source.rows(name, start, min(start + step, count)).to(torch.float32)
            if not bool(rows.isfinite().all()):
                raise CheckpointError(f"{source.path}: {name} holds NaN or infinity; export an earlier checkpoint")
            yield self.table_type.encode(self.padding.pad(name, rows).numpy())

    def _vectors(self, source: TensorSource, name: str, stored: str, shape: tuple[int, ...]) -> Iterator[PlannedTensor]:
        """A norm or a bias; ffn_norm may become three."""
        f32 = DENSE_TYPES["F32"]
        gain = partial(self._dense, source, name, f32)
        if not (self.fold_ffn_norm and stored.endswith(".ffn_norm.weight")):
            yield PlannedTensor(stored, name, shape, "F32", False, gain)
            return
        yield PlannedTensor(stored, None, shape, "F32", False, partial(_f32_bytes, np.ones(shape, np.float32)))
        for module in ("ffn_gate_norm_in", "ffn_up_norm_in"):
            yield PlannedTensor(stored.replace("ffn_norm", module), name, shape, "F32", False, gain)

    def _arranged(self, name: str, values: Tensor) -> NDArray[Any]:
        array = values.numpy()
        padded = self.padding
        heads = names.rotary_heads(name, padded.num_attention_heads, padded.num_key_value_heads)
        return names.join_rotary_pairs(array, heads) if self.row.rotary_pairs_joined and heads is not None else array


def _frequency_divisors(architecture: Architecture) -> NDArray[np.float32]:
    """What rope scaling divides each rotary frequency by, [head_dim / 2]."""
    cpu = torch.device("cpu")
    plain = rotary_frequencies(architecture.model_copy(update={"rope_scaling": None}), cpu)
    return (plain / rotary_frequencies(architecture, cpu)).numpy()


def _f32_bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return DENSE_TYPES["F32"].encode(values.reshape(1, -1)).reshape(-1)


def _parameter_order(found: frozenset[str], architecture: Architecture) -> list[str]:
    """Embedding, blocks first to last, final norm, head."""

    def key(name: str) -> tuple[int, int, str]:
        parts = name.split(".")
        if name == EMBEDDING:
            return (0, 0, name)
        if parts[1] == "layers":
            return (1, int(parts[2]), name)
        return (3 if name == HEAD else 2, 0, name)

    # An artifact may hold the head that it ties; runtimes want it once.
    return sorted((name for name in found if not (name == HEAD and architecture.tie_word_embeddings)), key=key)
