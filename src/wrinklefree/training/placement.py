"""Where the models of a run lie: whole on this process's device, or cut over the processes of the run.

One process holds a model as it was loaded. Several (or `distributed=fsdp_*` on one) build it without memory, cut it, and
read from the files only the rows that each of them keeps, so no process ever holds all of it. At the end rank 0 gets the
whole student on its CPU, to write the artifact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from wrinklefree.distillation.teacher import Teacher
from wrinklefree.models.artifact import read_artifact
from wrinklefree.models.bitlinear import quantization_of, set_quantization
from wrinklefree.models.config import BitNetSpec, Quantization
from wrinklefree.models.hf import load_pretrained
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.shards import is_sharded, whole
from wrinklefree.models.subln import set_subln_strength, subln_strength_of
from wrinklefree.models.weights import Cut, assemble
from wrinklefree.training.config import DistributedConfig, RunConfig
from wrinklefree.training.device import Compute
from wrinklefree.training.inputs import StageInput
from wrinklefree.utils import distributed
from wrinklefree.utils.errors import ConfigError
from wrinklefree.utils.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from wrinklefree.training.code_gather import CodeGather


@dataclass(frozen=True)
class Student:
    """The model that a run trains."""

    model: CausalLM
    refresh_weights: Callable[[], None] | None
    """For the trainer: brings what is derived from the masters up to date."""


def is_cut(config: DistributedConfig) -> bool:
    """Whether this run cuts its models; `strategy: single` in a group of processes is an error found earlier."""
    return config.strategy == "fsdp"


def load_model(
    source: StageInput,
    config: RunConfig,
    *,
    ternary: bool | None = None,
    any_size: bool = False,
    cut: Cut | None = None,
) -> tuple[CausalLM, TextTokenizer]:
    """Weights and tokenizer of a stage's input.

    Args:
        source: An artifact, or the pretrained model.
        config: The run's.
        ternary: Which kind it must be, where that matters.
        any_size: Whether it may be another model than the command's: a teacher may be larger.
        cut: Cuts it over processes.
    """
    if source.path is None:
        return load_pretrained(config.model, cut=cut)
    expected = None if any_size else config.model.architecture
    artifact = read_artifact(source.path, expect_architecture=expected, expect_bitnet=ternary)
    if artifact.bitnet is not None:
        _check_options(config.model.quantization, artifact.bitnet, source)
    return artifact.load_model(cut=cut), artifact.load_tokenizer()


def _check_options(wanted: Quantization, found: BitNetSpec, source: StageInput) -> None:
    """Stage 1 decides how weights are quantized; asking for something else later would be ignored in silence."""
    default = Quantization()
    for key in ("weight_scale", "dead_zone_bias"):
        asked, has = getattr(wanted, key), getattr(found, key)
        if asked not in (getattr(default, key), has):
            raise ConfigError(
                f"model.quantization.{key}={asked}, but {source.describe()} was made with {has}: stage 1 decides this; run "
                f"training=stage1_subln with it, or leave it out"
            )


def place_student(config: RunConfig, compute: Compute, load: Callable[[Cut | None], CausalLM]) -> Student:
    """Load the student to where it is trained; `load` takes what cuts it, if anything does."""
    if not is_cut(config.distributed):
        return Student(load(None).to(compute.device), None)
    cutter = Cutter(config.distributed, compute)
    model = load(cutter)
    codes = cutter.codes
    return Student(model, None if codes is None else codes.update)


def place_teacher(
    config: RunConfig, compute: Compute, load: Callable[[Cut | None], CausalLM], *, offload: bool
) -> tuple[Teacher, CausalLM]:
    """The frozen teacher, cut like the student, and its model."""
    if not is_cut(config.distributed):
        model = load(None)
        return Teacher(model if offload else model.to(compute.device), offload=offload), model
    model = load(Cutter(config.distributed.model_copy(update={"optimizer_offload": offload}), compute, frozen=True))
    # What the losses read of it stays gathered until the step is done.
    return Teacher(model, on_release=partial(_reshard, model)), model


def from_scratch(model: CausalLM, cut: Cut | None) -> CausalLM:
    """A randomly initialised model, drawn alike on every process, and cut if need be."""
    if cut is None:
        return model
    tensors = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return assemble(model.architecture, model.bitnet, tensors, source="the random model", cut=cut)


def collect(model: CausalLM) -> CausalLM | None:
    """The whole model, on the CPU; None on other ranks than 0. Every rank must call it."""
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        return model.to("cpu")
    _reshard(model)
    tensors = {}
    for name, parameter in model.named_parameters():
        value = whole(parameter)
        if distributed.is_main():
            tensors[name] = value.cpu()
        del value
    if not distributed.is_main():
        return None
    gathered = assemble(
        model.architecture, model.bitnet, ((name, tensors.pop(name)) for name in list(tensors)), source="the processes"
    )
    set_quantization(gathered, quantization_of(model))
    set_subln_strength(gathered, subln_strength_of(model))
    return gathered


def _reshard(model: CausalLM) -> None:
    from wrinklefree.training.fsdp_wrapper import reshard

    reshard(model)


class Cutter:
    """A `Cut` that remembers who keeps the gathered codes."""

    def __init__(self, config: DistributedConfig, compute: Compute, *, frozen: bool = False) -> None:
        self._config, self._compute, self._frozen = config, compute, frozen
        self.codes: CodeGather | None = None

    def __call__(self, model: CausalLM) -> None:
        """Cut an empty model over the group's processes, and give this one's rows memory."""
        from wrinklefree.training.fsdp_wrapper import materialise, shard, sharding_for

        if self._frozen:
            model.requires_grad_(False)
        if model.bitnet is not None and not model.bitnet.is_plain:
            raise ConfigError(
                f"distributed={self._config.name} shards weights by rows, and model.quantization.weight_scale="
                f"{model.bitnet.weight_scale}, dead_zone_bias={model.bitnet.dead_zone_bias:g} need whole ones; train with "
                "distributed=single_gpu, or start from a stage 1 without these options"
            )
        sharding = sharding_for(self._config, self._compute)
        self.codes = shard(model, sharding)
        materialise(model, torch.device("cpu") if sharding.offload else self._compute.device)
