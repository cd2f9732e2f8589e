"""What every export refuses before it writes: a model that is not finished, and an output that would damage its input."""

from pathlib import Path

from wrinklefree.models.config import BitNetSpec
from wrinklefree.utils.errors import CheckpointError, ConfigError


def refuse_unfinished(bitnet: BitNetSpec | None, *, source: str) -> None:
    """Refuse a model whose warm-ups have not reached 1: rounding it would change its function.

    Raises:
        CheckpointError: with both values.
    """
    if bitnet is None or (bitnet.quantization_lambda == 1.0 and bitnet.subln_strength == 1.0):
        return
    raise CheckpointError(
        f"{source} is at quantization lambda {bitnet.quantization_lambda:g} and SubLN strength {bitnet.subln_strength:g}, and "
        "an export needs 1 and 1: train it on (training=stage2_pretrain, then training=stage3_distill), or pass the output "
        "of a later stage"
    )


def refuse_inside(output: Path, checkpoint: Path) -> None:
    """Refuse to write into the checkpoint that is read: it would no longer match its manifest, or be overwritten.

    Raises:
        ConfigError: naming both, and another place.
    """
    if output.absolute().parent.resolve().is_relative_to(checkpoint.resolve()):
        raise ConfigError(
            f"--output {output} lies inside the checkpoint {checkpoint}, which must stay as it was written; write elsewhere, "
            f"for example --output {checkpoint.absolute().parent / output.name}"
        )
