"""Pretrained models in, full-precision models out: Hugging Face's configs, names and folders.

Parameter names are Hugging Face's already, so a family is one line of a table: its `model_type`, its class, and which
switches of `Architecture` it can express. A new family is one more line.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors.torch import save_file

import wrinklefree
from wrinklefree.models.artifact import check_same, read_artifact, resolve_artifact
from wrinklefree.models.config import Architecture, ModelConfig, RopeScaling
from wrinklefree.models.gguf_weights import architecture_from_gguf, tensors_from_gguf
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.weights import Cut, assemble, read_rows, read_safetensors
from wrinklefree.utils import assets
from wrinklefree.utils.errors import CheckpointError, ConfigError
from wrinklefree.utils.gguf import read_gguf
from wrinklefree.utils.hub import snapshot
from wrinklefree.utils.storage import explained
from wrinklefree.utils.tokenizer import TOKENIZER_FILES, TextTokenizer

TINY = "tiny"
"""The package name of the model that is shipped with this library."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_ALTERNATIVES = (
    "give a local copy with model.source=path model.path=<folder>, a packaged model with model.source=package, "
    "or take model=tiny, which needs no network"
)

FamilyName = Literal["llama", "qwen2", "qwen3"]


@dataclass(frozen=True)
class Family:
    """What Hugging Face calls a family, and the switches that its class has built in."""

    model_type: str
    class_name: str
    qkv_bias: Literal["configured", "always"]
    """configured: the config key `attention_bias` adds biases to q, k, v and o; always: q, k, v have them, o has not."""
    mlp_bias: bool
    """Whether the config key `mlp_bias` exists."""
    qk_norm: bool
    context: int
    """max_position_embeddings where the config is silent."""


FAMILIES: Mapping[FamilyName, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", "configured", mlp_bias=True, qk_norm=False, context=2048),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", "always", mlp_bias=False, qk_norm=False, context=32768),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", "configured", mlp_bias=False, qk_norm=True, context=32768),
}


