"""Files that are written, read back by three readers: ours, the `gguf` package's and ggml's own."""

import ctypes
import errno
import importlib.util
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wrinklefree.quantization.number_types import encode_values
from wrinklefree.quantization.packing import TERNARY_FORMATS
from wrinklefree.serving.gguf_writer import MetadataValue, TensorPlan, write_gguf
from wrinklefree.utils.errors import StorageError
from wrinklefree.utils.gguf import I2_S_LAYOUT_KEY, read_gguf
from wrinklefree.utils.gguf_blocks import TYPE_IDS

METADATA: dict[str, MetadataValue] = {
    "general.architecture": "bitnet",
    "general.name": "a name with an é and a 字",
    "bitnet.block_count": 3,
    "negative": -7,
    "large": np.uint64(2**40),
    "small": np.int8(-3),
    "epsilon": 1e-5,
    "double": np.float64(0.1),
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.tokens": ["<s>", "é", "", "\n"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "scores": [0.5, -1, 2],
    "flags": [True, False],
    "wide": np.array([1, 2**40], dtype=np.int64),
    "none": np.array([], dtype=np.int32),
}

VALUES = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
CODES = np.random.default_rng(1).integers(-1, 2, (5, 256), dtype=np.int8)


def number_plan(name: str, kind: str, values: np.ndarray = VALUES) -> TensorPlan:
    return TensorPlan(name, values.shape, kind, lambda: encode_values(values, kind))


def ternary_plan(name: str, kind: str, codes: np.ndarray = CODES, scale: float = 0.375) -> TensorPlan:
    entry = TERNARY_FORMATS[kind]
    return TensorPlan(name, codes.shape, entry.gguf_type, lambda: entry.pack(codes, scale))


PLANS = [
    *(number_plan(kind, kind) for kind in ("F32", "F16", "BF16", "Q8_0")),
    number_plan("vector", "F32", VALUES[0, :3]),
    *(ternary_plan(kind, kind) for kind in ("TQ1_0", "TQ2_0", "Q4_0")),
]
# Types that the `gguf` package does not know.
OWN_PLANS = [*PLANS, ternary_plan("Q2_0", "Q2_0"), ternary_plan("I2_S", "I2_S_X86")]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_gguf(path, {**METADATA, I2_S_LAYOUT_KEY: "x86"}, OWN_PLANS)
    return path


def test_our_reader_returns_what_was_written(written: Path) -> None:
    file = read_gguf(written)
    expected = {**METADATA, "epsilon": float(np.float32(1e-5)), I2_S_LAYOUT_KEY: "x86"}
    plain = {
        key: value.tolist() if isinstance(value, np.ndarray | np.generic) else value for key, value in expected.items()
    }
    assert file.metadata == plain
    assert list(file.tensors) == [plan.name for plan in OWN_PLANS]
    for plan in OWN_PLANS:
        assert (file.tensors[plan.name].shape, file.tensors[plan.name].type) == (plan.shape, plan.type)
        np.testing.assert_array_equal(file.raw(plan.name), plan.produce())
        assert file.tensors[plan.name].offset % 32 == 0
    np.testing.assert_array_equal(file.tensor("F32"), VALUES)
    for name in ("TQ1_0", "TQ2_0", "Q4_0", "Q2_0", "I2_S"):
        codes, scale = file.ternary(name)
        np.testing.assert_array_equal(codes, CODES)
        assert scale == np.float32(0.375)


