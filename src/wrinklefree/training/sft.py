"""Fine-tuning on the task with cross-entropy: the teacher of stage 3, and the baseline that it has to beat."""

from wrinklefree.training.stage import TRAINING_SECTIONS, Stage
from wrinklefree.training.stage2 import cross_entropy

FP_SFT = Stage(
    name="fp_sft",
    title="full-precision fine-tuning",
    folder="fp_sft",
    pointer="checkpoint",
    reads=(),
    ternary=False,
    sections=TRAINING_SECTIONS,
    objective=cross_entropy,
)

BITNET_SFT = Stage(
    name="bitnet_sft",
    title="BitNet-SFT: ternary fine-tuning straight after stage 1",
    folder="bitnet_sft",
    pointer="checkpoint",
    reads=("stage1",),
    ternary=True,
    sections=TRAINING_SECTIONS,
    objective=cross_entropy,
)
