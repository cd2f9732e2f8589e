"""Zero-padding: a wider model that computes the same function, for formats whose blocks do not divide the widths.

The residual stream, the FFN and the heads grow by zeros. Heads are added as whole groups, a key-value head with its
query heads, behind the old ones: a new head attends evenly to zero values and hands nothing on, whereas a new query
head in an old group would hand on the mean of that group's values and so disturb the norm that follows. New channels
stay zero through every block. A norm over d of d' channels sees its
mean square shrink by d / d', so its gain is multiplied by sqrt(d / d') and its epsilon by d / d'.

A model has one epsilon. It follows the residual stream; a norm whose width grows by another ratio (the FFN's SubLN, or
a per-head norm, which never grows) then works with a slightly different one, and `Padding.epsilon_changes` says so.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from wrinklefree.models.config import Architecture, Placement
from wrinklefree.utils.errors import ConfigError

MAX_GROWTH = 1.5
"""Most that a width may grow: beyond it, a type of smaller blocks gives the smaller and faster file."""

_HIDDEN, _QUERY, _KEY, _INNER = "hidden", "query", "key", "inner"
_PROJECTIONS: dict[str, tuple[str, str]] = {
    "q_proj": (_QUERY, _HIDDEN),
    "k_proj": (_KEY, _HIDDEN),
    "v_proj": (_KEY, _HIDDEN),
    "o_proj": (_HIDDEN, _QUERY),
    "gate_proj": (_INNER, _HIDDEN),
    "up_proj": (_INNER, _HIDDEN),
    "down_proj": (_HIDDEN, _INNER),
}
"""Projection -> what its rows and its columns run over."""

_NORMS: dict[str, str] = {
    "input_layernorm": _HIDDEN,
    "post_attention_layernorm": _HIDDEN,
    "norm": _HIDDEN,
    "attn_sub_norm": _QUERY,
    "ffn_sub_norm": _INNER,
    **{f"{projection}_norm": columns for projection, (_, columns) in _PROJECTIONS.items()},
}
_PER_HEAD_NORMS = ("q_norm", "k_norm")
_TABLES = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class EpsilonChange:
    """A norm that works with another epsilon than it was trained with."""

    site: str
    trained: float
    effective: float

    @property
    def largest_relative_change(self) -> float:
        """Bound on the change of the norm's output, reached by a vanishing input."""
        return abs(math.sqrt(self.trained / self.effective) - 1)

    def relative_change_at(self, mean_square: float) -> float:
        """Bound on the change of the norm's output for inputs of at least this mean square."""
        return abs(math.sqrt((mean_square + self.trained) / (mean_square + self.effective)) - 1)


