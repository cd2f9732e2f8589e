"""An artifact as a folder that `transformers.AutoModelForCausalLM` loads.

The weights pass through one tensor at a time, so a model larger than the memory can be exported. The folder is filled under
a temporary name, every ternary matrix is read back and compared with the artifact, and only then it gets its name.
"""

import json
import logging
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wrinklefree.models.artifact import WEIGHTS, Artifact, read_artifact
from wrinklefree.models.folding import folded
from wrinklefree.models.weights import parameter_shapes
from wrinklefree.quantization.weight_quant import ternarize
from wrinklefree.serving import hf_modeling
from wrinklefree.serving.hf_layouts import (
    Forms,
    Layout,
    LayoutName,
    LinearClass,
    StoredTensor,
    Weights,
    build_layout,
    choose_layout,
    is_linear,
)
from wrinklefree.serving.hf_tensors import unpack_row_blocks
from wrinklefree.serving.model_card import figures_from_report, render_card
from wrinklefree.serving.refusals import refuse_inside, refuse_unfinished
from wrinklefree.utils.checkpoint import stream_tensors
from wrinklefree.utils.errors import CheckpointError, ConfigError
from wrinklefree.utils.manifest import MANIFEST, commit_folder, read_manifest, verify_manifest, write_manifest
from wrinklefree.utils.storage import atomic_write, check_space, explained, format_size, temporary_folder
from wrinklefree.utils.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

KIND = "hf_export"
"""What the manifest of an export calls it."""
SHARD_BYTES = 5_000_000_000
MODELING_FILES = ("configuration_wrinklefree.py", "modeling_wrinklefree.py")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Export:
    """What was written."""

    folder: Path
    layout: Layout
    total_bytes: int
    """Of all tensors."""
    linear_bytes: int
    """Of the linear layers inside the blocks, scales included."""
    scale_change: float
    """Largest relative change of a matrix's scale; 0 where codes and scales are stored."""


