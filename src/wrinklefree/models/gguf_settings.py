"""Settings in the headers of other people's GGUF files that change a model's function and that our model does not have.

A file of ours says in `wrinklefree.config` what it is; its header needs no guessing.
"""

from collections.abc import Iterator
from math import isclose, sqrt

from wrinklefree.models.gguf_names import ROPE_FACTORS
from wrinklefree.utils.gguf import GGUFFile

CONFIG_KEY = "wrinklefree.config"
"""JSON: `architecture` and `bitnet` as in an artifact's config.json."""


def foreign_settings(file: GGUFFile) -> Iterator[tuple[str, object]]:
    """Keys and values by which a file of others computes something that our model would not.

    A scaling factor without a type means linear scaling to runtimes, 0 or 1 none; an attention scale of 0 the usual one.
    """
    if CONFIG_KEY in file.metadata:
        return
    name = file.text("general.architecture")
    scaling = f"{name}.rope.scaling.type"
    if file.metadata.get(scaling, "none") != "none":
        yield scaling, file.metadata[scaling]
    if scaling not in file.metadata:
        for key in (f"{name}.rope.scaling.factor", f"{name}.rope.scale_linear"):
            if file.metadata.get(key, 0) not in (0, 1):
                yield key, file.metadata[key]
    if ROPE_FACTORS in file.tensors:
        yield "tensor", ROPE_FACTORS
    head_dim = _head_dim(file, name)
    if head_dim is None:
        return
    rotated = f"{name}.rope.dimension_count"
    if file.metadata.get(rotated, head_dim) != head_dim:
        yield rotated, file.metadata[rotated]
    scale_key = f"{name}.attention.scale"
    scale = file.metadata.get(scale_key, 0)
    if scale != 0 and not (isinstance(scale, int | float) and isclose(scale, 1 / sqrt(head_dim), rel_tol=1e-5)):
        yield scale_key, scale


def _head_dim(file: GGUFFile, name: str) -> int | None:
    """Channels a head; None where the header does not say, which others refuse."""
    said = file.metadata.get(f"{name}.attention.key_length")
    hidden, heads = (file.metadata.get(f"{name}.{key}") for key in ("embedding_length", "attention.head_count"))
    if said is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        said = hidden // heads
    return said if isinstance(said, int) and said > 0 else None
