"""Artifacts and GGUF files into the engine's packed form, one tensor at a time: peak memory is the packed model's.

A model that takes long to pack is packed once and read from `packed_file`'s cache afterwards.
"""

from pathlib import Path

from wrinklefree.models.artifact import WEIGHTS, read_artifact
from wrinklefree.models.config import BitNetSpec
from wrinklefree.models.gguf_weights import CONFIG_KEY, config_from_gguf, exported_tensors
from wrinklefree.models.weights import read_safetensors
from wrinklefree.serving.engine.native.model import HeadType, PackedModel
from wrinklefree.serving.engine.native.packed_file import load_or_pack
from wrinklefree.utils.errors import ConfigError
from wrinklefree.utils.gguf import GGUFFile, read_gguf
from wrinklefree.utils.manifest import MANIFEST
from wrinklefree.utils.tokenizer import TextTokenizer


def load_packed(path: Path, head: HeadType = "int8") -> tuple[PackedModel, TextTokenizer]:
    """Model and tokenizer of a GGUF file of ours, an artifact, or the newest artifact of a stage's folder.

    Raises:
        CheckpointError: the model is damaged.
        ConfigError: it is full precision, or a GGUF file that our converter did not write.
    """
    if path.is_file():
        return _load_gguf(read_gguf(path), head)
    artifact = read_artifact(path)
    bitnet = _ternary(path, artifact.bitnet)
    files = [artifact.folder / WEIGHTS, artifact.folder / MANIFEST]

    def pack() -> PackedModel:
        return PackedModel.from_tensors(artifact.architecture, bitnet, read_safetensors(files[:1]), head)

    return load_or_pack(files, artifact.architecture, bitnet, head, pack), artifact.load_tokenizer()


def _load_gguf(file: GGUFFile, head: HeadType) -> tuple[PackedModel, TextTokenizer]:
    if CONFIG_KEY not in file.metadata:
        raise ConfigError(
            f"{file.path} was not written by wrinklefree; the CPU engine reads our own files, use llama.cpp"
        )
    architecture, found = config_from_gguf(file)
    bitnet = _ternary(file.path, found)

    def pack() -> PackedModel:
        return PackedModel.from_tensors(architecture, bitnet, exported_tensors(file, architecture, bitnet), head)

    packed = load_or_pack([file.path], architecture, bitnet, head, pack)
    return packed, TextTokenizer.from_gguf(file)


def _ternary(path: Path, bitnet: BitNetSpec | None) -> BitNetSpec:
    if bitnet is None:
        raise ConfigError(f"{path} holds a full-precision model and the CPU engine runs ternary ones; use torch")
    if not bitnet.is_plain:
        raise ConfigError(
            f"{path} has weight_scale={bitnet.weight_scale}, dead_zone_bias={bitnet.dead_zone_bias:g}, which the CPU engine "
            "does not compute; convert it with scripts/convert_to_gguf.py, which folds them, and run the file"
        )
    return bitnet
