"""Which `transformers` class holds a model, and under which names and in which form its tensors are stored.

| layout | class | holds |
|---|---|---|
| plain | the family's own: Llama, Qwen2, Qwen3 | full precision; ternary without SubLN, or with it in all projections |
| bitnet | BitNetForCausalLM | SubLN before the output projections, no norms on q and k |
| wrinklefree | ours, whose files travel with the export | every ternary model |

Ternary models in stock classes carry a `quantization_config`, which makes `transformers` replace their linear layers. Its
classes disagree on what a stored scale is: `AutoBitLinear` multiplies by `weight_scale`, `BitLinear` divides by it. A
wrong pick loads without a word and speaks garbage, so the form of every tensor is decided here, once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.hf import FAMILIES, architecture_to_hf
from wrinklefree.models.weights import parameter_shapes
from wrinklefree.serving.hf_tensors import CODES_PER_BYTE, checked_ternary, pack_row_blocks, round_keeping_codes
from wrinklefree.utils.checkpoint import TensorEntry
from wrinklefree.utils.errors import ConfigError

LayoutName = Literal["plain", "bitnet", "wrinklefree"]
LAYOUTS: tuple[LayoutName, ...] = ("plain", "bitnet", "wrinklefree")
"""The most widely understood first."""
Weights = Literal["bf16", "packed", "f32"]
"""How block weights are stored: masters in either type, or 2-bit codes with a scale."""
LinearClass = Literal["bitlinear", "autobitlinear"]
"""What unpacks packed weights in a stock class: bitlinear in each pass (2 bits a weight in memory), autobitlinear once, at
loading. autobitlinear (transformers 5.23) also multiplies a bias by the weight's scale and loads in the stored dtype only."""