@dataclass(frozen=True)
class Padding:
    """Original and padded sizes of one model, and the way between them."""

    original: Architecture
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int

    @classmethod
    def none(cls, architecture: Architecture) -> "Padding":
        """Sizes as they are."""
        return cls(
            architecture,
            architecture.hidden_size,
            architecture.intermediate_size,
            architecture.num_attention_heads,
            architecture.num_key_value_heads,
        )

    @property
    def is_none(self) -> bool:
        """Whether nothing grows."""
        return self == Padding.none(self.original)

    @cached_property
    def padded(self) -> Architecture:
        """The wider architecture, with the epsilon that follows the residual stream."""
        original = self.original
        return original.model_copy(
            update={
                "hidden_size": self.hidden_size,
                "intermediate_size": self.intermediate_size,
                "num_attention_heads": self.num_attention_heads,
                "num_key_value_heads": self.num_key_value_heads,
                "rms_norm_eps": original.rms_norm_eps * original.hidden_size / self.hidden_size,
            }
        )

    def epsilon_changes(self, placement: Placement) -> list[EpsilonChange]:
        """Norms that the one epsilon of the padded model does not fit exactly; empty where padding is exact."""
        trained = self.original.rms_norm_eps
        sites: dict[str, str] = {}
        if placement == "output":
            sites = {"attn_sub_norm": _QUERY, "ffn_sub_norm": _INNER}
        elif placement == "per_projection":
            sites = {"o_proj_norm": _QUERY, "down_proj_norm": _INNER}
        ratios = {site: self._ratio(axis) for site, axis in sites.items()}
        if self.original.qk_norm:
            ratios |= dict.fromkeys(_PER_HEAD_NORMS, 1.0)
        changes = []
        for site, ratio in ratios.items():
            effective = self.padded.rms_norm_eps / ratio
            if not math.isclose(effective, trained, rel_tol=1e-9):
                changes.append(EpsilonChange(site, trained, effective))
        return changes

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Padded shape of a parameter with this name and shape."""
        axes = _axes(name)
        return tuple(size if axis is None else self._padded_size(axis) for axis, size in zip(axes, shape, strict=True))

    def pad(self, name: str, values: Tensor) -> Tensor:
        """A parameter, or its ternary codes, with zeros where the padded model has more; norm gains are rescaled."""
        if self.is_none:
            return values
        values = self._rescaled(name, values, inverse=False)
        for dimension, axis in enumerate(_axes(name)):
            if axis is not None and values.shape[dimension] != self._padded_size(axis):
                shape = list(values.shape)
                shape[dimension] = self._padded_size(axis)
                wider = values.new_zeros(shape)
                wider.narrow(dimension, 0, values.shape[dimension]).copy_(values)
                values = wider
        return values

    def unpad(self, name: str, values: Tensor) -> Tensor:
        """The original parameter out of a padded one."""
        if self.is_none:
            return values
        for dimension, axis in enumerate(_axes(name)):
            if axis is not None:
                values = values.narrow(dimension, 0, self._original_size(axis))
        return self._rescaled(name, values, inverse=True)

    def rescales(self, name: str) -> bool:
        """Whether a parameter is a gain that padding multiplies, so that unpadding returns it with a rounding error."""
        axis = _NORMS.get(_module(name))
        return axis is not None and self._ratio(axis) != 1.0

    def _rescaled(self, name: str, values: Tensor, *, inverse: bool) -> Tensor:
        if not self.rescales(name):
            return values
        factor = math.sqrt(self._ratio(_NORMS[_module(name)]))
        return (values.double() * (1 / factor if inverse else factor)).to(values.dtype)

    def _ratio(self, axis: str) -> float:
        """Original width of an axis as a share of the padded one."""
        return self._original_size(axis) / self._padded_size(axis)

    def _padded_size(self, axis: str) -> int:
        sizes = {
            _HIDDEN: self.hidden_size,
            _INNER: self.intermediate_size,
            _QUERY: self.num_attention_heads * self.original.head_dim,
            _KEY: self.num_key_value_heads * self.original.head_dim,
        }
        return sizes[axis]

    def _original_size(self, axis: str) -> int:
        original = self.original
        sizes = {
            _HIDDEN: original.hidden_size,
            _INNER: original.intermediate_size,
            _QUERY: original.num_attention_heads * original.head_dim,
            _KEY: original.num_key_value_heads * original.head_dim,
        }
        return sizes[axis]


def plan_padding(architecture: Architecture, placement: Placement, block: int, *, square: bool) -> Padding:
    """The smallest padding with which every projection's columns are a multiple of `block`.

    Args:
        architecture: The model.
        placement: Where SubLN norms stand; where one reads the FFN, the FFN grows by the residual stream's ratio if that
            divides too, so that one epsilon fits both.
        block: Weights a block along a row.
        square: Whether query heads times head_dim must equal the hidden size.

    Raises:
        ConfigError: some width would grow by more than `MAX_GROWTH`.
    """
    hidden, inner, head_dim = architecture.hidden_size, architecture.intermediate_size, architecture.head_dim
    group = architecture.num_attention_heads // architecture.num_key_value_heads
    groups = _round_up(architecture.num_key_value_heads, block // math.gcd(block, group * head_dim))
    width = groups * group * head_dim
    new_hidden = width if square else _round_up(hidden, block)
    new_inner = _round_up(inner, block)
    if placement != "none" and inner * new_hidden % hidden == 0 and inner * new_hidden // hidden % block == 0:
        new_inner = inner * new_hidden // hidden
    query = architecture.num_attention_heads * head_dim
    for what, old, new in (
        ("hidden size", hidden, new_hidden),
        ("query width", query, width),
        ("FFN", inner, new_inner),
    ):
        if new > MAX_GROWTH * old:
            raise ConfigError(
                f"the {what} of {old} would have to grow to {new} for blocks of {block} weights; "
                "use --type Q2_0 or Q4_0, whose blocks are smaller"
            )
    return Padding(architecture, new_hidden, new_inner, groups * group, groups)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _module(name: str) -> str:
    return name.split(".")[-2]


def _axes(name: str) -> tuple[str | None, ...]:
    """What each dimension of a parameter runs over; None: something that padding leaves alone."""
    module, kind = name.split(".")[-2:]
    if module in _TABLES:
        return (None, _HIDDEN)
    if module in _PER_HEAD_NORMS:
        return (None,)
    if module in _NORMS:
        return (_NORMS[module],)
    rows, columns = _PROJECTIONS[module]
    return (rows,) if kind == "bias" else (rows, columns)
