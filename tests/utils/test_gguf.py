"""The GGUF reader against an independent one, and against damaged files."""

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.gguf import read_gguf

QUANTIZED = [
    gguf.GGMLQuantizationType.Q4_0,
    gguf.GGMLQuantizationType.Q4_1,
    gguf.GGMLQuantizationType.Q8_0,
    gguf.GGMLQuantizationType.Q6_K,
]


def write(path: Path, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.epsilon", 0.5)
    writer.add_array("words", ["a", "é", ""])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_bool("yes", True)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    return write(tmp_path / "small.gguf", {"a": (values, None), "b": (values.astype(np.float16), None)})


def test_metadata_and_plain_tensors_are_what_was_written(small: Path) -> None:
    file = read_gguf(small)
    assert file.integer("llama.block_count") == 3
    assert file.number("llama.epsilon") == 0.5
    assert file.texts("words") == ["a", "é", ""]
    assert file.integers("numbers") == [1, -2, 3]
    assert file.metadata["yes"] is True
    assert file.tensors["a"].shape == (2, 3)
    np.testing.assert_array_equal(file.tensor("a"), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(file.tensor("b"), file.tensor("a"))


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_quantized_blocks_decode_as_the_reference_decodes_them(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(7)
    raw = rng.integers(0, 256, (5, 3 * size), dtype=np.uint8)
    blocks = raw.reshape(-1, size)
    # Random bytes, but finite scales: fp16 exponents below the infinities.
    for at in {"Q4_0": (1,), "Q4_1": (1, 3), "Q8_0": (1,), "Q6_K": (209,)}[kind.name]:
        blocks[:, at] &= 0xBF
    path = write(tmp_path / "q.gguf", {"w": (raw, kind)})
    tensor = read_gguf(path).tensor("w")
    assert tensor.shape == (5, 3 * weights)
    np.testing.assert_array_equal(tensor, gguf.dequantize(raw, kind))


def test_bfloat16_is_the_upper_half_of_float32(tmp_path: Path) -> None:
    raw = np.array([[0x3F80, 0xC000, 0x3E20]], dtype="<u2").view(np.uint8)
    path = write(tmp_path / "b.gguf", {"w": (raw, gguf.GGMLQuantizationType.BF16)})
    np.testing.assert_array_equal(read_gguf(path).tensor("w"), [[1.0, -2.0, 0.15625]])


def test_tensor_types_without_a_decoder_say_which_have_one(tmp_path: Path) -> None:
    raw = np.zeros((1, 136), dtype=np.uint8)
    file = read_gguf(write(tmp_path / "t.gguf", {"w": (raw, gguf.GGMLQuantizationType.IQ4_XS)}))
    assert file.tensors["w"].shape == (1, 256)
    assert len(file.raw("w")) == 136
    readable = "F32, F16, Q4_0, Q4_1, Q8_0, Q6_K, BF16, TQ1_0, TQ2_0, I2_S, Q2_0"
    with pytest.raises(CheckpointError, match=f"w has type IQ4_XS; readable are {readable}"):
        file.tensor("w")


def test_every_truncation_of_a_file_is_an_error(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    # Up to here all bytes matter; behind it there is only padding of the last tensor.
    end = max(info.offset + info.nbytes for info in read_gguf(small).tensors.values())
    for length in range(0, end, 3):
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_gguf(cut)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"GGML" + bytes(20), "is not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1; readable are 2 and 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), f"{2**63} entries announced"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), f"{2**40} entries announced"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(99), f"{2**62} entries announced"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**60) + bytes(64),
            "entries announced",
        ),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 99) + bytes(64), "metadata type 99"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"\xff" + struct.pack("<I", 0) + bytes(64), "not UTF-8"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I", 9) + bytes(64), "'t' has 9 dimensions"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 4, 77, 0), "unknown type 77"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 5, 2, 0),
            r"Q4_0 has the shape \(5,\)",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQQIQ", 2, 2**63, 2**63, 0, 0),
            "does not fit into the file",
        ),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 1, 0, 2**63), "does not fit"),
    ],
    ids=range(13),
)
def test_hostile_headers_are_errors(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=problem):
        read_gguf(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_changed_byte_never_does_worse_than_an_error(small: Path, position: int, value: int) -> None:
    content = bytearray(small.read_bytes())
    content[position % len(content)] = value
    path = small.with_name("changed.gguf")
    path.write_bytes(content)
    try:
        file = read_gguf(path)
        for name in file.tensors:
            file.tensor(name)
    except CheckpointError:
        pass


def test_missing_files_keys_and_tensors_are_named(tmp_path: Path, small: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*absent\.gguf"):
        read_gguf(tmp_path / "absent.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CheckpointError, match="cannot read"):
        read_gguf(tmp_path / "empty.gguf")
    file = read_gguf(small)
    with pytest.raises(CheckpointError, match=r"no metadata key llama\.missing"):
        file.integer("llama.missing")
    with pytest.raises(CheckpointError, match="metadata words is list, expected str"):
        file.text("words")
    with pytest.raises(CheckpointError, match="no tensor c"):
        file.tensor("c")


def i2_s_file(path: Path, layout: bytes | None) -> Path:
    """One I2_S tensor of 1 x 128 zeros (digit 1) with the scale 0.5, and perhaps the key of its layout."""
    key = b"wrinklefree.i2_s_layout"
    pair = b"" if layout is None else struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(layout)) + layout
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, layout is not None) + pair
    header += struct.pack("<Q", 1) + b"w" + struct.pack("<IQQIQ", 2, 128, 1, 36, 0)
    path.write_bytes(header + bytes(-len(header) % 32) + b"\x55" * 32 + struct.pack("<f", 0.5) + bytes(28))
    return path


@pytest.mark.parametrize("layout", ["x86", "arm"])
def test_i2_s_is_read_in_the_layout_that_the_file_names(tmp_path: Path, layout: str) -> None:
    file = read_gguf(i2_s_file(tmp_path / "i.gguf", layout.encode()))
    assert file.tensors["w"].nbytes == 64
    codes, scale = file.ternary("w")
    np.testing.assert_array_equal(codes, np.zeros((1, 128)))
    assert scale == np.float32(0.5)
    np.testing.assert_array_equal(file.tensor("w"), np.zeros((1, 128)))


@pytest.mark.parametrize(("layout", "shown"), [(None, "'None'"), (b"vax", "'vax'")])
def test_i2_s_without_a_known_layout_is_refused(tmp_path: Path, layout: bytes | None, shown: str) -> None:
    file = read_gguf(i2_s_file(tmp_path / "i.gguf", layout))
    assert file.tensors["w"].type == "I2_S"
    for read in (file.tensor, file.ternary):
        with pytest.raises(CheckpointError, match=f"key wrinklefree.i2_s_layout is {shown}, not one of x86, arm"):
            read("w")


def test_a_tensor_that_is_not_ternary_is_named(small: Path) -> None:
    problem = r"tensor a of type F32 is not ternary with one scale: it holds 1\.0, where 0 and ±5\.0 would be"
    with pytest.raises(CheckpointError, match=problem):
        read_gguf(small).ternary("a")


def test_tensors_that_share_bytes_are_refused(tmp_path: Path) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, 2, 0)
    for name in (b"a", b"b"):
        header += struct.pack("<Q", 1) + name + struct.pack("<IQIQ", 1, 8, 0, 0)
    path = tmp_path / "shared.gguf"
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(32))
    with pytest.raises(CheckpointError, match="tensors 'a' and 'b' overlap"):
        read_gguf(path)


def test_a_large_file_cannot_announce_more_values_than_are_kept(tmp_path: Path) -> None:
    """The file is sparse: its length would allow the count, the limit on values in memory does not."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**24))
    os.truncate(path, 2**25)
    with pytest.raises(CheckpointError, match="16777216 entries announced at 41, more than the 8388608 that are read"):
        read_gguf(path)


def test_messages_do_not_repeat_what_a_forged_file_makes_long(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    content = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 5000) + b"x" * 5000
    path.write_bytes(content + struct.pack("<IQIQ", 9, 1, 0, 0))
    with pytest.raises(CheckpointError) as caught:
        read_gguf(path)
    assert len(str(caught.value)) < 300
