"""An artifact: the folder that a stage writes and the next stage, the evaluation and the exports read.

It holds `config.json` (architecture and, when ternary, the BitNet spec), `model.safetensors`, the tokenizer,
`lineage.json` (parents, stage, data, tokens ...) and `manifest.json` with size and SHA-256 of all others. It appears by
one rename: there is no half-written artifact. Reading verifies every byte, as loaders of tensor files would let a
flipped bit pass.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from wrinklefree.models.bitlinear import quantization_of
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.subln import subln_strength_of
from wrinklefree.models.weights import Cut, assemble, read_rows, read_safetensors
from wrinklefree.utils.checkpoint import write_tensors
from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.manifest import MANIFEST, commit_folder, verify_manifest, write_manifest
from wrinklefree.utils.storage import atomic_write, check_space, explained, temporary_folder
from wrinklefree.utils.tokenizer import TextTokenizer

CONFIG, WEIGHTS, LINEAGE, CARD = "config.json", "model.safetensors", "lineage.json", "README.md"
POINTERS = ("stage3_checkpoint", "stage2_checkpoint", "stage1_9_checkpoint", "stage1_checkpoint", "checkpoint")
"""Links inside a stage's output folder that lead to its newest artifact."""


@dataclass(frozen=True)
class Artifact:
    """A verified artifact folder."""

    folder: Path
    architecture: Architecture
    bitnet: BitNetSpec | None
    lineage: Mapping[str, Any]
    fingerprint: str
    """SHA-256 over config, weights and tokenizer; the lineage, which holds times and versions, is left out."""

    def load_model(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, *, cut: Cut | None = None
    ) -> CausalLM:
        """The model, with the lambda and the SubLN strength that it was saved with; `cut` as in `assemble`."""
        files = [self.folder / WEIGHTS]
        tensors = read_safetensors(files) if cut is None else read_rows(files)
        source = str(self.folder / WEIGHTS)
        return assemble(self.architecture, self.bitnet, tensors, source=source, device=device, dtype=dtype, cut=cut)

    def load_tokenizer(self) -> TextTokenizer:
        """The tokenizer that the model was trained with."""
        return TextTokenizer.from_folder(self.folder)


def write_artifact(
    folder: Path, model: CausalLM, tokenizer: TextTokenizer, lineage: Mapping[str, Any], *, card: str | None = None
) -> Artifact:
    """Write a model as an artifact, replacing an older one at the same place; what is on the disk is then verified.

    The recorded lambda and SubLN strength are the ones that the model has now, the weights are in its parameters' dtype.
    `card` is a model card for people, kept as README.md.

    Raises:
        StorageError: the disk is full or refuses.
        CheckpointError: the disk holds something else than was written.
    """
    bitnet = model.bitnet
    if bitnet is not None:
        now = {"quantization_lambda": quantization_of(model), "subln_strength": subln_strength_of(model)}
        bitnet = bitnet.model_copy(update=now)
    config = {
        "architecture": model.architecture.model_dump(),
        "bitnet": None if bitnet is None else bitnet.model_dump(),
    }
    tensors = dict(_parameters(model))
    check_space(folder, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    temporary = temporary_folder(folder)
    try:
        with explained(folder):
            digest = write_tensors(temporary / WEIGHTS, tensors)
            tokenizer.save(temporary)
        atomic_write(temporary / CONFIG, json.dumps(config, indent=2) + "\n")
        atomic_write(temporary / LINEAGE, json.dumps(dict(lineage), indent=2, sort_keys=True) + "\n")
        if card is not None:
            atomic_write(temporary / CARD, card)
        write_manifest(temporary, {"kind": "artifact"}, digests={WEIGHTS: digest})
        commit_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return read_artifact(folder)


def read_artifact(
    folder: str | Path, *, expect_architecture: Architecture | None = None, expect_bitnet: bool | None = None
) -> Artifact:
    """Verify an artifact and return its record; a stage's output folder stands for its newest artifact.

    Args:
        folder: The artifact, or a folder with one of the `POINTERS`.
        expect_architecture: What the caller is about to build.
        expect_bitnet: Whether the caller needs a ternary (true) or a full-precision (false) model.

    Raises:
        CheckpointError: it is no artifact, a file was changed, or it holds another model than expected; names the file or
            the first field that differs.
    """
    folder = resolve_artifact(Path(folder))
    manifest = verify_manifest(folder)
    files: Mapping[str, Mapping[str, Any]] = manifest["files"]
    for name in (CONFIG, WEIGHTS, LINEAGE):
        if name not in files:
            raise CheckpointError(f"{folder} is no artifact: it has a {MANIFEST} but no {name}")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        architecture = Architecture.model_validate(config["architecture"])
        bitnet = None if config["bitnet"] is None else BitNetSpec.model_validate(config["bitnet"])
    except (ValidationError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder / CONFIG} was written by another version ({reason}); write it again") from error
    if expect_architecture is not None:
        check_same(expect_architecture, architecture, source=str(folder))
    if expect_bitnet is not None and expect_bitnet != (bitnet is not None):
        kinds = {True: "ternary", False: "full precision"}
        raise CheckpointError(
            f"{folder} holds a {kinds[bitnet is not None]} model, a {kinds[expect_bitnet]} one is needed; "
            "pass the output of another stage"
        )
    identity = {name: record["sha256"] for name, record in files.items() if name != LINEAGE}
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    lineage = json.loads((folder / LINEAGE).read_bytes())
    return Artifact(folder, architecture, bitnet, lineage, fingerprint)


def resolve_artifact(folder: Path) -> Path:
    """The artifact that a path means: itself, or what a stage folder's pointer leads to."""
    if (folder / MANIFEST).is_file() or (folder / CONFIG).is_file():
        return folder
    pointers = [folder / name for name in POINTERS if (folder / name).is_dir()]
    if len(pointers) == 1:
        return pointers[0].resolve()
    if not folder.exists():
        raise CheckpointError(f"{folder} does not exist; pass an artifact or a stage's output folder")
    found = "several pointers: " + ", ".join(p.name for p in pointers) if pointers else "no config.json"
    raise CheckpointError(f"{folder} is no artifact ({found}); pass the folder that a stage wrote")


def check_same(expected: Architecture, found: Architecture, *, source: str) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        CheckpointError: naming every field that differs, with both values.
    """
    ours, theirs = expected.model_dump(), found.model_dump()
    different = [
        f"{name} is {theirs[name]}, model.architecture says {ours[name]}" for name in ours if ours[name] != theirs[name]
    ]
    if different:
        raise CheckpointError(f"{source} holds another model: {'; '.join(different)}; choose model=... to match it")


def _parameters(model: CausalLM) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
