"""The table of architectures: every feature that a stock runtime lacks keeps a model out of its names."""

from typing import Any

import pytest

from wrinklefree.models.config import Architecture, BitNetSpec, Placement, RopeScaling
from wrinklefree.serving.gguf_architectures import (
    ARCHITECTURES,
    TARGETS,
    architecture_metadata,
    choose_architecture,
    cpu_family,
)
from wrinklefree.utils.errors import ConfigError

LLAMA = Architecture(
    family="llama",
    vocab_size=256,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


def spec(placement: Placement | None) -> BitNetSpec | None:
    return None if placement is None else BitNetSpec(placement=placement, gain="ones")


def chosen(changes: dict[str, Any], placement: Placement | None, **options: Any) -> tuple[str, str]:
    architecture = LLAMA.model_copy(update=changes)
    row = choose_architecture(architecture, spec(placement), **{"target": "auto", "weight_type": None} | options)
    return row.name, row.target


QWEN3 = {"qk_norm": True, "head_dim": 128, "family": "qwen3"}
QWEN2 = {"attention_bias": True, "family": "qwen2"}


@pytest.mark.parametrize(
    ("changes", "placement", "expected"),
    [
        ({}, "output", ("bitnet", "llama.cpp")),
        ({}, "none", ("llama", "llama.cpp")),
        ({}, None, ("llama", "llama.cpp")),
        ({"rope_scaling": SCALING}, "none", ("llama", "llama.cpp")),
        ({"head_dim": 32}, "none", ("llama", "llama.cpp")),
        (QWEN2, "none", ("qwen2", "llama.cpp")),
        (QWEN3, "none", ("qwen3", "llama.cpp")),
        (QWEN3, "output", ("qwen3", "bitnet.cpp")),
        (QWEN3, "per_projection", ("qwen3", "bitnet.cpp")),
        # One feature at a time that architecture bitnet lacks.
        ({"hidden_act": "relu2"}, "output", ("wrinklefree", "wrinklefree")),
        ({"tie_word_embeddings": False}, "output", ("wrinklefree", "wrinklefree")),
        ({"rope_scaling": SCALING}, "output", ("wrinklefree", "wrinklefree")),
        ({"head_dim": 32}, "output", ("wrinklefree", "wrinklefree")),
        ({"attention_bias": True}, "output", ("wrinklefree", "wrinklefree")),
        ({"attention_output_bias": True}, "output", ("wrinklefree", "wrinklefree")),
        ({"mlp_bias": True}, "output", ("wrinklefree", "wrinklefree")),
        ({}, "per_projection", ("wrinklefree", "wrinklefree")),
        # And that the others lack.
        ({"hidden_act": "relu2"}, "none", ("wrinklefree", "wrinklefree")),
        (QWEN2 | {"mlp_bias": True}, "none", ("wrinklefree", "wrinklefree")),
        (QWEN2 | {"rope_scaling": SCALING}, "none", ("wrinklefree", "wrinklefree")),
        (QWEN3 | {"attention_bias": True}, "none", ("wrinklefree", "wrinklefree")),
        (QWEN3 | {"hidden_act": "relu2"}, "output", ("wrinklefree", "wrinklefree")),
    ],
)
def test_auto_takes_the_most_portable_name(
    changes: dict[str, Any], placement: Placement, expected: tuple[str, str]
) -> None:
    assert chosen(changes, placement) == expected


def test_a_type_that_a_runtime_does_not_read_moves_auto_on() -> None:
    assert chosen(QWEN3, "output", weight_type="TQ2_0") == ("wrinklefree", "wrinklefree")
    assert chosen({}, "output", weight_type="I2_S") == ("bitnet", "bitnet.cpp")
    assert chosen({"hidden_act": "relu2"}, "output", weight_type="I2_S") == ("wrinklefree", "wrinklefree")
    assert chosen(QWEN3, "output", weight_type="F16") == ("qwen3", "bitnet.cpp")


@pytest.mark.parametrize("target", TARGETS)
def test_squared_relu_is_under_no_stock_name_for_any_target(target: str) -> None:
    for placement in ("none", "output", "per_projection", None):
        for changes in ({}, QWEN2, QWEN3):
            wanted: dict[str, Any] = dict(changes) | {"hidden_act": "relu2"}
            if target == "wrinklefree":
                assert chosen(wanted, placement, target=target) == ("wrinklefree", "wrinklefree")
            else:
                with pytest.raises(ConfigError, match="squared ReLU instead of SiLU"):
                    chosen(wanted, placement, target=target)


def test_a_refusal_names_what_blocks_the_closest_name_and_who_can() -> None:
    with pytest.raises(ConfigError) as refusal:
        chosen(QWEN3, "output", target="llama.cpp")
    assert str(refusal.value) == (
        "llama.cpp does not run this model: it has norms on q and k, 4 heads x 128 = 512 beside 256 channels, which "
        "llama.cpp's bitnet (the closest) does not do; use --target bitnet.cpp or --target wrinklefree"
    )
    with pytest.raises(ConfigError) as refusal:
        chosen({"tie_word_embeddings": False, "head_dim": 32}, "output", target="bitnet.cpp")
    assert "4 heads x 32 = 128 beside 256 channels, a head of its own" in str(refusal.value)
    with pytest.raises(
        ConfigError, match=r"does not read type Q2_0 in a bitnet file \(it reads I2_S, TQ2_0, TQ1_0, F16"
    ):
        chosen({}, "output", target="bitnet.cpp", weight_type="Q2_0")


def test_our_own_name_takes_everything() -> None:
    [ours] = [row for row in ARCHITECTURES if row.name == "wrinklefree"]
    assert list(ours.obstacles(LLAMA, "output")) == []
    assert {"TQ2_0", "TQ1_0", "Q2_0", "Q4_0", "I2_S"} == set(ours.ternary_types)


@pytest.mark.parametrize(
    ("machine", "family"), [("x86_64", "x86"), ("AMD64", "x86"), ("aarch64", "arm"), ("arm64", "arm")]
)
def test_families_of_processors(machine: str, family: str) -> None:
    assert cpu_family(machine) == family


def test_sizes_are_written_under_the_name() -> None:
    metadata = architecture_metadata("bitnet", LLAMA)
    assert metadata["bitnet.attention.key_length"] == metadata["bitnet.rope.dimension_count"] == 64
    assert metadata["bitnet.attention.layer_norm_rms_epsilon"] == 1e-5
