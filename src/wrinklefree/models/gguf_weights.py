"""Models out of GGUF files: other people's full-precision ones, and every file that our converter writes.

A file of ours says in `wrinklefree.config` what the model was before names, row orders and padding were adapted to the
runtime, so it loads as exactly that model: the same `Architecture`, the same `BitNetSpec` at lambda 1, unpadded.

Ternary weights come back as a full-precision weight whose ternarization is the stored codes and scale: zeros stay zero
and all others get one magnitude, chosen so that the mean over all weights is the scale. Nothing downstream has to know
that a model came from a file.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from wrinklefree.models import gguf_names as names
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.gguf_names import separate_rotary_pairs
from wrinklefree.models.gguf_settings import CONFIG_KEY as CONFIG_KEY
from wrinklefree.models.gguf_settings import foreign_settings
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.padding import Padding
from wrinklefree.models.weights import EMBEDDING, HEAD, assemble
from wrinklefree.quantization.weight_quant import Ternary
from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.gguf import GGUFFile, read_gguf
from wrinklefree.utils.tokenizer import TextTokenizer

FOLDED_KEY = "wrinklefree.ffn_norm_folded"
"""True where ffn_norm is 1 and its gain stands in ffn_gate_norm_in and ffn_up_norm_in."""

GAINS_KEY = "wrinklefree.unpadded.gains"
"""The norm gains that padding rescaled, as they were, in the order of their tensors: multiplied back they would be off by
a last bit, and now and then an activation would round the other way."""

PACKED_TYPES = frozenset({"TQ1_0", "TQ2_0", "Q2_0", "Q4_0", "I2_S"})
"""Types that keep codes and a scale; the others keep their product."""

_CORRECTIONS, _STRIDE, _AMOUNTS = 64, 7919, (1.0, 0.5, 1.5, 0.75, 1.25, 0.3)
"""How often, where and by how much weights take up the rest of a rounded sum."""

_FAMILIES = ("llama", "qwen2", "qwen3")
_PRE_FFN_NORM = "post_attention_layernorm"


def load_gguf_model(path: str | Path) -> tuple[CausalLM, TextTokenizer]:
    """The model of a GGUF file, in float32 on the CPU, and its tokenizer.

    Raises:
        CheckpointError: the file is damaged, or holds a model of a family that we do not have.
    """
    file = read_gguf(path)
    if CONFIG_KEY not in file.metadata:
        architecture = architecture_from_gguf(file)
        model = assemble(architecture, None, tensors_from_gguf(file, architecture), source=str(path))
    else:
        architecture, bitnet = config_from_gguf(file)
        tensors = (
            (name, latent_weight(values.codes, float(values.scale)) if isinstance(values, Ternary) else values)
            for name, values in exported_tensors(file, architecture, bitnet)
        )
        model = assemble(architecture, bitnet, tensors, source=str(path))
    return model, TextTokenizer.from_gguf(file)


def architecture_from_gguf(file: GGUFFile) -> Architecture:
    """Dimensions and switches from the metadata and from which tensors there are.

    Raises:
        CheckpointError: the file holds a model of a family that we do not have, or with a setting that changes its
            function and that we do not have (rope scaling, partly rotated heads, a scale of attention).
    """
    family = file.text("general.architecture")
    if family not in _FAMILIES:
        raise CheckpointError(f"{file.path} holds a {family} model; readable are {', '.join(_FAMILIES)}")
    hidden_size, heads = file.integer(f"{family}.embedding_length"), file.integer(f"{family}.attention.head_count")
    if hidden_size <= 0 or heads <= 0 or file.integer(f"{family}.attention.head_count_kv") <= 0:
        raise CheckpointError(f"{file.path} announces {heads} heads and {hidden_size} hidden dimensions; it is damaged")
    for key, value in foreign_settings(file):
        raise CheckpointError(
            f"{file.path} has {key} = {value}, which this library does not compute; serve it with --engine llama.cpp, or "
            "pass the model's Hugging Face folder"
        )
    head_dim_key = f"{family}.attention.key_length"
    ours = {names.our_name(name, names.INNER) for name in file.tensors}
    if EMBEDDING not in ours:
        raise CheckpointError(f"{file.path} has no token_embd.weight; it is not a complete language model")
    bias = "model.layers.0.self_attn.{}_proj.bias"
    return Architecture(
        family=family,  # pyright: ignore[reportArgumentType] - checked above
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden_size,
        intermediate_size=file.integer(f"{family}.feed_forward_length"),
        num_hidden_layers=file.integer(f"{family}.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=file.integer(f"{family}.attention.head_count_kv"),
        head_dim=file.integer(head_dim_key) if head_dim_key in file.metadata else hidden_size // heads,
        max_position_embeddings=file.integer(f"{family}.context_length"),
        rope_theta=_shortest(file.number(f"{family}.rope.freq_base")),
        rms_norm_eps=_shortest(file.number(f"{family}.attention.layer_norm_rms_epsilon")),
        tie_word_embeddings=HEAD not in ours,
        attention_bias=bias.format("q") in ours,
        attention_output_bias=bias.format("o") in ours,
        mlp_bias="model.layers.0.mlp.down_proj.bias" in ours,
        qk_norm="model.layers.0.self_attn.q_norm.weight" in ours,
    )


def tensors_from_gguf(file: GGUFFile, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Our names and float32 tensors of a full-precision file, one at a time; unknown names are kept as they are."""
    heads, key_value_heads = architecture.num_attention_heads, architecture.num_key_value_heads
    for stored in file.tensors:
        name = names.our_name(stored, names.INNER)
        values = file.tensor(stored)
        rotary = names.rotary_heads(name, heads, key_value_heads) if architecture.family == "llama" else None
        if rotary is not None and values.shape[0] == rotary * architecture.head_dim:
            values = separate_rotary_pairs(values, rotary)
        yield name, torch.from_numpy(values)


