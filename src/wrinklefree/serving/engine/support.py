"""Which engine runs a GGUF file, read off its header before any engine sees it.

A runtime that meets what it does not know refuses at best, answers wrongly at worst (an activation that it ignores) and
aborts the process on some broken files. So the tables below decide, and a refusal names the feature and who can.
"""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wrinklefree.models.gguf_settings import CONFIG_KEY, foreign_settings
from wrinklefree.utils.errors import CheckpointError, ConfigError
from wrinklefree.utils.gguf import GGUFFile

EngineName = Literal["native", "llama.cpp", "bitnet.cpp", "torch"]
ENGINES: tuple[EngineName, ...] = ("native", "llama.cpp", "bitnet.cpp", "torch")
"""In the order in which `auto` takes them: the fastest first."""

_ALL = frozenset(ENGINES)
_OURS: frozenset[EngineName] = frozenset({"native", "torch"})
_STOCK: frozenset[EngineName] = frozenset({"native", "llama.cpp", "torch"})
_BITNET: frozenset[EngineName] = frozenset({"native", "bitnet.cpp", "torch"})
_OTHERS: frozenset[EngineName] = frozenset({"llama.cpp", "bitnet.cpp"})
_NOT_NATIVE: frozenset[EngineName] = _ALL - {"native"}

ARCHITECTURES: Mapping[str, frozenset[EngineName]] = {
    "bitnet": _ALL,
    "llama": _ALL,
    "qwen2": _ALL,
    "qwen3": _ALL,
    "wrinklefree": _OURS,  # what no other runtime expresses, under a name that makes them refuse it
}

TYPES: Mapping[str, frozenset[EngineName]] = {
    "F32": _ALL,
    "F16": _ALL,
    "BF16": _ALL,
    "Q8_0": _ALL,
    "Q4_0": _ALL,
    "Q4_1": _ALL,
    "Q6_K": _ALL,
    "TQ1_0": _ALL,
    "TQ2_0": _ALL,
    "Q2_0": _STOCK,
    "I2_S": _BITNET,
    "Q5_0": _OTHERS,
    "Q5_1": _OTHERS,
    "Q2_K": _OTHERS,
    "Q3_K": _OTHERS,
    "Q4_K": _OTHERS,
    "Q5_K": _OTHERS,
}


@dataclass(frozen=True)
class Feature:
    """Something that not every engine runs."""

    text: str
    """What it is, after the word "has"."""
    is_in: Callable[[GGUFFile], bool]
    engines: frozenset[EngineName]
    """Who runs it."""


def _architecture(file: GGUFFile) -> str:
    return file.text("general.architecture")


def _any_tensor(*endings: str) -> Callable[[GGUFFile], bool]:
    return lambda file: any(name.endswith(endings) for name in file.tensors)


def _in_architecture(name: str, test: Callable[[GGUFFile], bool]) -> Callable[[GGUFFile], bool]:
    return lambda file: _architecture(file) == name and test(file)


def _heads_differ_from_hidden(file: GGUFFile) -> bool:
    name = _architecture(file)
    size = file.metadata.get(f"{name}.attention.key_length")
    heads, hidden = file.integer(f"{name}.attention.head_count"), file.integer(f"{name}.embedding_length")
    return isinstance(size, int) and size * heads != hidden


def _layout_of_another_cpu(file: GGUFFile) -> bool:
    layout = file.metadata.get("wrinklefree.i2_s_layout")
    return layout is not None and layout != cpu_family()


def _is_not_ternary_of_ours(file: GGUFFile) -> bool:
    if CONFIG_KEY not in file.metadata:
        return True
    from wrinklefree.models.gguf_weights import config_from_gguf  # torch takes seconds to import

    try:
        _, bitnet = config_from_gguf(file)
    except CheckpointError:  # who loads the file says what is wrong with it
        return False
    return bitnet is None or not bitnet.is_plain


MOST_BLOCKS = 512
"""llama.cpp aborts above."""

