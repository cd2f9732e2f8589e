"""A checkpoint as a GGUF file that a runtime written by others loads: architecture, types, padding, tokenizer.

Nothing is rounded twice: codes and scales come from `ternarize`, the rounding that training used, and go into their
final type directly. After writing, the file is read back and compared with the checkpoint (`verification`); a file that
fails is removed.
"""

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from wrinklefree.models import gguf_names as names
from wrinklefree.models.artifact import WEIGHTS, Artifact, read_artifact
from wrinklefree.models.config import Architecture, BitNetSpec, Placement
from wrinklefree.models.folding import folded
from wrinklefree.models.gguf_weights import CONFIG_KEY, FOLDED_KEY, GAINS_KEY
from wrinklefree.models.padding import EpsilonChange, Padding, plan_padding
from wrinklefree.quantization.packing import TERNARY_FORMATS, TernaryFormat
from wrinklefree.serving.dense_types import DENSE_TYPES, DenseType
from wrinklefree.serving.export_plan import ExportPlan, PlannedTensor, TensorSource
from wrinklefree.serving.gguf_architectures import (
    DENSE,
    UPSTREAM_TERNARY,
    CpuFamily,
    GGUFArchitecture,
    TargetName,
    architecture_metadata,
    choose_architecture,
    cpu_family,
)
from wrinklefree.serving.gguf_tokenizer import tokenizer_metadata
from wrinklefree.serving.gguf_writer import MetadataValue, TensorPlan, write_gguf
from wrinklefree.serving.refusals import refuse_inside, refuse_unfinished
from wrinklefree.serving.verification import Verification, verify
from wrinklefree.utils.errors import ConfigError
from wrinklefree.utils.storage import TEMPORARY_MARK, explained, fsync_directory

WEIGHT_TYPES = (*UPSTREAM_TERNARY, "I2_S", *DENSE)
TABLE_TYPES = ("F16", "Q8_0", "BF16", "F32")

FORMAT_VERSION = 1
"""`wrinklefree.format_version`; a reader of another version refuses."""

_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "I2_S": 40}
"""`general.file_type`, which runtimes print; types without a number there leave it out."""


@dataclass(frozen=True)
class ConversionOptions:
    """What `scripts/convert_to_gguf.py` takes."""

    input: Path
    """An artifact, a stage's output folder, or a link to either."""
    output: Path
    weight_type: str | None = None
    """Of the projections; None: the first of the target's types that fits."""
    target: TargetName | Literal["auto"] = "auto"
    embedding_type: str | None = None
    """Of embedding and head; None: F16, or the weights' type where that is F32 or BF16."""
    pad: Literal["auto", "never"] = "auto"
    """Whether widths may grow by zeros to fit a type's blocks."""
    cpu: CpuFamily | Literal["auto"] = "auto"
    """Whose I2_S layout to write; auto: this machine's."""
    name: str | None = None
    """`general.name`; None: the base model's name and the stage, from the lineage."""
    verify: bool = True
    """Whether to read the file back and compare."""
    run: bool = True
    """Whether verifying runs the file in llama.cpp, where that is installed and holds it."""


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    path: Path
    row: GGUFArchitecture
    weight_type: str
    table_type: str
    padding: Padding
    epsilon_changes: list[EpsilonChange]
    projection_bytes: int
    """Bytes of all quantized projections."""
    projection_bytes_f16: int
    """The same, unpadded, in F16."""
    file_bytes: int
    file_bytes_f16: int
    """About what the unpadded model takes with everything but norms in F16."""
    notes: list[str]
    verification: Verification | None


def convert(options: ConversionOptions) -> Conversion:
    """Write a GGUF file and check it.

    Raises:
        ConfigError: the options contradict the model; the message names what blocks and the alternative.
        CheckpointError: the input is no artifact, is damaged, or has not finished its warm-ups; or the written file
            does not hold what it should; it never gets its name then.
        StorageError: the disk is full or refuses.
    """
    _check_options(options)
    artifact = read_artifact(options.input)
    _check_output(options.output, artifact.folder)
    refuse_unfinished(artifact.bitnet, source=str(artifact.folder))
    with folded(artifact, options.output) as plain:
        return _convert(plain, options)


def _convert(artifact: Artifact, options: ConversionOptions) -> Conversion:
    plan = make_plan(artifact.architecture, artifact.bitnet, options)
    source = TensorSource(artifact.folder / WEIGHTS)
    tensors = list(plan.tensors(source))
    metadata = file_metadata(artifact, plan, options)
    plans = [TensorPlan(tensor.stored, tensor.shape, tensor.type, tensor.produce) for tensor in tensors]
    # The final name is for checked files only: an older file of that name stays until this one has passed.
    unchecked = options.output.with_name(f"{options.output.name}{TEMPORARY_MARK}unchecked")
    _remove_leftovers(options.output)
    verification = None
    try:
        write_gguf(unchecked, metadata, plans)
        if options.verify:
            verification = verify(unchecked, artifact, plan, source, run=options.run)
        with explained(options.output):
            unchecked.replace(options.output)
            fsync_directory(options.output.absolute().parent)
    finally:
        unchecked.unlink(missing_ok=True)
    return _summary(options, plan, source, tensors, verification)