Convert = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the export: where it comes from, and how."""

    entry: TensorEntry
    source: str | None
    """Name in the artifact; None for a bias that the class insists on and the model lacks."""
    convert: Convert


@dataclass(frozen=True)
class Layout:
    """A class, its config.json, and its tensors."""

    name: LayoutName
    class_name: str
    config: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True)
class Forms:
    """The forms of tensors that a user chose."""

    weights: Weights
    rest: torch.dtype
    """Of embeddings, head, norms and biases, and the dtype that the export loads in."""
    linear_class: LinearClass


def is_linear(name: str) -> bool:
    """Whether a parameter is the weight of a linear layer inside a block: the ternary ones."""
    return name.endswith("_proj.weight")


def misfit(name: LayoutName, architecture: Architecture, bitnet: BitNetSpec | None, forms: Forms) -> str | None:
    """What of the model the layout cannot hold; None when it fits."""
    if name == "plain":
        return _plain_misfit(architecture, bitnet) or _stock_misfit(architecture, bitnet, forms)
    if bitnet is None:
        return "the model is full precision and this class holds ternary ones"
    if name == "bitnet":
        return _bitnet_misfit(architecture, bitnet) or _stock_misfit(architecture, bitnet, forms)
    return None


def choose_layout(
    wanted: LayoutName | Literal["auto"], architecture: Architecture, bitnet: BitNetSpec | None, forms: Forms
) -> LayoutName:
    """The layout asked for, or the first of plain, bitnet, wrinklefree that holds the model.

    Raises:
        ConfigError: none does, or not the one asked for; says what is in the way.
    """
    if bitnet is None and forms.weights == "packed":
        raise ConfigError("--weights packed stores ternary codes and this model is full precision; take bf16 or f32")
    reasons: dict[LayoutName, str | None] = {name: misfit(name, architecture, bitnet, forms) for name in LAYOUTS}
    fitting: list[LayoutName] = [name for name in LAYOUTS if reasons[name] is None]
    if wanted == "auto":
        if fitting:
            return fitting[0]
        raise ConfigError(f"no class of transformers holds this model: {reasons['plain']}")
    reason = reasons[wanted]
    if reason is not None:
        advice = f"take --format {fitting[0]}" if fitting else "no other format holds it either"
        raise ConfigError(f"--format {wanted} cannot hold this model: {reason}; {advice}")
    return wanted


def build_layout(name: LayoutName, architecture: Architecture, bitnet: BitNetSpec | None, forms: Forms) -> Layout:
    """Config and tensors of a model in a layout that fits it."""
    config = {"plain": _plain_config, "bitnet": _bitnet_config, "wrinklefree": _our_config}[name](architecture, bitnet)
    config["dtype"] = str(forms.rest).removeprefix("torch.")
    if bitnet is not None:
        if name == "wrinklefree":
            config["weight_format"] = "packed" if forms.weights == "packed" else "master"
            config["keep_codes"] = forms.weights != "packed"
        else:
            config["quantization_config"] = _quantization_config(architecture, bitnet, forms)
    rename = _rename_norm if name == "plain" else str
    divides = name != "wrinklefree" and forms.linear_class == "bitlinear"
    tensors: list[StoredTensor] = []
    for source, shape in parameter_shapes(architecture, bitnet).items():
        if bitnet is None or not is_linear(source):
            tensors.append(_cast(rename(source), source, shape, forms.rest))
        elif forms.weights == "packed":
            tensors += _packed(source, shape, divides=divides)
        else:
            tensors.append(_master(source, shape, torch.bfloat16 if forms.weights == "bf16" else torch.float32))
    if name == "bitnet" and config["attention_bias"]:
        tensors += _absent_biases(architecture, forms.rest)
    return Layout(name, config["architectures"][0], config, tuple(tensors))


def _plain_misfit(architecture: Architecture, bitnet: BitNetSpec | None) -> str | None:
    if bitnet is not None and bitnet.placement == "output":
        return f"{FAMILIES[architecture.family].class_name} has no norm before o_proj and down_proj"
    try:
        architecture_to_hf(architecture)
    except ConfigError as error:
        return str(error).partition(";")[0]
    return None


def _bitnet_misfit(architecture: Architecture, bitnet: BitNetSpec) -> str | None:
    a = architecture
    if bitnet.placement != "output":
        return f"BitNetForCausalLM has SubLN before o_proj and down_proj, the model has placement {bitnet.placement}"
    if a.qk_norm:
        return "BitNetForCausalLM has no norms on q and k"
    if a.mlp_bias:
        return "BitNetForCausalLM has no biases in the feed-forward network"
    if a.num_attention_heads * a.head_dim != a.hidden_size:
        return (
            f"BitNetForCausalLM needs heads x head_dim = hidden_size, and {a.num_attention_heads} x {a.head_dim} is not "
            f"{a.hidden_size}"
        )
    return None


def _stock_misfit(architecture: Architecture, bitnet: BitNetSpec | None, forms: Forms) -> str | None:
    """What the linear layers of transformers cannot do."""
    if bitnet is None:
        return None
    if bitnet.activation_bits != 8:
        return f"transformers' ternary layers have 8-bit activations, the model has {bitnet.activation_bits}"
    if forms.weights != "packed":
        return None
    shapes = parameter_shapes(architecture, bitnet)
    odd = [(name, shape[0]) for name, shape in shapes.items() if is_linear(name) and shape[0] % CODES_PER_BYTE]
    if odd:
        return f"transformers packs 4 rows into one, and {odd[0][0]} has {odd[0][1]} (--weights bf16 would fit)"
    has_bias = architecture.attention_bias or architecture.attention_output_bias or architecture.mlp_bias
    if has_bias and forms.linear_class == "autobitlinear":
        return (
            "transformers' autobitlinear multiplies a bias by the weight's scale (--linear-class bitlinear would fit)"
        )
    return None


def _plain_config(architecture: Architecture, bitnet: BitNetSpec | None) -> dict[str, Any]:
    return architecture_to_hf(architecture)


def _bitnet_config(architecture: Architecture, bitnet: BitNetSpec | None) -> dict[str, Any]:
    return {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        **_dimensions(architecture),
        # One switch for all four; those that the model lacks are stored as zeros.
        "attention_bias": architecture.attention_bias or architecture.attention_output_bias,
    }


def _our_config(architecture: Architecture, bitnet: BitNetSpec | None) -> dict[str, Any]:
    assert bitnet is not None
    return {
        "architectures": ["WrinkleFreeForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_wrinklefree.WrinkleFreeConfig",
            "AutoModel": "modeling_wrinklefree.WrinkleFreeModel",
            "AutoModelForCausalLM": "modeling_wrinklefree.WrinkleFreeForCausalLM",
        },
        "model_type": "wrinklefree",
        **_dimensions(architecture),
        "attention_bias": architecture.attention_bias,
        "attention_output_bias": architecture.attention_output_bias,
        "mlp_bias": architecture.mlp_bias,
        "qk_norm": architecture.qk_norm,
        "subln_placement": bitnet.placement,
        "activation_bits": bitnet.activation_bits,
    }


def _dimensions(architecture: Architecture) -> dict[str, Any]:
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act",
        "tie_word_embeddings",
    )  # fmt: skip
    values = architecture.model_dump()
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": architecture.rope_theta}
    if architecture.rope_scaling is not None:
        scaling = architecture.rope_scaling.model_dump()
        rope |= {"rope_type": scaling.pop("type"), **scaling}
    return {
        **{key: values[key] for key in same},
        "rope_parameters": rope,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def _quantization_config(architecture: Architecture, bitnet: BitNetSpec, forms: Forms) -> dict[str, Any]:
    packed = forms.weights == "packed"
    return {
        "quant_method": "bitnet",
        "linear_class": forms.linear_class if packed else "autobitlinear",
        "quantization_mode": "offline" if packed else "online",
        "modules_to_not_convert": ["lm_head"],
        "use_rms_norm": bitnet.placement == "per_projection",
        "rms_norm_eps": architecture.rms_norm_eps,
    }


def _rename_norm(name: str) -> str:
    """Our norm in front of a projection is a part of transformers' linear layer."""
    return name.replace("_proj_norm.weight", "_proj.rms_norm.weight")


