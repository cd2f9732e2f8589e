"""A ternary decoder in C's memory: built tensor by tensor, run by `NativeModel.step`.

Building needs one full-precision tensor at a time: each projection is ternarized, packed and let go. The embedding keeps
every bit (in 16 bits where those hold all its values), since looking a row up costs nothing; the head, which every token
reads as a whole, is stored in 8 bits a weight unless asked otherwise (4 bits lose some quality, docs/performance.md),
multiplied by 14-bit activations.
"""

import ctypes
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wrinklefree.models.attention import rotary_table
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.weights import EMBEDDING, HEAD
from wrinklefree.native.library import (
    BF16,
    F16,
    F32,
    INT4,
    INT8,
    ConfigRecord,
    LayerRecord,
    LinearRecord,
    chosen_isa,
    load_library,
)
from wrinklefree.native.pack import (
    HUGE_PAGE,
    PackedLinear,
    one_after_another,
    pack_bytes,
    pack_linear,
    pack_nibbles,
    padded_vector,
)
from wrinklefree.quantization.weight_quant import Ternary, ternarize
from wrinklefree.utils.errors import CheckpointError, ConfigError, EngineError

HeadType = Literal["int8", "int4", "f16", "f32"]
CacheType = Literal["f16", "int8", "f32"]

MAX_COLUMNS = 131072
"""Widest projection whose integer sums cannot overflow (csrc/kernels.h)."""
MAX_NIBBLE_COLUMNS = 32768
"""The same of a 4-bit head."""

ROWS_AT_ONCE = 4096

_PROJECTIONS = {
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "output",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
_SUBLNS = {"self_attn.attn_sub_norm": "output", "mlp.ffn_sub_norm": "down"} | {
    f"{name}_norm": field_name for name, field_name in _PROJECTIONS.items()
}
_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_norm": "query_norm",
    "self_attn.k_norm": "key_norm",
}
_STEP_PROBLEMS = {1: "number of tokens", 2: "token id", 3: "slot", 4: "position"}


@dataclass(frozen=True)
class NativeOptions:
    """How a model is held and run."""

    context_length: int
    """Positions of a slot; their cache is allocated at once and filled as used."""
    slots: int = 1
    """Sequences held at the same time."""
    max_tokens: int = 256
    """Most tokens of one step."""
    threads: int = 1
    cache: CacheType = "f16"
    isa: str | None = None
    """Instruction set; None takes $WRINKLEFREE_ENGINE_ISA, else the best of this CPU."""