def make_plan(architecture: Architecture, bitnet: BitNetSpec | None, options: ConversionOptions) -> ExportPlan:
    """Architecture, types and padding for a model, before any of its tensors is read.

    Raises:
        ConfigError: the options do not fit the model.
    """
    if bitnet is None and options.weight_type is not None and options.weight_type not in DENSE:
        raise ConfigError(
            f"{options.input} holds a full-precision model and {options.weight_type} stores ternary weights; use --type F16, "
            "or convert the output of training=stage3_distill"
        )
    row = choose_architecture(architecture, bitnet, target=options.target, weight_type=options.weight_type)
    placement: Placement = "none" if bitnet is None else bitnet.placement
    weight_type, padding = _type_and_padding(architecture, placement, bitnet is not None, row, options)
    form = _weight_format(weight_type, options)
    default_table = weight_type if weight_type in ("F32", "BF16") else "F16"
    table_type = DENSE_TYPES[options.embedding_type or default_table]
    table_type.row_bytes(padding.hidden_size)
    fold = row.norms_at_inputs and placement == "output"
    return ExportPlan(architecture, bitnet, row, padding, form, table_type, fold)


def file_metadata(artifact: Artifact, plan: ExportPlan, options: ConversionOptions) -> dict[str, MetadataValue]:
    """All key-value pairs: the standard ones, and under `wrinklefree.` what only this library's engines need."""
    architecture = artifact.architecture
    weight_type = _name_of(plan.weight_format)
    metadata: dict[str, MetadataValue] = {
        "general.architecture": plan.row.name,
        "general.type": "model",
        "general.name": options.name or _name(artifact),
        "general.quantization_version": 2,
    }
    if weight_type in _FILE_TYPES:
        metadata["general.file_type"] = _FILE_TYPES[weight_type]
    metadata |= architecture_metadata(plan.row.name, plan.padding.padded)
    metadata |= tokenizer_metadata(artifact.load_tokenizer(), architecture.vocab_size)
    bitnet = artifact.bitnet
    config = {"architecture": architecture.model_dump(), "bitnet": None if bitnet is None else bitnet.model_dump()}
    metadata |= {
        "wrinklefree.format_version": FORMAT_VERSION,
        CONFIG_KEY: json.dumps(config, sort_keys=True),
        "wrinklefree.family": architecture.family,
        "wrinklefree.hidden_act": architecture.hidden_act,
        "wrinklefree.ternary": bitnet is not None,
        "wrinklefree.source.fingerprint": artifact.fingerprint,
        "wrinklefree.source.lineage": json.dumps(_lineage(artifact.lineage), sort_keys=True),
    }
    if bitnet is not None:
        metadata |= {
            "wrinklefree.activation_bits": bitnet.activation_bits or 0,
            "wrinklefree.subln.placement": bitnet.placement,
            "wrinklefree.subln.gain": bitnet.gain,
        }
    if not plan.padding.is_none:
        metadata |= {
            "wrinklefree.unpadded.embedding_length": architecture.hidden_size,
            "wrinklefree.unpadded.feed_forward_length": architecture.intermediate_size,
            "wrinklefree.unpadded.attention.head_count": architecture.num_attention_heads,
            "wrinklefree.unpadded.attention.head_count_kv": architecture.num_key_value_heads,
            "wrinklefree.unpadded.attention.layer_norm_rms_epsilon": architecture.rms_norm_eps,
            GAINS_KEY: plan.rescaled_gains(TensorSource(artifact.folder / WEIGHTS)),
        }
    if weight_type == "I2_S":
        metadata["wrinklefree.i2_s_layout"] = _cpu(options)
    if plan.fold_ffn_norm:
        metadata[FOLDED_KEY] = True
    return metadata


def _check_options(options: ConversionOptions) -> None:
    if options.weight_type is not None and options.weight_type not in WEIGHT_TYPES:
        raise ConfigError(f"type {options.weight_type!r} is not one of {', '.join(WEIGHT_TYPES)}")
    if options.embedding_type is not None and options.embedding_type not in TABLE_TYPES:
        raise ConfigError(f"embedding type {options.embedding_type!r} is not one of {', '.join(TABLE_TYPES)}")
    if options.output.is_dir():
        raise ConfigError(f"{options.output} is a folder; --output names the file to write, for example model.gguf")


def _remove_leftovers(output: Path) -> None:
    """Remove what killed conversions to the same name left: a large model's would fill the disk."""
    if output.parent.is_dir():
        for path in output.parent.glob(f"{glob.escape(output.name)}{TEMPORARY_MARK}*"):
            path.unlink(missing_ok=True)


def _check_output(output: Path, checkpoint: Path) -> None:
    """Refuse to damage what is there: the checkpoint that is read, a device, or what a link leads to."""
    if output.is_symlink() or (output.exists() and not output.is_file()):
        raise ConfigError(f"{output} is a link or a device, not a file; give --output another name")
    refuse_inside(output, checkpoint)


