"""Stage 2: continue pretraining with ternary weights (arXiv:2510.13998, section 3.2).

Next-token cross-entropy; where `training.logits.weight` is above 0, also the KL from the pretrained model's next-token
distribution, which is ours and not the paper's.
"""

from wrinklefree.distillation.combined_loss import language_model_objective, taught_language_model_objective
from wrinklefree.distillation.objective import Objective
from wrinklefree.models.config import Architecture
from wrinklefree.training.config import RunConfig, Stage2Config
from wrinklefree.training.stage import TRAINING_SECTIONS, Stage


def cross_entropy(config: RunConfig, student: Architecture, teacher: Architecture | None) -> Objective:
    """Cross-entropy at the targets: every token of text, the response tokens of a task."""
    return language_model_objective()


def _objective(config: RunConfig, student: Architecture, teacher: Architecture | None) -> Objective:
    training = config.training
    assert isinstance(training, Stage2Config)
    if teacher is None:
        return cross_entropy(config, student, teacher)
    logits = training.logits
    return taught_language_model_objective(
        logits.weight, logits.temperature, student, teacher, token_scaling=logits.token_scaling
    )


STAGE = Stage(
    name="stage2",
    title="stage 2: continued pretraining",
    folder="continue_pretrain",
    pointer="stage2_checkpoint",
    reads=("stage1_9", "stage1"),
    ternary=True,
    sections=(*TRAINING_SECTIONS, "influence"),
    objective=_objective,
)