@dataclass
class PackedModel:
    """A model's arrays in the engine's order, ready to be handed to C."""

    architecture: Architecture
    bitnet: BitNetSpec
    head: HeadType
    linears: dict[str, PackedLinear] = field(default_factory=dict)
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    embedding: NDArray[Any] | None = None
    """[V, D] in float32, float16, or bfloat16 as uint16."""
    head_rows: NDArray[Any] | None = None
    head_scales: NDArray[np.float32] | None = None

    @classmethod
    def from_model(cls, model: CausalLM, head: HeadType = "int8") -> "PackedModel":
        """Pack a model; it must be ternary."""
        if model.bitnet is None:
            raise ConfigError("the model is full precision and the CPU engine runs ternary ones; use the engine torch")
        named = ((name, parameter.detach()) for name, parameter in model.named_parameters())
        return cls.from_tensors(model.architecture, model.bitnet, named, head)

    @classmethod
    def from_tensors(
        cls,
        architecture: Architecture,
        bitnet: BitNetSpec,
        tensors: Iterable[tuple[str, Tensor | Ternary]],
        head: HeadType = "int8",
    ) -> "PackedModel":
        """Pack tensors one by one; names are those of `CausalLM`'s parameters.

        Args:
            architecture: What the model is.
            bitnet: How it is ternary.
            tensors: Projections are full-precision weights, or codes and scale.
            head: How the head is stored.

        Raises:
            CheckpointError: a tensor is missing, unexpected, misshapen or not finite.
            ConfigError: a projection is wider than integer sums allow.
        """
        widest = max(architecture.hidden_size, architecture.intermediate_size, _query_size(architecture))
        if widest > MAX_COLUMNS:
            raise ConfigError(f"the model has {widest} dimensions, the CPU engine runs up to {MAX_COLUMNS}; use torch")
        if head == "int4" and architecture.hidden_size > MAX_NIBBLE_COLUMNS:
            raise ConfigError(
                f"the model has {architecture.hidden_size} dimensions, a 4-bit head has up to {MAX_NIBBLE_COLUMNS}; use int8"
            )
        wanted = parameter_shapes(architecture, bitnet)
        packed = cls(architecture, bitnet, head)
        for name, tensor in tensors:
            if name == HEAD and architecture.tie_word_embeddings:
                continue
            shape = tuple(tensor.codes.shape if isinstance(tensor, Ternary) else tensor.shape)
            if wanted.pop(name, None) != shape:
                raise CheckpointError(f"{name} of shape {list(shape)} is not part of this model; write it again")
            if not bool(torch.isfinite(tensor.scale if isinstance(tensor, Ternary) else tensor).all()):
                raise CheckpointError(f"{name} holds values that are not finite; train or fetch the model again")
            packed._place(name, tensor)
        if wanted:
            raise CheckpointError(
                f"the model lacks {len(wanted)} tensors (first: {next(iter(wanted))}); write it again"
            )
        packed._attach_biases()
        packed.settle()
        if packed.head_rows is None:
            assert packed.embedding is not None
            packed._place_head(packed.embedding)
        return packed

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; a shared one counts once."""
        arrays = [*self.vectors.values(), self.embedding, self.head_rows, self.head_scales]
        arrays += [array for linear in self.linears.values() for array in (linear.tiles, linear.bias)]
        return sum({id(array): array.nbytes for array in arrays if array is not None}.values())

    def settle(self) -> None:
        """Lay small projections one after the other, in the order in which a step reads them.

        Each by itself would lie in small pages, and what is fetched ahead of one's end would not be the next one's start:
        4 to 9% of a 135M model's decoding.
        """
        order = [
            f"model.layers.{index}.{name}"
            for index in range(self.architecture.num_hidden_layers)
            for name in _PROJECTIONS
        ]
        small = [stem for stem in order if self.linears[stem].tiles.nbytes < HUGE_PAGE]
        copies = one_after_another([self.linears[stem].tiles for stem in small])
        for stem, tiles in zip(small, copies, strict=True):
            self.linears[stem] = replace(self.linears[stem], tiles=tiles)

    def _place(self, name: str, tensor: Tensor | Ternary) -> None:
        stem, _, kind = name.rpartition(".")
        if name == EMBEDDING:
            assert isinstance(tensor, Tensor)
            self.embedding = _exact_array(tensor)
        elif name == HEAD:
            assert isinstance(tensor, Tensor)
            self._place_head(_exact_array(tensor))
        elif stem.rpartition(".")[2].endswith("_proj") and kind == "weight":
            ternary = tensor if isinstance(tensor, Ternary) else ternarize(tensor)
            self.linears[stem] = pack_linear(ternary.codes.numpy(), float(ternary.scale))
        else:
            assert isinstance(tensor, Tensor)
            self.vectors[name] = padded_vector(tensor.to(torch.float32).numpy())

    def _place_head(self, weight: NDArray[Any]) -> None:
        """From an array of `_exact_array`'s."""
        if self.head == "int8":
            self.head_rows, self.head_scales = pack_bytes(weight, _as_float32)
            return
        if self.head == "int4":
            self.head_rows, self.head_scales = pack_nibbles(weight, _as_float32)
            return
        wanted = np.dtype(np.float32 if self.head == "f32" else np.float16)
        self.head_rows = weight if weight.dtype == wanted else np.ascontiguousarray(_as_float32(weight), dtype=wanted)

    def _attach_biases(self) -> None:
        for stem, linear in self.linears.items():
            bias = self.vectors.pop(f"{stem}.bias", None)
            if bias is not None:
                self.linears[stem] = replace(linear, bias=bias)