def _type_and_padding(
    architecture: Architecture, placement: Placement, ternary: bool, row: GGUFArchitecture, options: ConversionOptions
) -> tuple[str, Padding]:
    """The type asked for or the row's first that fits, and the sizes that it needs."""
    if options.weight_type is not None:
        candidates: tuple[str, ...] = (options.weight_type,)
    else:
        candidates = row.ternary_types if ternary else ("F16",)
    problems: list[ConfigError] = []
    for name in candidates:
        block = 1 if name in DENSE else _format(name, _cpu(options)).block_size
        try:
            return name, _sizes(architecture, placement, name, block, row, options)
        except ConfigError as problem:
            problems.append(problem)
    raise problems[0]


def _sizes(
    architecture: Architecture,
    placement: Placement,
    name: str,
    block: int,
    row: GGUFArchitecture,
    options: ConversionOptions,
) -> Padding:
    if block == 1:
        return Padding.none(architecture)
    padding = plan_padding(architecture, placement, block, square=row.square)
    if padding.is_none or options.pad == "auto":
        return padding
    widths = {
        architecture.hidden_size,
        architecture.intermediate_size,
        architecture.num_attention_heads * architecture.head_dim,
    }
    odd = sorted(width for width in widths if width % block)
    fitting = [other for other in UPSTREAM_TERNARY if not any(w % TERNARY_FORMATS[other].block_size for w in widths)]
    advice = f"use --type {' or '.join(fitting)}, or --pad auto" if fitting else "use --pad auto"
    raise ConfigError(
        f"type {name} stores {block} weights a block and the model has rows of {', '.join(map(str, odd))}; {advice}"
    )


def _weight_format(name: str, options: ConversionOptions) -> TernaryFormat | DenseType:
    return DENSE_TYPES[name] if name in DENSE else _format(name, _cpu(options))


def _format(name: str, cpu: CpuFamily) -> TernaryFormat:
    return TERNARY_FORMATS[f"I2_S_{cpu.upper()}" if name == "I2_S" else name]


def _name_of(form: TernaryFormat | DenseType) -> str:
    return form.name if isinstance(form, DenseType) else form.gguf_type


def _cpu(options: ConversionOptions) -> CpuFamily:
    return cpu_family() if options.cpu == "auto" else options.cpu


def _name(artifact: Artifact) -> str:
    """Base model and stage, for people."""
    base = artifact.lineage.get("base", {}).get("name") if isinstance(artifact.lineage.get("base"), Mapping) else None
    stage = artifact.lineage.get("stage")
    return " ".join(str(part) for part in (base, stage) if part) or artifact.folder.name


def _lineage(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """What a model was made from; the full record stays with the checkpoint."""
    kept = ("base", "stage", "ancestors", "data", "tokens", "seed", "fingerprint", "git_commit", "versions")
    return {key: lineage[key] for key in kept if key in lineage}


def _summary(
    options: ConversionOptions,
    plan: ExportPlan,
    source: TensorSource,
    tensors: list[PlannedTensor],
    verification: Verification | None,
) -> Conversion:
    stored = options.output.stat().st_size
    projections = sum(tensor.nbytes for tensor in tensors if tensor.name and names.is_ternary_weight(tensor.name))
    parameters = {name: prod(source.shape(name)) for name in source.names}
    weights_f16 = 2 * sum(count for name, count in parameters.items() if names.is_ternary_weight(name))
    header = stored - sum(tensor.nbytes for tensor in tensors)
    matrices_f16 = 2 * sum(count for name, count in parameters.items() if len(source.shape(name)) == 2)
    vectors = 4 * sum(count for name, count in parameters.items() if len(source.shape(name)) == 1)
    placement: Placement = "none" if plan.bitnet is None else plan.bitnet.placement
    return Conversion(
        path=options.output,
        row=plan.row,
        weight_type=_name_of(plan.weight_format),
        table_type=plan.table_type.name,
        padding=plan.padding,
        epsilon_changes=[] if plan.padding.is_none else plan.padding.epsilon_changes(placement),
        projection_bytes=projections,
        projection_bytes_f16=weights_f16,
        file_bytes=stored,
        file_bytes_f16=header + matrices_f16 + vectors,
        notes=_notes(plan),
        verification=verification,
    )


def _notes(plan: ExportPlan) -> list[str]:
    """What a user should know that is no error."""
    notes: list[str] = []
    bitnet = plan.bitnet
    if bitnet is not None and plan.row.target != "wrinklefree" and bitnet.activation_bits != 8:
        bits = "unquantized" if bitnet.activation_bits is None else f"{bitnet.activation_bits}-bit"
        notes.append(f"the model was trained with {bits} activations; {plan.row.target} computes with 8-bit ones")
    if plan.row.target == "bitnet.cpp":
        notes.append("checked against this library's reader; it was not run in BitNet.cpp itself")
    if _name_of(plan.weight_format) == "Q4_0":
        notes.append("Q4_0 holds the ternary weights exactly, in 4.5 bits each; llama-quantize would not")
    return notes