def test_the_gguf_package_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, METADATA, PLANS)
    reader = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        if key == "none":
            continue  # The package has no value for an empty array.
        read = reader.fields[key].contents()
        expected = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        assert read == (float(np.float32(1e-5)) if key == "epsilon" else expected), key
    kinds = {
        "bitnet.block_count": "UINT32", "negative": "INT32", "large": "UINT64", "small": "INT8", "epsilon": "FLOAT32",
        "double": "FLOAT64", "tokenizer.ggml.add_bos_token": "BOOL", "general.name": "STRING",
    }  # fmt: skip
    assert {key: reader.fields[key].types[0].name for key in kinds} == kinds
    arrays = {
        "tokenizer.ggml.tokens": "STRING",
        "tokenizer.ggml.token_type": "INT32",
        "scores": "FLOAT32",
        "flags": "BOOL",
        "wide": "INT64",
    }
    assert {key: reader.fields[key].types[1].name for key in arrays} == arrays
    assert [tensor.name for tensor in reader.tensors] == [plan.name for plan in PLANS]
    for tensor, plan in zip(reader.tensors, PLANS, strict=True):
        assert tensor.tensor_type.name == plan.type
        assert tuple(reversed(tensor.shape.tolist())) == plan.shape
        np.testing.assert_array_equal(tensor.data.view(np.uint8).reshape(-1), plan.produce())


