"""A packed model that was kept is the model that was packed, and a damaged or foreign file is never used."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.serving.engine.native import packed_file
from wrinklefree.serving.engine.native.model import HeadType, NativeModel, NativeOptions, PackedModel, parameter_shapes
from wrinklefree.serving.engine.native.packed_file import StaleFileError, load_or_pack, read_packed, write_packed

ARCHITECTURE = Architecture(
    family="qwen2", vocab_size=101, hidden_size=36, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=10, max_position_embeddings=64, tie_word_embeddings=True, attention_bias=True,
)  # fmt: skip
UNTIED = ARCHITECTURE.model_copy(update={"tie_word_embeddings": False})
BITNET = BitNetSpec(placement="output", gain="ones", quantization_lambda=1.0)
OPTIONS = NativeOptions(context_length=32, max_tokens=16)


def pack(architecture: Architecture, head: HeadType, dtype: torch.dtype = torch.float32) -> PackedModel:
    random = torch.Generator().manual_seed(0)
    shapes = parameter_shapes(architecture, BITNET)
    tensors = ((name, torch.randn(shape, generator=random).to(dtype)) for name, shape in shapes.items())
    return PackedModel.from_tensors(architecture, BITNET, tensors, head)


@pytest.mark.parametrize("architecture", [ARCHITECTURE, UNTIED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head", ["int8", "int4", "f16", "f32"])
def test_a_file_gives_the_same_logits(
    tmp_path: Path, architecture: Architecture, dtype: torch.dtype, head: HeadType
) -> None:
    packed = pack(architecture, head, dtype)
    write_packed(tmp_path / "model", packed)
    found = read_packed(tmp_path / "model", architecture, BITNET, head)
    ids = [3, 1, 4, 1, 5, 100]
    expected = NativeModel(packed, OPTIONS).logits(ids)
    assert np.abs(expected).max() > 0
    assert np.array_equal(NativeModel(found, OPTIONS).logits(ids), expected)


def test_the_embedding_stays_in_the_file_unless_the_head_reads_it(tmp_path: Path) -> None:
    write_packed(tmp_path / "model", pack(ARCHITECTURE, "int8"))
    assert isinstance(read_packed(tmp_path / "model", ARCHITECTURE, BITNET, "int8").embedding, np.memmap)
    write_packed(tmp_path / "shared", pack(ARCHITECTURE, "f32"))
    shared = read_packed(tmp_path / "shared", ARCHITECTURE, BITNET, "f32")
    assert shared.head_rows is shared.embedding
    assert not isinstance(shared.embedding, np.memmap)


class Source:
    """A model's file and how often it was packed."""

    def __init__(self, path: Path) -> None:
        self.path, self.packed = path, 0
        path.write_bytes(b"weights")

    def load(self, head: HeadType = "int8") -> PackedModel:
        def count() -> PackedModel:
            self.packed += 1
            return pack(ARCHITECTURE, head)

        return load_or_pack([self.path], ARCHITECTURE, BITNET, head, count)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setenv(packed_file.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(packed_file, "MIN_BYTES", 0)
    return Source(tmp_path / "model.gguf")


def kept(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").iterdir())


def test_a_model_is_packed_once(source: Source, tmp_path: Path) -> None:
    first, second = source.load(), source.load()
    assert source.packed == 1
    assert np.array_equal(
        first.linears["model.layers.1.mlp.down_proj"].tiles, second.linears["model.layers.1.mlp.down_proj"].tiles
    )
    source.load("int4")
    source.path.write_bytes(b"other weights")
    source.load()
    assert source.packed == 3
    assert len(kept(tmp_path)) == 3


def test_small_models_and_a_cache_that_is_off_leave_nothing(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_file, "MIN_BYTES", 1 << 30)
    source.load()
    monkeypatch.setattr(packed_file, "MIN_BYTES", 0)
    monkeypatch.setenv(packed_file.VARIABLE, "0")
    source.load()
    assert source.packed == 2
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_costs_the_file_only(
    source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    source.load()
    assert source.packed == 1
    assert "was not kept" in caplog.text


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def edit(path: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    path.write_bytes(content[:8] + json.dumps(header).encode().ljust(size)[:size] + content[8 + size :])


def foreign_layout(path: Path) -> None:
    edit(path, lambda header: header["__metadata__"].update(layout="0"))


def foreign_shape(path: Path) -> None:
    edit(path, lambda header: header["embedding"].update(shape=[1, 36]))


def foreign_offset(path: Path) -> None:
    edit(path, lambda header: header["embedding"].update(data_offsets=[-999, 0]))


def missing_scales(path: Path) -> None:
    edit(path, lambda header: header["__metadata__"].update(scales="{}"))


@pytest.mark.parametrize(
    "damage", [truncate, cut_header, empty, foreign_layout, foreign_shape, foreign_offset, missing_scales]
)
def test_damaged_files_are_written_again(
    source: Source, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    source.load()
    [file] = kept(tmp_path)
    damage(file)
    with pytest.raises(StaleFileError):
        read_packed(file, ARCHITECTURE, BITNET, "int8")
    source.load()
    assert "packed again" in caplog.text
    source.load()
    assert source.packed == 2


def test_the_least_recently_used_go_first(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.load()
    [oldest] = kept(tmp_path)
    monkeypatch.setattr(packed_file, "MAX_BYTES", oldest.stat().st_size + 10)
    source.load("int4")
    assert not oldest.exists()
    assert len(kept(tmp_path)) == 1


def test_files_name_the_model_by_every_setting(source: Source, tmp_path: Path) -> None:
    source.load()
    for changed in (
        BITNET.model_copy(update={"activation_bits": 4}),
        BITNET.model_copy(update={"gain": "inverse_rms"}),
    ):
        load_or_pack(
            [source.path],
            ARCHITECTURE,
            changed,
            "int8",
            lambda changed=changed: replace(pack(ARCHITECTURE, "int8"), bitnet=changed),
        )
    assert len(kept(tmp_path)) == 3