def _cast(name: str, source: str, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
    return StoredTensor(TensorEntry(name, dtype, shape), source, lambda tensor: tensor.to(dtype))


def _master(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
    return StoredTensor(TensorEntry(name, dtype, shape), name, lambda weight: round_keeping_codes(name, weight, dtype))


def _packed(name: str, shape: tuple[int, ...], *, divides: bool) -> list[StoredTensor]:
    def scale(weight: Tensor) -> Tensor:
        value = checked_ternary(name, weight).scale.reshape(1)
        return 1.0 / value if divides else value

    rows = -(-shape[0] // CODES_PER_BYTE)
    codes = TensorEntry(name, torch.uint8, (rows, *shape[1:]))
    factor = TensorEntry(f"{name.removesuffix('.weight')}.weight_scale", torch.float32, (1,))
    return [
        StoredTensor(codes, name, lambda weight: pack_row_blocks(checked_ternary(name, weight).codes)),
        StoredTensor(factor, name, scale),
    ]


def _absent_biases(architecture: Architecture, dtype: torch.dtype) -> list[StoredTensor]:
    a = architecture
    sizes: dict[str, int] = {}
    if not a.attention_bias:
        key_size = a.num_key_value_heads * a.head_dim
        sizes |= {"q_proj": a.num_attention_heads * a.head_dim, "k_proj": key_size, "v_proj": key_size}
    if not a.attention_output_bias:
        sizes["o_proj"] = a.hidden_size
    names = [
        (f"model.layers.{layer}.self_attn.{projection}.bias", (size,))
        for layer in range(a.num_hidden_layers)
        for projection, size in sizes.items()
    ]
    return [StoredTensor(TensorEntry(name, dtype, shape), None, lambda zeros: zeros) for name, shape in names]
