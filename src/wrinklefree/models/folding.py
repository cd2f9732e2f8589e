"""A ternary model with another weight scale or a dead-zone bias as a plain one that computes the same.

Files and engines know codes, one scale that is the mean of |W|, and biases. A weight that `ternarize` turns into the same
codes and scale always exists (`latent_weight`), and the dead-zone bias does not depend on the input, so it is a bias.
What is lost are the full-precision weights: a folded model is for export, training goes on from the original.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from wrinklefree.models.artifact import Artifact, write_artifact
from wrinklefree.models.bitlinear import GAIN, BitLinear
from wrinklefree.models.config import Architecture
from wrinklefree.models.gguf_weights import latent_weight
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.weights import assemble
from wrinklefree.quantization.weight_quant import ternarize
from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.storage import temporary_folder

logger = logging.getLogger(__name__)


@contextmanager
def folded(artifact: Artifact, output: Path) -> Iterator[Artifact]:
    """The artifact where it is plain; otherwise a folded copy of it beside `output`, deleted afterwards.

    The copy has the original's lineage and fingerprint: it is the same model.
    """
    if artifact.bitnet is None or artifact.bitnet.is_plain:
        yield artifact
        return
    logger.info(
        "%s: folding weight_scale=%s, dead_zone_bias=%g into weights and biases",
        artifact.folder, artifact.bitnet.weight_scale, artifact.bitnet.dead_zone_bias,
    )  # fmt: skip
    temporary = temporary_folder(output.with_name(f"{output.name}.folded"))
    try:
        copy = write_artifact(
            temporary / "artifact", fold(artifact.load_model()), artifact.load_tokenizer(), artifact.lineage
        )
        yield replace(copy, fingerprint=artifact.fingerprint)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def fold(model: CausalLM) -> CausalLM:
    """A plain ternary model with the function of `model` at lambda = 1, which is left as it was.

    With a dead-zone bias every projection of the result has a bias.

    Raises:
        CheckpointError: a scale is not finite.
    """
    spec = model.bitnet
    assert spec is not None, "a full-precision model has nothing to fold"
    has_bias = spec.dead_zone_bias > 0
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not name.endswith(GAIN):
            tensors[name] = parameter.detach()
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            tensors[f"{name}.weight"] = _plain_weight(name, module)
            bias = module.folded_bias()
            if has_bias and bias is not None:
                tensors[f"{name}.bias"] = bias.detach()
    architecture: Architecture = model.architecture
    if has_bias:
        biased = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
        architecture = architecture.model_copy(update=biased)
    plain = spec.model_copy(update={"weight_scale": "absmean", "dead_zone_bias": 0.0})
    return assemble(architecture, plain, tensors.items(), source="the folded model")


def _plain_weight(name: str, layer: BitLinear) -> Tensor:
    ternary = layer.ternary()
    weight = latent_weight(ternary.codes, float(ternary.scale))
    again = ternarize(weight)
    # Where every code is 0 the scale multiplies nothing.
    same_scale = torch.equal(again.scale, ternary.scale) or not bool(ternary.codes.any())
    if not (ternary.scale.isfinite() and same_scale and torch.equal(again.codes, ternary.codes)):
        raise CheckpointError(
            f"{name}: no plain weight has its codes and its scale {float(ternary.scale):g}; export an earlier checkpoint"
        )
    return weight