FEATURES: tuple[Feature, ...] = (
    Feature(
        "the norms inside projections (attn_output_norm_in, ...) of BitNet.cpp", _any_tensor("_norm_in.weight"), _BITNET
    ),
    Feature(
        "SubLN norms outside of the architecture bitnet",
        lambda file: _architecture(file) != "bitnet" and _any_tensor("_sub_norm.weight")(file),
        _OURS,
    ),
    Feature("the ReLU² activation", lambda file: file.metadata.get("wrinklefree.hidden_act", "silu") != "silu", _OURS),
    Feature("biases in the architecture bitnet", _in_architecture("bitnet", _any_tensor(".bias")), _OURS),
    Feature("biases in the architecture qwen3", _in_architecture("qwen3", _any_tensor(".bias")), _OURS),
    Feature(
        "an untied head in the architecture bitnet",
        _in_architecture("bitnet", lambda file: "output.weight" in file.tensors),
        _OURS,
    ),
    Feature(
        "q and k norms in the architecture bitnet",
        _in_architecture("bitnet", _any_tensor("attn_q_norm.weight", "attn_k_norm.weight")),
        _OURS,
    ),
    Feature(
        "heads whose sizes do not sum to the hidden size in the architecture bitnet",
        _in_architecture("bitnet", _heads_differ_from_hidden),
        _OURS,
    ),
    Feature(
        "rope scaling, partly rotated heads or a scale of attention that only its header describes",
        lambda file: any(foreign_settings(file)),
        _OTHERS,
    ),
    Feature("I2_S tensors laid out for another family of CPUs", _layout_of_another_cpu, _OURS),
    Feature("no description of a ternary model by our converter", _is_not_ternary_of_ours, _NOT_NATIVE),
)


def cpu_family() -> str:
    """The name of this machine's I2_S layout."""
    return "arm" if platform.machine().lower() in ("aarch64", "arm64") else "x86"


def obstacles(file: GGUFFile) -> dict[EngineName, str]:
    """For each engine that does not run a file, the first thing that it does not run."""
    architecture = _architecture(file)
    rows = [(f"the architecture {architecture}", ARCHITECTURES.get(architecture, frozenset[EngineName]()))]
    types = sorted({info.type for info in file.tensors.values()})
    rows += [(f"tensors of type {name}", TYPES.get(name, frozenset[EngineName]())) for name in types]
    rows += [(feature.text, feature.engines) for feature in FEATURES if feature.is_in(file)]
    found: dict[EngineName, str] = {}
    for text, engines in rows:
        for engine in ENGINES:
            if engine not in engines:
                found.setdefault(engine, text)
    return found


def check_runs(file: GGUFFile, engine: EngineName, blocked: Mapping[EngineName, str]) -> None:
    """Refuse a file that an engine does not run, in one sentence.

    Raises:
        ConfigError: it names what blocks, and the engines that can.
    """
    if engine not in blocked:
        return
    others = [name for name in ENGINES if name not in blocked]
    advice = f"use --engine {' or '.join(others)}" if others else "no engine here runs it; convert the checkpoint again"
    raise ConfigError(f"{file.path} has {blocked[engine]}, which {engine} does not run; {advice}")


def check_header(file: GGUFFile) -> None:
    """Refuse a header that lacks what every engine needs, because native runtimes may abort on it.

    Raises:
        CheckpointError: a key is missing, of another type or out of range, or the shapes of embedding and vocabulary
            contradict each other.
    """
    name = _architecture(file)
    sizes = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
    for key in (f"{name}.{size}" for size in sizes):
        if not 0 < file.integer(key) < 1 << 31:
            raise CheckpointError(f"{file.path} is damaged: {key} is {file.integer(key)}; write it again")
    blocks, count = _blocks(file), file.integer(f"{name}.block_count")
    if count > MOST_BLOCKS or blocks - {str(index) for index in range(count)} or len(blocks) != count:
        raise CheckpointError(f"{file.path} is damaged: it announces {count} blocks and has {len(blocks)}")
    heads, hidden = file.integer(f"{name}.attention.head_count"), file.integer(f"{name}.embedding_length")
    groups = file.integer(f"{name}.attention.head_count_kv")
    if groups <= 0 or heads % groups or (hidden % heads and f"{name}.attention.key_length" not in file.metadata):
        raise CheckpointError(f"{file.path} is damaged: {heads} heads, {groups} key heads, {hidden} dimensions")
    if not 0 < file.number(f"{name}.attention.layer_norm_rms_epsilon") < 1:
        raise CheckpointError(f"{file.path} is damaged: its norms' epsilon is not between 0 and 1; write it again")
    words = file.texts("tokenizer.ggml.tokens")
    types = file.integers("tokenizer.ggml.token_type")
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} has no token_embd.weight; it is not a complete language model")
    shape = file.tensors["token_embd.weight"].shape
    if shape != (len(words), hidden) or len(types) != len(words):
        raise CheckpointError(
            f"{file.path} is damaged: the embedding is {list(shape)}, for {len(words)} tokens ({len(types)} types) of "
            f"{hidden} dimensions"
        )


def _blocks(file: GGUFFile) -> set[str]:
    """The numbers of the blocks that have tensors."""
    return {name.split(".", 2)[1] for name in file.tensors if name.startswith("blk.")}


def name_of(path: Path, file: GGUFFile | None = None) -> str:
    """What /v1/models calls a model: the name in the file, else the file's or folder's."""
    said = None if file is None else file.metadata.get("general.name")
    return said if isinstance(said, str) and said else (path.stem if path.is_file() else path.resolve().name)