def architecture_from_hf(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a Hugging Face config.json describes; its silent keys have Hugging Face's defaults.

    Raises:
        CheckpointError: the family, or something that changes the computation, is not one that we have.
    """
    names: list[FamilyName] = [key for key in FAMILIES if FAMILIES[key].model_type == config.get("model_type")]
    if not names:
        known = ", ".join(family.model_type for family in FAMILIES.values())
        raise CheckpointError(f"model_type {config.get('model_type')!r} is not supported; supported are {known}")
    [name] = names
    family = FAMILIES[name]
    _refuse_unsupported(config)
    bias = bool(config.get("attention_bias", False))
    theta, scaling = _rope(config)
    head_dim = config.get("head_dim")
    try:
        return Architecture(
            family=name,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=head_dim if head_dim is not None else config["hidden_size"] // config["num_attention_heads"],
            max_position_embeddings=config.get("max_position_embeddings", family.context),
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            hidden_act=config.get("hidden_act", "silu"),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            attention_bias=family.qkv_bias == "always" or bias,
            attention_output_bias=family.qkv_bias == "configured" and bias,
            mlp_bias=family.mlp_bias and bool(config.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
        )
    except KeyError as error:
        raise CheckpointError(f"the model's config.json lacks {error.args[0]}; fetch it again") from error
    except ValidationError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the model's config.json describes a model that we do not have: {reason}") from error


def architecture_to_hf(architecture: Architecture) -> dict[str, Any]:
    """The config.json with which `transformers` builds the same full-precision model.

    Raises:
        ConfigError: the family's class has no such switches.
    """
    family = FAMILIES[architecture.family]
    always = family.qkv_bias == "always"
    expressible = (
        architecture.qk_norm == family.qk_norm
        and (
            architecture.attention_bias if always else architecture.attention_bias == architecture.attention_output_bias
        )
        and not (always and architecture.attention_output_bias)
        and (family.mlp_bias or not architecture.mlp_bias)
    )
    if not expressible:
        raise ConfigError(
            f"{family.class_name} cannot express attention_bias={architecture.attention_bias}, "
            f"attention_output_bias={architecture.attention_output_bias}, mlp_bias={architecture.mlp_bias} and "
            f"qk_norm={architecture.qk_norm} together; choose another model.architecture.family"
        )
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "rms_norm_eps", "hidden_act",
        "tie_word_embeddings",
    )  # fmt: skip
    values = architecture.model_dump()
    config: dict[str, Any] = {"architectures": [family.class_name], "model_type": family.model_type}
    config |= {key: values[key] for key in same}
    config |= {"rope_scaling": None, "attention_dropout": 0.0, "use_cache": True}
    if architecture.rope_scaling is not None:
        scaling = architecture.rope_scaling.model_dump()
        config["rope_scaling"] = {"rope_type": scaling.pop("type"), **scaling}
    if not always:
        config["attention_bias"] = architecture.attention_bias
    if family.mlp_bias:
        config["mlp_bias"] = architecture.mlp_bias
    return config


def load_pretrained(
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    cut: Cut | None = None,
) -> tuple[CausalLM, TextTokenizer]:
    """The pretrained model and its tokenizer, from the source that the config names, and checked against it.

    `cut` as in `assemble`: each process then loads its own rows only.

    Raises:
        NetworkError: the hub or the registry cannot be reached and nothing is cached.
        CheckpointError: the checkpoint is damaged, incomplete, or of another model than `config.architecture`.
    """
    if config.source == "package" and config.package != TINY:
        model, tokenizer = _load_gguf(_key(config.package), config.architecture, device=device, dtype=dtype, cut=cut)
    else:
        folder = _folder(config)
        if _is_hf(folder):
            check_same(config.architecture, architecture_from_hf(_config(folder)), source=str(folder))
            files, source = _weight_files(folder), str(folder)
            tensors = read_safetensors(files) if cut is None else read_rows(files)
            model = assemble(config.architecture, None, tensors, source=source, device=device, dtype=dtype, cut=cut)
            tokenizer = TextTokenizer.from_folder(folder)
        else:
            artifact = read_artifact(folder, expect_architecture=config.architecture, expect_bitnet=False)
            model, tokenizer = artifact.load_model(device, dtype, cut=cut), artifact.load_tokenizer()
    if tokenizer.vocab_size > config.architecture.vocab_size:
        raise CheckpointError(
            f"the tokenizer of model={config.name} has {tokenizer.vocab_size} tokens and the model only "
            f"{config.architecture.vocab_size} embeddings; the two do not belong together"
        )
    return model, tokenizer


def load_tokenizer(config: ModelConfig) -> TextTokenizer:
    """The tokenizer that `load_pretrained` returns, without touching the weights.

    Raises:
        NetworkError: the hub or the registry cannot be reached and nothing is cached.
        CheckpointError: there is no tokenizer, or it is damaged.
    """
    if config.source == "hub":
        return TextTokenizer.from_hub(_key(config.pretrained))
    if config.source == "package" and config.package != TINY:
        return TextTokenizer.from_gguf(read_gguf(assets.fetch(_key(config.package))))
    return TextTokenizer.from_folder(_folder(config))


def identity(config: ModelConfig) -> str:
    """Fingerprint of the base weights: the same on every machine, and known without loading them."""
    if config.source == "package" and config.package != TINY:
        return f"package:{config.package}@{assets.identity(_key(config.package))}"
    if config.source == "hub":
        pretrained = _key(config.pretrained)
        return f"hub:{pretrained}@{snapshot(pretrained, ['config.json'], alternatives=_ALTERNATIVES).name}"
    folder = _folder(config)
    if _is_hf(folder):
        files = [*_weight_files(folder), *(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())]
        stamps = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(set(files)))
        return f"folder:{_digest_of(stamps)}"
    return f"artifact:{read_artifact(folder).fingerprint}"


def save_hf(model: CausalLM, folder: str | Path, tokenizer: TextTokenizer | None = None) -> None:
    """Write a full-precision model as a folder that `transformers.AutoModelForCausalLM` loads.

    Raises:
        ConfigError: the model is ternary; its exports are another matter, as stock classes lack SubLN and quantizers.
    """
    if model.bitnet is not None:
        raise ConfigError("save_hf writes full-precision models and this one is ternary; export it instead")
    folder = Path(folder)
    config = architecture_to_hf(model.architecture)
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    if tokenizer is not None:
        config |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config["bos_token_id"] = tokenizer.bos_token_id
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / _SINGLE, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(folder)


def _load_gguf(
    package: str, architecture: Architecture, *, device: torch.device | str, dtype: torch.dtype, cut: Cut | None
) -> tuple[CausalLM, TextTokenizer]:
    path = assets.fetch(package)
    if path.suffix != ".gguf":
        raise ConfigError(f"model.package={package} is a data set, not a model; smollm2_135m_instruct is a model")
    file = read_gguf(path)
    check_same(architecture, architecture_from_gguf(file), source=str(path))
    tensors = tensors_from_gguf(file, architecture)
    model = assemble(architecture, None, tensors, source=str(path), device=device, dtype=dtype, cut=cut)
    return model, TextTokenizer.from_gguf(file)


def _key(value: str | None) -> str:
    """A key that `ModelConfig` has checked to be there."""
    if value is None:
        raise ConfigError("model.source needs its key: pretrained, package or path")
    return value


def _folder(config: ModelConfig) -> Path:
    """The local folder with the weights: the hub's snapshot, the user's path, or the shipped tiny model."""
    if config.source == "hub":
        patterns = [*TOKENIZER_FILES, "*.safetensors", _INDEX]
        return snapshot(_key(config.pretrained), patterns, alternatives=_ALTERNATIVES)
    if config.source == "path":
        folder = Path(_key(config.path)).expanduser()
        if not folder.is_dir():
            raise CheckpointError(f"model.path={config.path} is not a folder; it should hold config.json and weights")
        return resolve_artifact(folder)
    folder = Path(wrinklefree.__file__).parent / "assets" / TINY
    if not folder.is_dir():
        raise CheckpointError(
            f"the shipped tiny model is not at {folder}; reinstall wrinklefree, or train it with "
            "training=fp_pretrain training.from_scratch=true and pass model.source=path model.path=<its output>"
        )
    return folder


def _is_hf(folder: Path) -> bool:
    return "model_type" in _config(folder)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json; give a Hugging Face folder or an artifact") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); fetch or write it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object; fetch or write it again")
    return config


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not index.is_file():
        raise CheckpointError(f"{folder} has neither {_SINGLE} nor {_INDEX}; convert its weights to safetensors")
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files ({error}); fetch it again") from error
    missing = [name for name in names if not (folder / name).is_file() or Path(name).name != name]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(names)} weight files (first: {missing[0]})")
    return [folder / name for name in names]


@cache
def _digest_of(stamps: tuple[tuple[str, int, int], ...]) -> str:
    """Hash of files; computed once a process for the same sizes and times."""
    lines = [f"{assets.digest(Path(file))}  {Path(file).name}\n" for file, _, _ in stamps]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling: `rope_theta` and `rope_scaling`, or the newer `rope_parameters` that holds both."""
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or parameters
    theta = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3" or not math.isfinite(theta):
        raise CheckpointError(f"rope scaling of type {kind!r} is not supported; supported are default and llama3")
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [field for field in fields if field not in scaling]
    if missing:
        raise CheckpointError(f"the model's config.json has llama3 rope scaling without {', '.join(missing)}")
    return theta, RopeScaling(**{field: scaling[field] for field in fields})


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Switches that would change the computation silently."""
    layer_types = set(config.get("layer_types") or [])
    if config.get("use_sliding_window", False) or layer_types - {"full_attention"}:
        raise CheckpointError("the model uses sliding-window attention, which is not supported; choose another model")
    if config.get("quantization_config") is not None:
        raise CheckpointError("the checkpoint is quantized already; give the full-precision one")
    if config.get("partial_rotary_factor", 1.0) not in (1.0, None):
        raise CheckpointError(
            "the model rotates a part of each head only, which is not supported; choose another model"
        )
