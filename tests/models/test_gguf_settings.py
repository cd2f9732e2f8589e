"""Settings of other people's files: which are refused, and which mean nothing."""

from pathlib import Path

import numpy as np
import pytest

from wrinklefree.models.gguf_settings import CONFIG_KEY, foreign_settings
from wrinklefree.models.gguf_weights import architecture_from_gguf
from wrinklefree.serving.gguf_writer import MetadataValue, TensorPlan, write_gguf
from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.gguf import GGUFFile, read_gguf

PLAIN: dict[str, MetadataValue] = {
    "general.architecture": "llama",
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 8,
    "llama.block_count": 1,
    "llama.context_length": 16,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e4,
}


def header(path: Path, settings: dict[str, MetadataValue], tensor: str = "token_embd.weight") -> GGUFFile:
    names = dict.fromkeys(["token_embd.weight", tensor])
    plans = [TensorPlan(name, (4, 8), "F32", lambda: np.zeros(128, np.uint8)) for name in names]
    write_gguf(path, PLAIN | settings, plans)
    return read_gguf(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.type", "yarn"),
        ("rope.scaling.type", "linear"),
        ("rope.scaling.factor", 4.0),
        ("rope.scale_linear", 2.0),
        ("rope.dimension_count", 2),
        ("attention.scale", 0.25),
    ],
)
def test_what_changes_the_function_is_refused(tmp_path: Path, key: str, value: MetadataValue) -> None:
    file = header(tmp_path / "a.gguf", {f"llama.{key}": value})
    with pytest.raises(CheckpointError, match=f"has llama.{key} = {value}, which this library does not compute"):
        architecture_from_gguf(file)
    ours = header(tmp_path / "b.gguf", {f"llama.{key}": value, CONFIG_KEY: "{}"})
    assert list(foreign_settings(ours)) == []


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 1.0, "llama.rope.dimension_count": 4, "llama.attention.scale": 0.5},
        {"llama.attention.scale": 0.0},
        {"llama.attention.key_length": 16, "llama.rope.dimension_count": 16, "llama.attention.scale": 0.25},
    ],
)
def test_what_says_the_usual_is_read(tmp_path: Path, settings: dict[str, MetadataValue]) -> None:
    architecture = architecture_from_gguf(header(tmp_path / "a.gguf", settings))
    assert architecture.head_dim == settings.get("llama.attention.key_length", 4)


def test_frequency_divisors_of_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has tensor = rope_freqs\.weight"):
        architecture_from_gguf(header(tmp_path / "a.gguf", {}, "rope_freqs.weight"))