class _InitParams(ctypes.Structure):
    """gguf_init_params (gguf.h)."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def test_ggml_opens_the_file_and_finds_each_tensor(written: Path) -> None:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        pytest.skip("needs xllamacpp: its wheel holds ggml")
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    for function, restype in (("gguf_get_tensor_offset", ctypes.c_size_t), ("gguf_get_data_offset", ctypes.c_size_t)):
        getattr(library, function).restype = restype
    plans = [plan for plan in OWN_PLANS if plan.type != "I2_S"]
    path = written.with_name("stock.gguf")
    write_gguf(path, METADATA, plans)
    file = read_gguf(path)
    context = ctypes.c_void_p(library.gguf_init_from_file(str(path).encode(), _InitParams(True, None)))
    assert context.value is not None
    try:
        start = library.gguf_get_data_offset(context)
        for plan in plans:
            index = ctypes.c_int64(library.gguf_find_tensor(context, plan.name.encode()))
            assert index.value >= 0
            assert library.gguf_get_tensor_type(context, index) == TYPE_IDS[plan.type]
            assert start + library.gguf_get_tensor_offset(context, index) == file.tensors[plan.name].offset
    finally:
        library.gguf_free(context)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    metadata=st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda key: key != "general.alignment"),
        st.one_of(
            st.text(),
            st.booleans(),
            st.integers(-(2**31), 2**32 - 1),
            st.lists(st.text(), min_size=1, max_size=5),
            st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
            st.floats(width=32, allow_nan=False),
        ),
        max_size=6,
    ),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_any_metadata_and_shape_return(tmp_path: Path, metadata: dict[str, MetadataValue], shape: list[int]) -> None:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    path = tmp_path / "any.gguf"
    write_gguf(path, metadata, [number_plan("a", "F32", values), number_plan("b", "F16", values)])
    file = read_gguf(path)
    assert file.metadata == metadata
    np.testing.assert_array_equal(file.tensor("a"), values)
    np.testing.assert_array_equal(file.tensor("b"), values)


def test_alignment_follows_its_key(tmp_path: Path) -> None:
    path = tmp_path / "wide.gguf"
    write_gguf(path, {"general.alignment": 256}, PLANS)
    file = read_gguf(path)
    assert all(info.offset % 256 == 0 for info in file.tensors.values())
    np.testing.assert_array_equal(file.tensor("vector"), VALUES[0, :3])
    with pytest.raises(ValueError, match="general.alignment is 48, expected a power of two"):
        write_gguf(path, {"general.alignment": 48}, PLANS)


def in_pieces(count: int, size: int) -> Iterator[np.ndarray]:
    for index in range(count):
        yield np.full(size, index, dtype=np.uint8)


def test_pieces_are_joined_and_only_one_is_in_memory(tmp_path: Path) -> None:
    count, size = 12, 8 * 2**20
    plan = TensorPlan("embedding", (count, size // 4), "F32", lambda: in_pieces(count, size))
    tracemalloc.start()
    try:
        write_gguf(tmp_path / "large.gguf", {}, [plan])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * size
    raw = read_gguf(tmp_path / "large.gguf").raw("embedding")
    assert raw[::size].tolist() == list(range(count))


def test_tensors_are_produced_one_after_the_other(tmp_path: Path) -> None:
    events: list[str] = []

    def tell(name: str) -> np.ndarray:
        # A tensor's bytes are in the file before the next one is asked for.
        size = sum(path.stat().st_size for path in tmp_path.iterdir())
        events.append(f"{name} {size // 4096}")
        return np.zeros(4096, dtype=np.uint8)

    write_gguf(tmp_path / "m.gguf", {}, [TensorPlan(n, (1024,), "F32", lambda n=n: tell(n)) for n in ("a", "b", "c")])
    assert events == ["a 0", "b 1", "c 2"]


@pytest.mark.parametrize(
    ("size", "produced"), [(4096, "4095"), (4096, "4100"), (4096, "0")], ids=["short", "long", "nothing"]
)
def test_bytes_other_than_planned_are_a_defect_and_leave_nothing(tmp_path: Path, size: int, produced: str) -> None:
    plan = TensorPlan("w", (size // 4,), "F32", lambda: np.zeros(int(produced), dtype=np.uint8))
    with pytest.raises(ValueError, match=f"tensor w: {size} bytes planned, {produced} or more produced"):
        write_gguf(tmp_path / "m.gguf", {}, [plan])
    assert list(tmp_path.iterdir()) == []


def test_a_failing_tensor_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")

    def fail() -> np.ndarray:
        raise RuntimeError("no such weight")

    with pytest.raises(RuntimeError, match="no such weight"):
        write_gguf(path, METADATA, [*PLANS, TensorPlan("w", (4,), "F32", fail)])
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]
    assert path.read_bytes() == b"old"


def test_a_full_disk_is_found_before_the_first_tensor(tmp_path: Path) -> None:
    plan = TensorPlan("w", (2**20, 2**20), "F32", lambda: pytest.fail("a tensor was produced"))
    with pytest.raises(StorageError, match="4.4 TB|5.3 TB"):
        write_gguf(tmp_path / "m.gguf", {}, [plan])
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def write(descriptor: int, data: memoryview) -> int:
        if len(data) == 3072:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(StorageError, match="no space to write .*m.gguf"):
        write_gguf(tmp_path / "m.gguf", METADATA, PLANS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metadata", "plans", "problem"),
    [
        ({}, [number_plan("a", "F32"), number_plan("a", "F16")], "tensor a is planned twice"),
        ({}, [number_plan("a" * 64, "F32")], "has 64 bytes, 1 to 63 are allowed"),
        (
            {},
            [TensorPlan("a", (3, 100), "Q8_0", lambda: VALUES)],
            r"tensor a of type Q8_0 cannot have the shape \(3, 100\)",
        ),
        ({}, [TensorPlan("a", (0,), "F32", lambda: VALUES)], r"cannot have the shape \(0,\)"),
        ({}, [TensorPlan("a", (1, 1, 1, 1, 1), "F32", lambda: VALUES)], "cannot have the shape"),
        ({}, [TensorPlan("a", (3,), "Q9_9", lambda: VALUES)], "tensor a has the unknown type Q9_9"),
        ({"n": 2**32}, [], "metadata n: 4294967296 to 4294967296 does not fit uint32; give a numpy value"),
        ({"n": [1, 2**31]}, [], "metadata n: 1 to 2147483648 does not fit int32"),
        ({"n": []}, [], "metadata n: a list of nothing has no type"),
        ({"n": [1, "a"]}, [], "metadata n: a list of int and str has no type"),
        ({"n": [1, True]}, [], "metadata n: a list of bool and int has no type"),
        ({"n": np.zeros((2, 2))}, [], "metadata n: an array of 2 dimensions, expected 1"),
        ({"n": np.complex64(1)}, [], "metadata n: GGUF has no numbers of type complex64"),
        ({"n": "\ud800"}, [], "metadata n: .*surrogates not allowed"),
        ({"": 1}, [], "must have 1 to 65535 bytes"),
    ],
)
def test_what_gguf_cannot_hold_is_a_defect_before_anything_is_written(
    tmp_path: Path, metadata: dict[str, MetadataValue], plans: list[TensorPlan], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        write_gguf(tmp_path / "m.gguf", metadata, plans)
    assert list(tmp_path.iterdir()) == []
