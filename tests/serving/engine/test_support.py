"""Which engine runs a file: every row of the tables, and headers that no engine should see."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wrinklefree.serving.engine import support
from wrinklefree.serving.engine.support import ENGINES, TYPES, check_header, check_runs, name_of, obstacles
from wrinklefree.utils.errors import CheckpointError, ConfigError
from wrinklefree.utils.gguf import TensorInfo, read_gguf

WriteHeader = Callable[..., Path]
WEIGHT = np.zeros((32, 32), np.float32)
VECTOR = np.ones(32, np.float32)
BEFORE = ENGINES[1:]
"""All but the native engine, which runs what our converter describes."""
OURS = {"wrinklefree.config": "{}"}


def named(*names: str) -> dict[str, np.ndarray]:
    return {f"blk.0.{name}": VECTOR for name in names}


@pytest.mark.parametrize(
    ("architecture", "options", "engines", "text"),
    [
        ("bitnet", {"tensors": named("attn_sub_norm.weight", "ffn_sub_norm.weight")}, BEFORE, ""),
        ("llama", {}, BEFORE, ""),
        ("qwen2", {"tensors": named("attn_q.bias")}, BEFORE, ""),
        ("qwen3", {"tensors": named("attn_q_norm.weight")}, BEFORE, ""),
        (
            "qwen3",
            {"tensors": named("attn_output_norm_in.weight")},
            ("bitnet.cpp", "torch"),
            "norms inside projections",
        ),
        ("wrinklefree", {"tensors": named("attn_sub_norm.weight")}, ("torch",), "the architecture wrinklefree"),
        ("llama", {"tensors": named("attn_sub_norm.weight")}, ("torch",), "SubLN norms outside of the architecture"),
        ("bitnet", {"metadata": {"wrinklefree.hidden_act": "relu2"}}, ("torch",), "the ReLU² activation"),
        ("llama", {"metadata": {"wrinklefree.hidden_act": "silu"}}, BEFORE, ""),
        ("bitnet", {"tensors": named("attn_q.bias")}, ("torch",), "biases in the architecture bitnet"),
        ("qwen3", {"tensors": named("attn_q.bias")}, ("torch",), "biases in the architecture qwen3"),
        ("bitnet", {"tensors": {"output.weight": WEIGHT}}, ("torch",), "an untied head"),
        ("llama", {"tensors": {"output.weight": WEIGHT}}, BEFORE, ""),
        ("bitnet", {"tensors": named("attn_q_norm.weight")}, ("torch",), "q and k norms"),
        ("bitnet", {"metadata": {"bitnet.attention.key_length": 16}}, ("torch",), "heads whose sizes"),
        ("bitnet", {"metadata": {"bitnet.attention.key_length": 8}}, BEFORE, ""),
        ("llama", {"metadata": {"llama.rope.scaling.type": "yarn"}}, ("llama.cpp", "bitnet.cpp"), "rope scaling"),
        ("llama", {"metadata": {"llama.rope.dimension_count": 4}}, ("llama.cpp", "bitnet.cpp"), "partly rotated"),
        ("llama", {"metadata": {"llama.rope.scaling.type": "none"}}, BEFORE, ""),
        (
            "llama",
            {"metadata": {"llama.rope.scaling.type": "linear", "wrinklefree.config": "{}"}},
            BEFORE,
            "",
        ),
        ("gemma3", {}, (), "the architecture gemma3"),
    ],
)
def test_a_file_and_its_engines(
    write_header: WriteHeader, architecture: str, options: dict[str, Any], engines: tuple[str, ...], text: str
) -> None:
    blocked = obstacles(read_gguf(write_header(architecture, **options)))
    assert tuple(name for name in BEFORE if name not in blocked) == engines
    assert all(text in blocked[name] for name in BEFORE if name in blocked)


@pytest.mark.parametrize(
    ("kind", "engines"),
    [("Q2_0", ("native", "llama.cpp", "torch")), ("I2_S", ("native", "bitnet.cpp", "torch")), ("TQ2_0", ENGINES)],
)
def test_types_decide(write_header: WriteHeader, kind: str, engines: tuple[str, ...]) -> None:
    file = read_gguf(write_header(metadata=OURS))
    file.tensors["blk.0.ffn_up.weight"] = TensorInfo("blk.0.ffn_up.weight", (32, 32), kind, 0, 0)
    blocked = obstacles(file)
    assert tuple(name for name in ENGINES if name not in blocked) == engines
    assert all(reason == f"tensors of type {kind}" for reason in blocked.values())


@pytest.mark.parametrize(
    ("machine", "layout", "engines"), [("x86_64", "x86", 4), ("x86_64", "arm", 2), ("arm64", "arm", 4)]
)
def test_i2_s_of_another_cpu(
    write_header: WriteHeader, monkeypatch: pytest.MonkeyPatch, machine: str, layout: str, engines: int
) -> None:
    monkeypatch.setattr(support.platform, "machine", lambda: machine)
    blocked = obstacles(read_gguf(write_header(metadata=OURS | {"wrinklefree.i2_s_layout": layout})))
    assert len(ENGINES) - len(blocked) == engines


def test_the_native_engine_runs_ternary_files_of_our_converter(
    write_header: WriteHeader, ternary_gguf: Path, tmp_path: Path
) -> None:
    assert "native" not in obstacles(read_gguf(ternary_gguf))
    blocked = obstacles(read_gguf(write_header("llama")))
    assert blocked == {"native": "no description of a ternary model by our converter"}
    file = read_gguf(ternary_gguf)
    config = json.loads(file.text("wrinklefree.config"))
    for changed in (None, config["bitnet"] | {"weight_scale": "median"}):
        file.metadata["wrinklefree.config"] = json.dumps(config | {"bitnet": changed})
        assert obstacles(file)["native"] == "no description of a ternary model by our converter"


def test_a_refusal_names_the_feature_and_who_can(write_header: WriteHeader) -> None:
    file = read_gguf(write_header("qwen3", tensors=named("attn_output_norm_in.weight")))
    blocked = obstacles(file)
    check_runs(file, "torch", blocked)
    with pytest.raises(ConfigError) as raised:
        check_runs(file, "llama.cpp", blocked)
    assert str(raised.value).endswith(
        "has the norms inside projections (attn_output_norm_in, ...) of BitNet.cpp, which llama.cpp does not run; "
        "use --engine bitnet.cpp or torch"
    )
    file = read_gguf(write_header("gemma3"))
    with pytest.raises(ConfigError, match="no engine here runs it; convert the checkpoint again"):
        check_runs(file, "torch", obstacles(file))


def test_every_type_has_an_engine() -> None:
    assert all(engines <= set(ENGINES) and engines for engines in TYPES.values())


def test_the_header_of_a_whole_model_passes(write_header: WriteHeader, tiny_gguf: Path) -> None:
    check_header(read_gguf(tiny_gguf))
    check_header(read_gguf(write_header()))


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("bitnet.embedding_length", 0, "bitnet.embedding_length is 0"),
        ("bitnet.embedding_length", 30, "30 dimensions"),
        ("bitnet.block_count", 1 << 31, "bitnet.block_count is 2147483648"),
        ("bitnet.block_count", 2, "announces 2 blocks and has 1"),
        ("bitnet.block_count", 513, "announces 513 blocks and has 1"),
        ("bitnet.attention.head_count", 5, "5 heads"),
        ("bitnet.attention.head_count_kv", 0, "0 key heads"),
        ("bitnet.attention.head_count_kv", 3, "3 key heads"),
        ("bitnet.attention.layer_norm_rms_epsilon", 0.0, "epsilon is not between"),
        ("bitnet.context_length", "long", "is str, expected int"),
        ("tokenizer.ggml.tokens", ["a"], "for 1 tokens"),
        ("tokenizer.ggml.token_type", [1], "(1 types)"),
        ("bitnet.feed_forward_length", None, "has no metadata key bitnet.feed_forward_length"),
    ],
)
def test_headers_that_no_engine_should_see(write_header: WriteHeader, key: str, value: Any, text: str) -> None:
    file = read_gguf(write_header())
    if value is None:
        del file.metadata[key]
    else:
        file.metadata[key] = value
    with pytest.raises(CheckpointError) as raised:
        check_header(file)
    assert text in str(raised.value)


def test_a_file_without_an_embedding(write_header: WriteHeader) -> None:
    file = read_gguf(write_header())
    del file.tensors["token_embd.weight"]
    with pytest.raises(CheckpointError, match="has no token_embd.weight"):
        check_header(file)


def test_names(write_header: WriteHeader, tmp_path: Path) -> None:
    path = write_header(metadata={"general.name": "my model"})
    assert name_of(path, read_gguf(path)) == "my model"
    path = write_header()
    assert name_of(path, read_gguf(path)) == "bitnet"
    folder = tmp_path / "artifact"
    folder.mkdir()
    (tmp_path / "newest").symlink_to(folder)
    assert name_of(tmp_path / "newest") == "artifact"
