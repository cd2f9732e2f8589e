"""A packed model on disk: later starts read it instead of packing again.

The file is a safetensors file whose arrays lie as C reads them. Projections and head, which every token reads whole, are
read into huge pages; the embedding, of which a token needs one row, stays mapped and costs memory only where it was used.
Files lie in the user's cache under names made of the model's files and the form asked for; the least recently used go first
when there are more than `MAX_BYTES`. $WRINKLEFREE_PACKED_CACHE names another folder, and 0 switches this off.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.native.pack import (
    COLUMNS,
    NIBBLE_BYTES,
    NIBBLE_COLUMNS,
    ROWS,
    PackedLinear,
    huge_array,
    padded,
)
from wrinklefree.serving.engine.native.model import HeadType, PackedModel, parameter_shapes

logger = logging.getLogger(__name__)

VARIABLE = "WRINKLEFREE_PACKED_CACHE"
LAYOUT = 1
"""Counts up when csrc/kernels.h changes its tiles."""
MIN_BYTES = 128 << 20
"""Smaller models are packed in a fraction of a second."""
MAX_BYTES = 32 << 30
ALIGNMENT = 64
SUFFIX = ".packed.safetensors"
_TYPES = {"U8": np.uint8, "U16": np.uint16, "F16": np.float16, "F32": np.float32}
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}
_EMBEDDING, _HEAD, _HEAD_SCALES = "embedding", "head", "head_scales"


class StaleFileError(Exception):
    """A packed file does not hold what this version expects of it; it is written again."""


def load_or_pack(
    sources: Sequence[Path],
    architecture: Architecture,
    bitnet: BitNetSpec,
    head: HeadType,
    pack: Callable[[], PackedModel],
) -> PackedModel:
    """The packed form of a model's files: from the cache if it was packed before, else packed now and kept.

    Args:
        sources: Files that the model is made of; another size or time of change is another model.
        architecture: What they hold.
        bitnet: How it is ternary.
        head: How the head is stored.
        pack: Packs it.
    """
    folder = cache_folder()
    if folder is None:
        return pack()
    path = folder / f"{_identity(sources, architecture, bitnet, head)}{SUFFIX}"
    kept = _read_kept(path, architecture, bitnet, head)
    if kept is not None:
        return kept
    packed = pack()
    if packed.nbytes < MIN_BYTES or not _keep(path, packed):
        return packed
    del packed  # the embedding need not stay in memory now
    return _read_kept(path, architecture, bitnet, head) or pack()


def _read_kept(path: Path, architecture: Architecture, bitnet: BitNetSpec, head: HeadType) -> PackedModel | None:
    try:
        packed = read_packed(path, architecture, bitnet, head)
        os.utime(path)
    except FileNotFoundError:
        return None
    except (OSError, StaleFileError) as error:
        logger.warning("%s cannot be used (%s); the model is packed again", path, error)
        return None
    return packed


def _keep(path: Path, packed: PackedModel) -> bool:
    try:
        write_packed(path, packed)
        _make_room(path)
    except OSError as error:
        logger.warning("the packed model was not kept as %s (%s); the next start packs it again", path, error)
        return False
    return True


def cache_folder() -> Path | None:
    """Where packed models are kept; None: nowhere."""
    named = os.environ.get(VARIABLE)
    if named == "0":
        return None
    return Path(named).expanduser() if named else user_cache_path("wrinklefree") / "packed"


def write_packed(path: Path, packed: PackedModel) -> None:
    """Write a packed model; the file appears when it is whole."""
    arrays = _arrays(packed)
    header: dict[str, Any] = {}
    offset = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes],
        }  # fmt: skip
        offset += array.nbytes
    scales = {stem: linear.scale for stem, linear in packed.linears.items()}
    header["__metadata__"] = {"layout": str(LAYOUT), "scales": json.dumps(scales)}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).data.cast("B"))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_packed(path: Path, architecture: Architecture, bitnet: BitNetSpec, head: HeadType) -> PackedModel:
    """A packed model out of its file.

    Raises:
        FileNotFoundError: there is none.
        StaleFileError: it is damaged, or of another layout or model.
    """
    expected, shapes = _expected(architecture, bitnet, head), parameter_shapes(architecture, bitnet)
    packed = PackedModel(architecture, bitnet, head)
    with path.open("rb") as file:
        try:
            entries, scales, start = _read_header(path, file.read(8), file)
            if _HEAD not in entries and architecture.tie_word_embeddings and head in ("f16", "f32"):
                del expected[_HEAD]  # is the embedding
            if set(entries) != set(expected):
                raise StaleFileError("it holds other arrays")
            for name, (shape, kinds) in expected.items():
                entry = entries[name]
                if tuple(entry["shape"]) != shape or entry["dtype"] not in kinds or entry["data_offsets"][0] < 0:
                    raise StaleFileError(f"its {name} has another shape, type or place")
                kind, offset = np.dtype(_TYPES[entry["dtype"]]), start + entry["data_offsets"][0]
                if name == _EMBEDDING and _HEAD in expected:
                    packed.embedding = np.memmap(path, kind, "r", offset, shape)
                    continue
                array = huge_array(shape, kind)
                file.seek(offset)
                if file.readinto(array.data.cast("B")) != array.nbytes:
                    raise StaleFileError(f"its {name} is cut short")
                _place(packed, name, array, scales, shapes)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StaleFileError(f"its header is damaged: {error!r}") from error
    packed.settle()
    if packed.head_rows is None:
        packed.head_rows = packed.embedding
    return packed


def _read_header(path: Path, length: bytes, file: Any) -> tuple[dict[str, Any], dict[str, float], int]:
    """Entries by name, scales of projections, and where the data starts."""
    size = int.from_bytes(length, "little")
    if len(length) != 8 or size > path.stat().st_size:
        raise StaleFileError("it is cut short")
    header = json.loads(file.read(size))
    metadata = header.pop("__metadata__")
    if metadata["layout"] != str(LAYOUT):
        raise StaleFileError(f"it has layout {metadata['layout']}, this version writes {LAYOUT}")
    scales = {stem: float(scale) for stem, scale in json.loads(metadata["scales"]).items()}
    return header, scales, 8 + size


def _arrays(packed: PackedModel) -> dict[str, NDArray[Any]]:
    """What is stored, large arrays first; a head that is the embedding is stored once."""
    assert packed.embedding is not None
    assert packed.head_rows is not None
    arrays: dict[str, NDArray[Any]] = {_EMBEDDING: packed.embedding}
    if packed.head_rows is not packed.embedding:
        arrays[_HEAD] = packed.head_rows
    arrays |= {f"{stem}.tiles": linear.tiles for stem, linear in packed.linears.items()}
    if packed.head_scales is not None:
        arrays[_HEAD_SCALES] = packed.head_scales
    arrays |= packed.vectors
    return arrays | {
        f"{stem}.bias": bias for stem, linear in packed.linears.items() if (bias := linear.bias) is not None
    }


def _expected(
    architecture: Architecture, bitnet: BitNetSpec, head: HeadType
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and possible types of every array: C trusts them."""
    vocabulary, hidden = architecture.vocab_size, architecture.hidden_size
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        _EMBEDDING: ((vocabulary, hidden), ("F32", "F16", "U16"))
    }
    blocks = padded(vocabulary) // ROWS
    if head == "int8":
        expected[_HEAD] = ((blocks, padded(hidden, COLUMNS) // COLUMNS, ROWS * COLUMNS), ("U8",))
    elif head == "int4":
        expected[_HEAD] = ((blocks, padded(hidden, NIBBLE_COLUMNS) // NIBBLE_COLUMNS, NIBBLE_BYTES), ("U8",))
    else:
        expected[_HEAD] = ((vocabulary, hidden), ({"f32": "F32", "f16": "F16"}[head],))
    if head in ("int8", "int4"):
        expected[_HEAD_SCALES] = ((padded(vocabulary),), ("F32",))
    for name, shape in parameter_shapes(architecture, bitnet).items():
        if name.endswith("_proj.weight"):
            rows, columns = shape
            tiles = (padded(rows) // ROWS, padded(columns, COLUMNS) // COLUMNS, ROWS)
            expected[f"{name.removesuffix('.weight')}.tiles"] = (tiles, ("U8",))
        elif len(shape) == 1:
            expected[name] = ((padded(shape[0]),), ("F32",))
    return expected


def _place(
    packed: PackedModel,
    name: str,
    array: NDArray[Any],
    scales: dict[str, float],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    stem, _, kind = name.rpartition(".")
    if name == _EMBEDDING:
        packed.embedding = array
    elif name == _HEAD:
        packed.head_rows = array
    elif name == _HEAD_SCALES:
        packed.head_scales = array
    elif kind == "tiles":
        rows, columns = shapes[f"{stem}.weight"]
        packed.linears[stem] = PackedLinear(array, scales[stem], rows, columns)
    elif kind == "bias":
        linear = packed.linears[stem]
        packed.linears[stem] = PackedLinear(linear.tiles, linear.scale, linear.rows, linear.columns, array)
    else:
        packed.vectors[name] = array


def _identity(sources: Sequence[Path], architecture: Architecture, bitnet: BitNetSpec, head: HeadType) -> str:
    files = [(str(source.resolve()), source.stat().st_size, source.stat().st_mtime_ns) for source in sources]
    parts = (LAYOUT, files, architecture.model_dump_json(), bitnet.model_dump_json(), head)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _make_room(newest: Path) -> None:
    """Delete what was used longest ago until the rest fits; never the file just written."""
    files = sorted(newest.parent.glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime)
    total = sum(file.stat().st_size for file in files)
    for file in files:
        if total <= MAX_BYTES:
            return
        if file != newest:
            total -= file.stat().st_size
            file.unlink(missing_ok=True)