def export_hf(
    folder: str | Path,
    output: str | Path,
    *,
    layout: LayoutName | Literal["auto"] = "auto",
    weights: Weights = "bf16",
    rest: torch.dtype | None = None,
    linear_class: LinearClass = "bitlinear",
    figures: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Export:
    """Export an artifact; `output` appears complete or not at all, and replaces an earlier export only.

    Args:
        folder: An artifact, or a stage's output folder.
        output: The folder to write.
        layout: Which class is to hold the model; auto takes the most common one that can.
        weights: How block weights are stored.
        rest: Type of everything else, and of the loaded model; None takes float32 with `weights=f32`, else bfloat16.
        linear_class: For packed weights in a stock class: what unpacks them.
        figures: Measured figures for the model card.
        shard_bytes: Size at which a new weight file begins.

    Raises:
        CheckpointError: the artifact is damaged, or its warm-ups have not reached 1.
        ConfigError: the layout cannot hold the model, or `output` holds something else.
        StorageError: the disk is full or refuses.
    """
    artifact = read_artifact(folder)
    refuse_unfinished(artifact.bitnet, source=str(artifact.folder))
    final = Path(output).absolute()
    refuse_foreign_folder(final)
    refuse_inside(final, artifact.folder)
    if rest is None:
        rest = torch.float32 if weights == "f32" else torch.bfloat16
    with folded(artifact, final) as plain:
        return _export(plain, final, layout, Forms(weights, rest, linear_class), figures or {}, shard_bytes)


def _export(
    artifact: Artifact, final: Path, layout: LayoutName | Literal["auto"], forms: Forms, figures: Mapping[str, str],
    shard_bytes: int,
) -> Export:  # fmt: skip
    name = choose_layout(layout, artifact.architecture, artifact.bitnet, forms)
    plan = build_layout(name, artifact.architecture, artifact.bitnet, forms)
    total = sum(stored.entry.size for stored in plan.tensors)
    check_space(final, total)
    temporary = temporary_folder(final)
    try:
        with explained(final, needed=total):
            digests = _write_weights(temporary, artifact, plan, shard_bytes)
            _write_tokenizer(temporary, artifact)
        _write_texts(temporary, artifact, plan, figures)
        scale_change = verify_codes(temporary, artifact, plan)
        record = {"kind": KIND, "layout": plan.name, "class": plan.class_name, "source": artifact.fingerprint}
        write_manifest(temporary, record, digests=digests)
        commit_folder(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    verify_manifest(final)
    linear = sum(stored.entry.size for stored in plan.tensors if _is_linear_part(stored))
    export = Export(final, plan, total, linear, scale_change)
    logger.info(
        "%s: %s, %s of weights (%s in linear layers)",
        final, plan.class_name, format_size(total), format_size(linear),
    )  # fmt: skip
    if artifact.bitnet is not None:
        logger.info("all ternary codes read back equal; largest relative change of a scale: %.1e", scale_change)
    return export


def export_from_options(options: Namespace) -> Export:
    """Export as the command's parsed options say."""
    types = {None: None, "bf16": torch.bfloat16, "f32": torch.float32}
    figures = None
    if options.report is not None:
        figures = figures_from_report(Path(options.report), read_artifact(options.input).lineage)
    return export_hf(
        options.input,
        options.output,
        layout=options.format,
        weights=options.weights,
        rest=types[options.embedding_type],
        linear_class=options.linear_class,
        figures=figures,
    )


def refuse_foreign_folder(folder: Path) -> None:
    """Refuse to replace anything but an empty folder or an earlier export with nothing added to it.

    Raises:
        ConfigError: naming what is there.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise ConfigError(f"--output {folder} is a file or a link; give the name of a new folder")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if not present:
        return
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        manifest = {"kind": None, "files": {}}
    extra = sorted(present - set(manifest["files"]) - {MANIFEST})
    if manifest.get("kind") != KIND or extra:
        example = extra[0] if extra else MANIFEST
        raise ConfigError(f"--output {folder} holds other files ({example}, ...); give a new folder, or empty this one")


def verify_codes(folder: Path, artifact: Artifact, plan: Layout) -> float:
    """Read every ternary matrix of an export back and compare; returns the largest relative change of a scale.

    Raises:
        CheckpointError: a code differs, which would be a defect or a bad disk.
    """
    if artifact.bitnet is None:
        return 0.0
    packed = any(stored.entry.dtype == torch.uint8 for stored in plan.tensors)
    shapes = parameter_shapes(artifact.architecture, artifact.bitnet)
    change = 0.0
    with _Source(artifact.folder / WEIGHTS) as source, _Shards(folder) as shards:
        for name in filter(is_linear, shapes):
            wanted, stored = ternarize(source(name)), shards(name)
            if packed:
                codes = unpack_row_blocks(stored, shapes[name][0])
            else:
                ternary = ternarize(stored)
                codes = ternary.codes
                change = max(change, abs(float(ternary.scale / wanted.scale) - 1.0))
            if not torch.equal(codes, wanted.codes):
                different = int((codes != wanted.codes).sum())
                raise CheckpointError(
                    f"{name}: {different} of {codes.numel()} codes differ from the artifact's; try again"
                )
    return change


def _is_linear_part(stored: StoredTensor) -> bool:
    return stored.source is not None and is_linear(stored.source)


def _write_weights(folder: Path, artifact: Artifact, plan: Layout, shard_bytes: int) -> dict[str, str]:
    """Write the weight files and, for several, their index; returns their SHA-256 by name."""
    by_name = {stored.entry.name: stored for stored in plan.tensors}
    shards = _split(plan.tensors, shard_bytes)
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    with _Source(artifact.folder / WEIGHTS) as source:

        def load(name: str) -> Tensor:
            stored = by_name[name]
            if stored.source is None:
                return torch.zeros(stored.entry.shape, dtype=stored.entry.dtype)
            return stored.convert(source(stored.source))

        for index, shard in enumerate(shards, start=1):
            file = _SINGLE if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            entries = [stored.entry for stored in shard]
            digests[file] = stream_tensors(folder / file, entries, load, metadata={"format": "pt"})
            weight_map |= {entry.name: file for entry in entries}
    if len(shards) > 1:
        total = sum(stored.entry.size for stored in plan.tensors)
        index_record = {"metadata": {"total_size": total}, "weight_map": weight_map}
        atomic_write(folder / _INDEX, _json(index_record))
    return digests


def _split(tensors: Iterable[StoredTensor], shard_bytes: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for stored in tensors:
        if shards[-1] and size + stored.entry.size > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(stored)
        size += stored.entry.size
    return shards


def _write_tokenizer(folder: Path, artifact: Artifact) -> None:
    """The tokenizer as `transformers` 5 lays it out: the chat template in a file of its own, padding on the left."""
    tokenizer = artifact.load_tokenizer()
    tokenizer.save(folder)
    file = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(file.read_bytes())
    template = config.pop("chat_template", None)
    config |= {"padding_side": "left", "model_max_length": artifact.architecture.max_position_embeddings}
    atomic_write(file, _json(config))
    if template is not None:
        atomic_write(folder / "chat_template.jinja", template)


def _write_texts(folder: Path, artifact: Artifact, plan: Layout, figures: Mapping[str, str]) -> None:
    """config.json, generation_config.json, the model card, and the code of our class where it is needed."""
    ends = _end_tokens(artifact.load_tokenizer())
    atomic_write(folder / "config.json", _json({**plan.config, **ends}))
    atomic_write(folder / "generation_config.json", _json(ends))
    card = render_card(
        artifact.lineage,
        artifact.architecture,
        artifact.bitnet,
        figures,
        loading=_loading(plan),
        library="transformers",
    )
    atomic_write(folder / "README.md", card)
    if plan.name == "wrinklefree":
        for name in MODELING_FILES:
            atomic_write(folder / name, (Path(hf_modeling.__file__).parent / name).read_bytes())


def _end_tokens(tokenizer: TextTokenizer) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _loading(plan: Layout) -> str:
    """The card's section on loading."""
    trust = ", trust_remote_code=True" if plan.name == "wrinklefree" else ""
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "<this folder or repository>"',
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        'inputs = tokenizer(["Once upon a time"], return_tensors="pt").to(model.device)',
        "print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=40))[0])",
        "```",
        "",
        f"The class is `{plan.class_name}`. Written for transformers 5.",
    ]
    if plan.name == "wrinklefree":
        lines.append(
            "`modeling_wrinklefree.py` in this folder holds it. Where `wrinklefree` is installed, "
            "`wrinklefree.serving.hf_modeling.registration.register()` makes it known without `trust_remote_code`."
        )
    elif "quantization_config" in plan.config:
        lines.append(
            "Its ternary layers compile a kernel at their first use and need `accelerate` and a C compiler; the environment "
            "variable `TORCHDYNAMO_DISABLE=1` does without the compiler."
        )
    return "\n".join(lines)


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=2) + "\n"


class _Source:
    """Tensors of a safetensors file by name, one at a time, mapped rather than read into memory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Callable[[str], Tensor]:
        self._file: Any = safe_open(self._path, framework="pt")
        names = frozenset(self._file.keys())

        def load(name: str) -> Tensor:
            if name not in names:
                raise CheckpointError(f"{self._path} lacks {name}: its config.json describes another model")
            try:
                return self._file.get_tensor(name)
            except SafetensorError as error:
                raise CheckpointError(f"cannot read {name} of {self._path} ({error}); write it again") from error

        return load

    def __exit__(self, *_: object) -> None:
        del self._file


class _Shards:
    """Tensors of an export by name, whichever of its files holds them."""

    def __init__(self, folder: Path) -> None:
        self._files: Sequence[Path] = sorted(folder.glob("model*.safetensors"))

    def __enter__(self) -> Callable[[str], Tensor]:
        self._open: list[Any] = [safe_open(file, framework="pt") for file in self._files]
        where = {name: file for file in self._open for name in file.keys()}  # noqa: SIM118 - not a mapping
        return lambda name: where[name].get_tensor(name)

    def __exit__(self, *_: object) -> None:
        self._open.clear()