def config_from_gguf(file: GGUFFile) -> tuple[Architecture, BitNetSpec | None]:
    """What the model of a file of ours was, unpadded.

    Raises:
        CheckpointError: `wrinklefree.config` is damaged or was written by another version.
    """
    try:
        config: dict[str, Any] = json.loads(file.text(CONFIG_KEY))
        bitnet = None if config["bitnet"] is None else BitNetSpec.model_validate(config["bitnet"])
        return Architecture.model_validate(config["architecture"]), bitnet
    except (ValueError, ValidationError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file.path} was written by another version ({reason}); convert it again") from error


def padding_of(file: GGUFFile, architecture: Architecture) -> Padding:
    """How a file of ours was padded."""
    name = file.text("general.architecture")
    return Padding(
        architecture,
        hidden_size=file.integer(f"{name}.embedding_length"),
        intermediate_size=file.integer(f"{name}.feed_forward_length"),
        num_attention_heads=file.integer(f"{name}.attention.head_count"),
        num_key_value_heads=file.integer(f"{name}.attention.head_count_kv"),
    )


def codes_and_scale(file: GGUFFile, stored: str) -> tuple[np.ndarray, float]:
    """Ternary codes int8 [rows, columns] and the scale of a tensor, packed or written out as codes times scale.

    Raises:
        CheckpointError: its values are not one magnitude, its negative, and zero.
    """
    if file.tensors[stored].type in PACKED_TYPES:
        codes, scale = file.ternary(stored)
        return codes, float(scale)
    values = file.tensor(stored)
    scale = float(np.abs(values).max())
    codes = np.sign(values).astype(np.int8)
    if not np.array_equal(values, codes * np.float32(scale)):
        raise CheckpointError(f"{file.path}: tensor {stored} is not ternary, though the file says so; convert it again")
    return codes, scale