class NativeModel:
    """A model that runs: `step` is prefill, decode, and any mixture of both."""

    def __init__(self, packed: PackedModel, options: NativeOptions) -> None:
        """Hand a model to C.

        Raises:
            ConfigError: the instruction set is not one of this CPU, or the model's warm-up is not complete.
            EngineError: there is no library, or not enough memory.
        """
        self.packed, self.options = packed, options
        self.vocab_size = packed.architecture.vocab_size
        library = load_library()
        # C keeps addresses: what they point to must live as long as the model.
        cosines, sines = _rotary_arrays(packed.architecture, options.context_length)
        self._kept = (packed, cosines, sines, isa := chosen_isa(options.isa))
        layers = (LayerRecord * packed.architecture.num_hidden_layers)(
            *(_layer_record(packed, index) for index in range(packed.architecture.num_hidden_layers))
        )
        config = _config_record(packed, options, cosines, sines, isa)
        handle = library.wf_create(ctypes.byref(config), layers)
        if not handle:
            raise EngineError(
                f"the CPU engine could not take the model with {options.slots} slots of {options.context_length} "
                "positions; ask for fewer slots or a shorter context"
            )
        self._library, self._handle = library, handle
        self._finalizer = weakref.finalize(self, library.wf_free, handle)

    def step(
        self, ids: Sequence[int], slots: Sequence[int], positions: Sequence[int], wanted: Sequence[int]
    ) -> NDArray[np.float32]:
        """Feed tokens: `ids[i]` at `positions[i]` of sequence `slots[i]`; logits [len(wanted), V] of the tokens `wanted`.

        Tokens of one slot follow each other; its first may go back to an earlier position, which forgets the rest. No
        bit of a token's logits depends on what else is in the step. Not for two threads at once.

        Raises:
            EngineError: a number is out of range, or a position leaves a gap.
        """
        arrays = [np.ascontiguousarray(values, dtype=np.int32) for values in (ids, slots, positions, wanted)]
        if not len(arrays[0]) == len(arrays[1]) == len(arrays[2]):
            raise EngineError(f"a step has {len(ids)} tokens, {len(slots)} slots and {len(positions)} positions")
        logits = np.empty((len(wanted), self.vocab_size), np.float32)
        address = [array.ctypes.data for array in arrays]
        problem = self._library.wf_step(
            self._living(), len(ids), *address[:3], len(wanted), address[3], logits.ctypes.data
        )
        if problem:
            raise EngineError(f"the CPU engine refused a step: {_STEP_PROBLEMS[problem]} out of range")
        return logits

    def logits(self, ids: Sequence[int], *, chunk: int | None = None, slot: int = 0) -> NDArray[np.float32]:
        """Logits [T, V] of a sequence from its start, fed in chunks."""
        size = self.options.max_tokens if chunk is None else chunk
        parts: list[NDArray[np.float32]] = []
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            count = len(part)
            parts.append(self.step(part, [slot] * count, range(start, start + count), range(count)))
        return np.concatenate(parts)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Let slot `target` hold the first `length` positions of slot `source`."""
        problem = self._library.wf_copy_prefix(self._living(), source, target, length)
        if problem:
            raise EngineError(f"the CPU engine refused to copy a prefix: {_STEP_PROBLEMS[problem]} out of range")

    def close(self) -> None:
        """Free the cache and the threads; the packed weights go with their last reference."""
        self._finalizer()

    def _living(self) -> int:
        if not self._finalizer.alive:
            raise EngineError("the model was closed; open it again")
        return self._handle


def _query_size(architecture: Architecture) -> int:
    return architecture.num_attention_heads * architecture.head_dim


def parameter_shapes(architecture: Architecture, bitnet: BitNetSpec) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes of the `CausalLM` of this architecture."""
    hidden, inner, head_dim = architecture.hidden_size, architecture.intermediate_size, architecture.head_dim
    query, key = _query_size(architecture), architecture.num_key_value_heads * head_dim
    sizes = [(query, hidden), (key, hidden), (key, hidden), (hidden, query), (inner, hidden), (inner, hidden)]
    projections = dict(zip(_PROJECTIONS, [*sizes, (hidden, inner)], strict=True))
    attention, output, mlp = architecture.attention_bias, architecture.attention_output_bias, architecture.mlp_bias
    has_bias = dict(zip(_PROJECTIONS, [attention, attention, attention, output, mlp, mlp, mlp], strict=True))
    block: dict[str, tuple[int, ...]] = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    if architecture.qk_norm:
        block |= {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
    if bitnet.placement == "output":
        block |= {"self_attn.attn_sub_norm": (query,), "mlp.ffn_sub_norm": (inner,)}
    if bitnet.placement == "per_projection":
        block |= {f"{name}_norm": (columns,) for name, (_, columns) in projections.items()}
    shapes = {EMBEDDING: (architecture.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not architecture.tie_word_embeddings:
        shapes[HEAD] = (architecture.vocab_size, hidden)
    for index in range(architecture.num_hidden_layers):
        prefix = f"model.layers.{index}."
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in (block | projections).items()}
        shapes |= {f"{prefix}{name}.bias": projections[name][:1] for name in projections if has_bias[name]}
    return shapes


def _exact_array(tensor: Tensor) -> NDArray[Any]:
    """float16, or bfloat16 as uint16, where either holds every value; else float32."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy()
    for dtype in (torch.float16, torch.bfloat16):
        # By parts: whole copies of an embedding would be the peak of loading.
        if all(torch.equal(part.to(dtype).to(part.dtype), part) for part in tensor.split(ROWS_AT_ONCE)):
            narrow = tensor.to(dtype).contiguous()
            return narrow.numpy() if dtype == torch.float16 else narrow.view(torch.uint16).numpy()
    return tensor.to(torch.float32).contiguous().numpy()


def _as_float32(array: NDArray[Any]) -> NDArray[np.float32]:
    if array.dtype == np.uint16:
        return torch.from_numpy(array).view(torch.bfloat16).to(torch.float32).numpy()
    return array.astype(np.float32, copy=False)


def _rotary_arrays(architecture: Architecture, context: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines [context, head_dim / 2], from the function that training uses."""
    tables = rotary_table(architecture, torch.arange(context)[None])
    half = architecture.head_dim // 2
    cosines, sines = (np.ascontiguousarray(table[0, 0, :, :half].numpy()) for table in tables)
    return cosines, sines


def _address(array: NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data


def _linear_record(linear: PackedLinear, norm: NDArray[np.float32] | None) -> LinearRecord:
    blocks, groups, _ = linear.tiles.shape
    return LinearRecord(
        _address(linear.tiles), _address(linear.bias), _address(norm), linear.scale, blocks * 64, groups * 4
    )


def _layer_record(packed: PackedModel, index: int) -> LayerRecord:
    prefix = f"model.layers.{index}."
    norms: dict[str, NDArray[np.float32]] = {
        target: packed.vectors[f"{prefix}{name}.weight"]
        for name, target in _SUBLNS.items()
        if f"{prefix}{name}.weight" in packed.vectors
    }
    record = LayerRecord()
    for name, target in _NORMS.items():
        setattr(record, target, _address(packed.vectors.get(f"{prefix}{name}.weight")))
    for name, target in _PROJECTIONS.items():
        setattr(record, target, _linear_record(packed.linears[prefix + name], norms.get(target)))
    return record


def _config_record(
    packed: PackedModel,
    options: NativeOptions,
    cosines: NDArray[np.float32],
    sines: NDArray[np.float32],
    isa: bytes,
) -> ConfigRecord:
    architecture, bits = packed.architecture, packed.bitnet.activation_bits
    assert packed.embedding is not None
    return ConfigRecord(
        vocabulary=architecture.vocab_size,
        hidden=architecture.hidden_size,
        inner=architecture.intermediate_size,
        layers=architecture.num_hidden_layers,
        heads=architecture.num_attention_heads,
        key_heads=architecture.num_key_value_heads,
        head_dim=architecture.head_dim,
        squared_relu=architecture.hidden_act == "relu2",
        code_max=0 if bits is None else 2 ** (bits - 1) - 1,
        eps=architecture.rms_norm_eps,
        context=options.context_length,
        slots=options.slots,
        max_tokens=options.max_tokens,
        cache_type={"f32": F32, "f16": F16, "int8": INT8}[options.cache],
        embedding_type={"f": {4: F32, 2: F16}, "u": {2: BF16}}[packed.embedding.dtype.kind][packed.embedding.itemsize],
        head_type={"f32": F32, "f16": F16, "int8": INT8, "int4": INT4}[packed.head],
        threads=options.threads,
        isa=isa,
        embedding=_address(packed.embedding),
        head=_address(packed.head_rows),
        head_scales=_address(packed.head_scales),
        final_norm=_address(packed.vectors["model.norm.weight"]),
        cosines=_address(cosines),
        sines=_address(sines),
    )
