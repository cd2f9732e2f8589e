"""Which class of transformers holds which model, and what its configuration says."""

from typing import Any

import pytest
import torch

from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.serving.hf_layouts import Forms, build_layout, choose_layout
from wrinklefree.utils.errors import ConfigError

LLAMA = Architecture(
    family="llama",
    vocab_size=270,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
QWEN2 = LLAMA.model_copy(update={"family": "qwen2", "attention_bias": True})
QWEN3 = LLAMA.model_copy(update={"family": "qwen3", "qk_norm": True, "head_dim": 16})
BIASES = LLAMA.model_copy(update={"attention_bias": True, "attention_output_bias": True, "mlp_bias": True})
OUTPUT = BitNetSpec(placement="output", gain="median", quantization_lambda=1.0)
INSIDE = OUTPUT.model_copy(update={"placement": "per_projection"})
BARE = OUTPUT.model_copy(update={"placement": "none"})
BF16 = Forms("bf16", torch.bfloat16, "bitlinear")


@pytest.mark.parametrize(
    ("architecture", "spec", "expected"),
    [
        (LLAMA, None, "plain"),
        (LLAMA, BARE, "plain"),
        (QWEN3, INSIDE, "plain"),
        (LLAMA, OUTPUT, "bitnet"),
        (QWEN2, OUTPUT, "bitnet"),
        (QWEN3, OUTPUT, "wrinklefree"),
        (BIASES, OUTPUT, "wrinklefree"),
        (LLAMA, OUTPUT.model_copy(update={"activation_bits": 4}), "wrinklefree"),
    ],
)
def test_the_most_common_class_that_fits_is_taken(
    architecture: Architecture, spec: BitNetSpec | None, expected: str
) -> None:
    assert choose_layout("auto", architecture, spec, BF16) == expected


@pytest.mark.parametrize(
    ("spec", "forms", "expected"),
    [
        (BARE, BF16, ("autobitlinear", "online", False)),
        (INSIDE, BF16, ("autobitlinear", "online", True)),
        (INSIDE, Forms("packed", torch.float32, "bitlinear"), ("bitlinear", "offline", True)),
        (BARE, Forms("packed", torch.float32, "autobitlinear"), ("autobitlinear", "offline", False)),
    ],
)
def test_the_quantization_config(spec: BitNetSpec, forms: Forms, expected: tuple[str, str, bool]) -> None:
    config = build_layout("plain", LLAMA, spec, forms).config["quantization_config"]
    assert (config["linear_class"], config["quantization_mode"], config["use_rms_norm"]) == expected
    assert config["modules_to_not_convert"] == ["lm_head"]
    assert config["rms_norm_eps"] == LLAMA.rms_norm_eps


@pytest.mark.parametrize(
    ("wanted", "architecture", "spec", "forms", "message"),
    [
        ("bitnet", QWEN3, OUTPUT, ("bf16", "bitlinear"), "no norms on q and k; take --format wrinklefree"),
        ("bitnet", LLAMA, INSIDE, ("bf16", "bitlinear"), "placement per_projection; take --format plain"),
        ("bitnet", LLAMA, None, ("bf16", "bitlinear"), "full precision and this class holds ternary ones"),
        ("plain", LLAMA, OUTPUT, ("bf16", "bitlinear"), "LlamaForCausalLM has no norm before o_proj and down_proj"),
        ("bitnet", BIASES, OUTPUT, ("bf16", "bitlinear"), "no biases in the feed-forward network"),
        ("auto", LLAMA, None, ("packed", "bitlinear"), "--weights packed stores ternary codes"),
        ("bitnet", QWEN2, OUTPUT, ("packed", "autobitlinear"), "multiplies a bias by the weight's scale"),
        (
            "bitnet", LLAMA.model_copy(update={"intermediate_size": 46}), OUTPUT, ("packed", "bitlinear"),
            "packs 4 rows into one, and model.layers.0.mlp.gate_proj.weight has 46",
        ),
        (
            "bitnet", LLAMA.model_copy(update={"head_dim": 16}), OUTPUT, ("bf16", "bitlinear"),
            "4 x 16 is not 32",
        ),
        (
            "auto", LLAMA.model_copy(update={"qk_norm": True}), None, ("bf16", "bitlinear"),
            "LlamaForCausalLM cannot express",
        ),
    ],
)  # fmt: skip
def test_what_a_class_cannot_hold_is_refused(
    wanted: Any, architecture: Architecture, spec: BitNetSpec | None, forms: tuple[Any, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        choose_layout(wanted, architecture, spec, Forms(forms[0], torch.float32, forms[1]))
