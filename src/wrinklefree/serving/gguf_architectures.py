"""Which GGUF architecture holds which model, for which runtime, in which types: one table.

A runtime that meets a feature it does not know may ignore it and answer nonsense, so a model goes under a stock name
only if the stock runtime computes exactly its function. Everything else goes under the name `wrinklefree`, which stock
runtimes refuse and this library's engines run.

`qwen3` of BitNet.cpp (2026) carries a norm before any projection. Its files were checked against this library's reader
and the shapes that BitNet.cpp's source demands, not run in it.
"""

import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from wrinklefree.models.config import Architecture, BitNetSpec, Placement
from wrinklefree.utils.errors import ConfigError

TargetName = Literal["llama.cpp", "bitnet.cpp", "wrinklefree"]
TARGETS: tuple[TargetName, ...] = ("llama.cpp", "bitnet.cpp", "wrinklefree")
"""Most portable first: the order in which `auto` takes them."""

CpuFamily = Literal["x86", "arm"]

DENSE = ("F16", "BF16", "F32")
UPSTREAM_TERNARY = ("TQ2_0", "TQ1_0", "Q2_0", "Q4_0")
"""In the order in which they are taken when no type is asked for."""

Obstacles = Callable[[Architecture], Iterator[str]]


_PLACEMENTS: Mapping[Placement, str] = {
    "none": "no SubLN",
    "output": "SubLN before o_proj and down_proj",
    "per_projection": "SubLN in all projections",
}


@dataclass(frozen=True)
class GGUFArchitecture:
    """One row: a name in `general.architecture`, for one runtime."""

    name: str
    target: TargetName
    ternary_types: tuple[str, ...]
    """First the one taken when none is asked for."""
    placements: tuple[Placement, ...]
    """Where SubLN norms may stand."""
    switches: Obstacles
    """What else the runtime does not do under this name, each as the end of "it has ..."."""
    square: bool = False
    """Whether heads times head_dim must equal the hidden size."""
    norms_at_inputs: bool = False
    """Whether SubLN norms are spelled as norms of projection inputs (`attn_output_norm_in`)."""

    def obstacles(self, architecture: Architecture, placement: Placement) -> list[str]:
        """What keeps a model out of this row, each as the end of "it has ..."."""
        norms = [] if placement in self.placements else [_PLACEMENTS[placement]]
        return [*norms, *self.switches(architecture)]

    @property
    def rotary_pairs_joined(self) -> bool:
        """Whether the rows of q and k are stored pair by pair."""
        return self.name == "llama"


def _activation(architecture: Architecture) -> Iterator[str]:
    if architecture.hidden_act != "silu":
        yield "squared ReLU instead of SiLU"


def _biases(architecture: Architecture) -> Iterator[str]:
    if architecture.attention_bias or architecture.attention_output_bias or architecture.mlp_bias:
        yield "biases"


def _query_key_norms(architecture: Architecture) -> Iterator[str]:
    if architecture.qk_norm:
        yield "norms on q and k"


def _rope_scaling(architecture: Architecture) -> Iterator[str]:
    if architecture.rope_scaling is not None:
        yield "llama3 rope scaling"


def _head_width(architecture: Architecture) -> Iterator[str]:
    width = architecture.num_attention_heads * architecture.head_dim
    if width != architecture.hidden_size:
        heads = f"{architecture.num_attention_heads} heads x {architecture.head_dim}"
        yield f"{heads} = {width} beside {architecture.hidden_size} channels"


def _bitnet(architecture: Architecture) -> Iterator[str]:
    yield from _activation(architecture)
    yield from _biases(architecture)
    yield from _query_key_norms(architecture)
    yield from _head_width(architecture)
    yield from _rope_scaling(architecture)
    if not architecture.tie_word_embeddings:
        yield "a head of its own (not tied to the embedding)"


def _llama(architecture: Architecture) -> Iterator[str]:
    yield from _activation(architecture)
    yield from _query_key_norms(architecture)
    yield from _biases(architecture)


def _qwen2(architecture: Architecture) -> Iterator[str]:
    yield from _activation(architecture)
    yield from _query_key_norms(architecture)
    yield from _head_width(architecture)
    yield from _rope_scaling(architecture)
    if not architecture.attention_bias:
        yield "no biases on q, k and v"
    if architecture.attention_output_bias or architecture.mlp_bias:
        yield "biases outside of q, k and v"


def _qwen3(architecture: Architecture) -> Iterator[str]:
    yield from _activation(architecture)
    yield from _biases(architecture)
    yield from _rope_scaling(architecture)
    if not architecture.qk_norm:
        yield "no norms on q and k"


def _nothing(architecture: Architecture) -> Iterator[str]:
    yield from ()


_BITNET_CPP_TERNARY = ("I2_S", "TQ2_0", "TQ1_0")

