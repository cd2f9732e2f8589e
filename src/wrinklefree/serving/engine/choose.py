"""Open a model with the engine asked for, or with the best one that runs it."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wrinklefree.native import library
from wrinklefree.serving.engine import bitnet_cpp, llama_cpp
from wrinklefree.serving.engine.protocol import Engine
from wrinklefree.serving.engine.support import ENGINES, EngineName, check_header, check_runs, name_of, obstacles
from wrinklefree.utils.errors import ConfigError
from wrinklefree.utils.gguf import GGUFFile, read_gguf
from wrinklefree.utils.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from wrinklefree.serving.engine.native.model import CacheType, HeadType

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT = 4096
"""Longest context where none is asked for: engines take memory for all of it at once."""

DEFAULT_SLOTS = 4

THREADS_PER_CORE = 8
"""More crash native engines."""

_MISSING: dict[EngineName, tuple[Callable[[], bool], str]] = {
    "native": (library.is_available, "the CPU engine was not built (no C compiler when wrinklefree was installed)"),
    "llama.cpp": (llama_cpp.is_installed, "the package xllamacpp is not installed"),
    "bitnet.cpp": (bitnet_cpp.is_built, "BitNet.cpp is not built (no llama-server in extern/BitNet/build/bin)"),
    "torch": (lambda: True, ""),
}


def open_engine(
    model: Path,
    *,
    engine: Literal["auto"] | EngineName = "auto",
    context_length: int | None = None,
    slots: int = DEFAULT_SLOTS,
    threads: int | None = None,
    cache: "CacheType | None" = None,
    head: "HeadType | None" = None,
) -> Engine:
    """Load a model; returns when it is ready to answer.

    Args:
        model: A GGUF file, an artifact, or a stage's output folder (folders: native and torch only).
        engine: Who runs it. auto takes the first of `ENGINES` that runs it and is there; a folder goes to torch where
            there is a GPU.
        context_length: Most tokens of a prompt and its continuation; None: the model's, at most `DEFAULT_CONTEXT`.
        slots: Requests in progress at the same time.
        threads: CPU threads; None leaves the engine's own choice.
        cache: Precision of keys and values in the native engine; None: f16.
        head: Precision of the output layer in the native engine; None: int8.

    Raises:
        ConfigError: the model does not exist, the engine does not run it (the sentence names what blocks and who can),
            or a number is out of range.
        CheckpointError: the model is damaged.
        EngineError: the engine is not installed or did not start.
    """
    for name, value in (("slots", slots), ("threads", threads), ("context length", context_length)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; give 1 or more")
    most = THREADS_PER_CORE * (os.cpu_count() or 1)
    if threads is not None and threads > most:
        raise ConfigError(
            f"threads is {threads}, more than {most} ({THREADS_PER_CORE} a core) only slow an engine down"
        )
    if not model.exists():
        raise ConfigError(f"{model} does not exist; give a GGUF file or a folder that a stage wrote")
    file = None if model.is_dir() else read_gguf(model)
    chosen = (_choose_for_folder(model) if file is None else choose_engine(file)) if engine == "auto" else engine
    if chosen != "native" and (cache or head):
        raise ConfigError(f"types of cache and head are the native engine's, and {chosen} runs {model}; leave them out")
    if file is None:
        if chosen in ("llama.cpp", "bitnet.cpp"):
            raise ConfigError(
                f"{model} is a folder and {chosen} reads GGUF files; use --engine native or torch, or convert it first: "
                f"uv run python scripts/convert_to_gguf.py --input {model} --output model.gguf"
            )
    else:
        check_runs(file, chosen, obstacles(file))
        check_header(file)
        if chosen in ("llama.cpp", "bitnet.cpp"):
            stock = llama_cpp.LlamaCppEngine if chosen == "llama.cpp" else bitnet_cpp.BitNetCppEngine
            longest = file.integer(f"{file.text('general.architecture')}.context_length")
            return stock(
                model,
                TextTokenizer.from_gguf(file),
                name=name_of(model, file),
                context_length=resolve_context(context_length, longest),
                slots=slots,
                threads=threads,
                end_tokens=_end_tokens(file),
            )
    if chosen == "native":
        return _open_native(model, name_of(model, file), context_length, slots, threads, cache or "f16", head or "int8")
    return _open_torch(model, name_of(model, file), context_length, slots, threads)


def _choose_for_folder(folder: Path) -> EngineName:
    """Native where it runs the model and nothing better is there."""
    from wrinklefree.models.artifact import read_artifact  # torch takes seconds to import

    bitnet = read_artifact(folder).bitnet
    if bitnet is None or not bitnet.is_plain:
        return "torch"
    is_there, reason = _MISSING["native"]
    if is_there():
        import torch

        return "torch" if torch.cuda.is_available() else "native"
    logger.warning("%s: torch answers, more slowly", reason)
    return "torch"


def choose_engine(file: GGUFFile) -> EngineName:
    """The first engine that runs a file and is there.

    Raises:
        ConfigError: none is; what blocks torch, the engine that is always there.
    """
    blocked = obstacles(file)
    for name in ENGINES:
        if name in blocked:
            continue
        if _MISSING[name][0]():
            return name
        if name == "native":
            logger.warning("%s: another engine answers, more slowly", _MISSING[name][1])
    absent = [f"{name} would run it, but {_MISSING[name][1]}" for name in ENGINES if name not in blocked]
    if absent:
        raise ConfigError(f"{file.path} has {blocked['torch']}, which torch does not run; {'; '.join(absent)}")
    return "torch"


def resolve_context(asked: int | None, longest: int) -> int:
    """The context length to run with.

    Raises:
        ConfigError: more was asked for than the model was made for.
    """
    if asked is not None and asked > longest:
        raise ConfigError(
            f"a context of {asked} tokens was asked for, the model was made for {longest}; ask for at most that"
        )
    return min(longest, DEFAULT_CONTEXT) if asked is None else asked


def _open_torch(model: Path, name: str, context_length: int | None, slots: int, threads: int | None) -> Engine:
    from wrinklefree.serving.engine.pytorch import TorchEngine, load  # torch takes seconds to import

    loaded, tokenizer = load(model)
    return TorchEngine(
        loaded,
        tokenizer,
        name=name,
        context_length=resolve_context(context_length, loaded.architecture.max_position_embeddings),
        slots=slots,
        threads=threads,
        end_tokens=_end_tokens(read_gguf(model)) if model.is_file() else (),
    )


def _open_native(
    model: Path, name: str, context_length: int | None, slots: int, threads: int | None, cache: "CacheType",
    head: "HeadType",
) -> Engine:  # fmt: skip
    from wrinklefree.serving.engine.native.engine import NativeEngine  # imports torch
    from wrinklefree.serving.engine.native.loading import load_packed

    packed, tokenizer = load_packed(model, head)
    return NativeEngine(
        packed,
        tokenizer,
        name=name,
        context_length=resolve_context(context_length, packed.architecture.max_position_embeddings),
        slots=slots,
        threads=threads,
        cache=cache,
        end_tokens=_end_tokens(read_gguf(model)) if model.is_file() else (),
    )


def _end_tokens(file: GGUFFile) -> list[int]:
    """Ends of a turn and of a message that a file names beside its eos."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    return [file.integer(key) for key in keys if key in file.metadata]