def latent_weight(codes: Tensor, scale: float) -> Tensor:
    """A float32 weight that `ternarize` turns into these codes and this scale, to the last bit.

    With n weights of which m are not zero, these get the magnitude scale * n / m, whose mean over all is the scale, but
    for the rounding of a float32 sum. A few weights take up that rest: a scale that is off by one bit rounds an
    activation the other way once in many thousand.
    """
    nonzero = int(codes.count_nonzero())
    values = codes.to(torch.float32)
    if nonzero == 0:
        return values
    wanted = float(np.float32(scale))
    magnitude = scale * codes.numel() / nonzero
    values *= magnitude
    flat, places = values.view(-1), codes.flatten().nonzero()[:, 0]
    for attempt in range(_CORRECTIONS):
        missing = (wanted - float(values.abs().mean())) * codes.numel()
        if missing == 0:
            break
        # Few and large changes (small ones would be lost in the sum), but none that could change a code; elsewhere and
        # by another amount each time, or the sum may step over the goal for ever.
        missing *= _AMOUNTS[attempt % len(_AMOUNTS)]
        count = min(nonzero, 1 + int(abs(missing) / (0.25 * magnitude)))
        takers = places[(torch.arange(count) + attempt * _STRIDE) % nonzero]
        flat[takers] += codes.flatten()[takers] * (missing / count)
    return values


def exported_tensors(
    file: GGUFFile, architecture: Architecture, bitnet: BitNetSpec | None
) -> Iterator[tuple[str, Tensor | Ternary]]:
    """Our names and unpadded tensors of a file of ours, ternary weights as codes and scale, one at a time.

    What the file does not explain keeps its name and is refused later.
    """
    stored_architecture = file.text("general.architecture")
    padding = padding_of(file, architecture)
    placement = "none" if bitnet is None else bitnet.placement
    modules = names.module_names(placement, norms_at_inputs=stored_architecture == "qwen3")
    folded = file.metadata.get(FOLDED_KEY, False) is True
    if folded:
        del modules[_PRE_FFN_NORM]
        modules |= {_PRE_FFN_NORM: "ffn_gate_norm_in"}
    gains = _unpadded_gains(file)
    for stored in file.tensors:
        if stored == names.ROPE_FACTORS or (folded and stored.endswith((".ffn_norm.weight", ".ffn_up_norm_in.weight"))):
            continue
        name = names.our_name(stored, modules)
        scale = None
        if bitnet is not None and names.is_ternary_weight(name):
            values, scale = codes_and_scale(file, stored)
        else:
            values = file.tensor(stored)
        heads = names.rotary_heads(name, padding.num_attention_heads, padding.num_key_value_heads)
        if stored_architecture == "llama" and heads is not None:
            values = separate_rotary_pairs(values, heads)
        tensor = torch.from_numpy(values)
        if name != stored:
            tensor = _unpadded(file, padding, name, tensor)
            if len(gains) and padding.rescales(name):
                tensor, gains = gains[: len(tensor)], gains[len(tensor) :]
        yield name, tensor if scale is None else Ternary(tensor, torch.tensor(scale, dtype=torch.float32))


def _unpadded_gains(file: GGUFFile) -> Tensor:
    gains = file.metadata.get(GAINS_KEY, [])
    if not isinstance(gains, list) or not all(isinstance(gain, float) for gain in gains):
        raise CheckpointError(f"{file.path}: {GAINS_KEY} is no list of numbers; convert the checkpoint again")
    return torch.tensor(cast("list[float]", gains), dtype=torch.float32)


def _unpadded(file: GGUFFile, padding: Padding, name: str, tensor: Tensor) -> Tensor:
    try:
        return padding.unpad(name, tensor)
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"{file.path}: {name} has the shape {list(tensor.shape)}, which does not fit the sizes in its header; "
            "convert it again"
        ) from error


def _shortest(value: float) -> float:
    """The number that was meant: 1e-05, where the file's float32 reads 9.999999747e-06."""
    return float(str(np.float32(value)))
