"""Full-precision pretraining: from scratch (the tiny model), or continued (the control of every ternary run)."""

from wrinklefree.training.stage import TRAINING_SECTIONS, Stage
from wrinklefree.training.stage2 import cross_entropy

STAGE = Stage(
    name="fp_pretrain",
    title="full-precision pretraining",
    folder="fp_pretrain",
    pointer="checkpoint",
    reads=(),
    ternary=False,
    sections=(*TRAINING_SECTIONS, "influence"),
    objective=cross_entropy,
)