ARCHITECTURES: tuple[GGUFArchitecture, ...] = (
    GGUFArchitecture("bitnet", "llama.cpp", UPSTREAM_TERNARY, ("output",), _bitnet, square=True),
    GGUFArchitecture("llama", "llama.cpp", UPSTREAM_TERNARY, ("none",), _llama),
    GGUFArchitecture("qwen2", "llama.cpp", UPSTREAM_TERNARY, ("none",), _qwen2, square=True),
    GGUFArchitecture("qwen3", "llama.cpp", UPSTREAM_TERNARY, ("none",), _qwen3),
    GGUFArchitecture("bitnet", "bitnet.cpp", _BITNET_CPP_TERNARY, ("output",), _bitnet, square=True),
    GGUFArchitecture("llama", "bitnet.cpp", _BITNET_CPP_TERNARY, ("none",), _llama),
    GGUFArchitecture("qwen2", "bitnet.cpp", _BITNET_CPP_TERNARY, ("none",), _qwen2, square=True),
    GGUFArchitecture("qwen3", "bitnet.cpp", _BITNET_CPP_TERNARY, ("none",), _qwen3),
    GGUFArchitecture("qwen3", "bitnet.cpp", ("I2_S",), ("output", "per_projection"), _qwen3, norms_at_inputs=True),
    GGUFArchitecture("wrinklefree", "wrinklefree", (*UPSTREAM_TERNARY, "I2_S"), tuple(_PLACEMENTS), _nothing),
)


def choose_architecture(
    architecture: Architecture,
    bitnet: BitNetSpec | None,
    *,
    target: TargetName | Literal["auto"],
    weight_type: str | None,
) -> GGUFArchitecture:
    """The row that holds a model: of the target asked for, else of the most portable target that does.

    Args:
        architecture: The model.
        bitnet: How it is ternary; None: full precision.
        target: The runtime.
        weight_type: The type asked for; None leaves it to the row.

    Raises:
        ConfigError: no row does; names what blocks, and what would hold the model.
    """
    placement: Placement = "none" if bitnet is None else bitnet.placement
    wanted = TARGETS if target == "auto" else (target,)
    for row in ARCHITECTURES:
        if row.target in wanted and _takes(row, weight_type) and not row.obstacles(architecture, placement):
            return row
    # Only an explicit target comes here: `wrinklefree` holds every model in every type.
    rows = [row for row in ARCHITECTURES if row.target == target]
    holds = [row for row in ARCHITECTURES if not row.obstacles(architecture, placement)]
    others = dict.fromkeys(row.target for row in holds if row.target != target and _takes(row, weight_type))
    advice = " or ".join(f"--target {name}" for name in others)
    for row in rows:
        if not row.obstacles(architecture, placement):
            types = ", ".join([*row.ternary_types, *DENSE])
            raise ConfigError(
                f"{target} does not read type {weight_type} in a {row.name} file (it reads {types}); use {advice}"
            )
    closest = min(rows, key=lambda row: _distance(row, architecture, placement))
    features = ", ".join(closest.obstacles(architecture, placement))
    raise ConfigError(
        f"{target} does not run this model: it has {features}, which {target}'s {closest.name} (the closest) does not do; "
        f"use {advice}"
    )


def cpu_family(machine: str | None = None) -> CpuFamily:
    """The family of a processor as `platform.machine()` calls it; of this one by default."""
    name = (platform.machine() if machine is None else machine).lower()
    return "arm" if name.startswith(("arm", "aarch64")) else "x86"


def architecture_metadata(name: str, architecture: Architecture) -> Mapping[str, int | float]:
    """Sizes and constants under an architecture's prefix; `architecture` is the padded one."""
    return {
        f"{name}.vocab_size": architecture.vocab_size,
        f"{name}.context_length": architecture.max_position_embeddings,
        f"{name}.embedding_length": architecture.hidden_size,
        f"{name}.block_count": architecture.num_hidden_layers,
        f"{name}.feed_forward_length": architecture.intermediate_size,
        f"{name}.attention.head_count": architecture.num_attention_heads,
        f"{name}.attention.head_count_kv": architecture.num_key_value_heads,
        f"{name}.attention.key_length": architecture.head_dim,
        f"{name}.attention.value_length": architecture.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": architecture.rms_norm_eps,
        f"{name}.rope.dimension_count": architecture.head_dim,
        f"{name}.rope.freq_base": architecture.rope_theta,
    }


def _distance(row: GGUFArchitecture, architecture: Architecture, placement: Placement) -> tuple[bool, bool, int]:
    """How far a row is from a model: norms elsewhere, then a part that the model lacks, then the number of obstacles."""
    obstacles = row.obstacles(architecture, placement)
    return placement not in row.placements, any(text.startswith("no ") for text in obstacles), len(obstacles)


def _takes(row: GGUFArchitecture, weight_type: str | None) -> bool:
    return weight_type is None or weight_type in row.ternary_types or weight_type in DENSE
