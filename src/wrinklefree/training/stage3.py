"""Stage 3: fine-tune on the task, distilling from the full-precision model tuned on it (arXiv:2510.13998, eq. 13)."""

from wrinklefree.distillation.combined_loss import cached_stage3_objective, stage3_objective
from wrinklefree.distillation.objective import Objective
from wrinklefree.models.config import Architecture
from wrinklefree.training.cached_teacher import open_cache
from wrinklefree.training.config import RunConfig
from wrinklefree.training.stage import TRAINING_SECTIONS, Stage


def _objective(config: RunConfig, student: Architecture, teacher: Architecture | None) -> Objective:
    cache = open_cache(config)
    if cache is not None:
        return cached_stage3_objective(config.distillation, student, cache)
    assert teacher is not None, "stage 3 always has a teacher"
    return stage3_objective(config.distillation, student, teacher)


STAGE = Stage(
    name="stage3",
    title="stage 3: distillation fine-tuning",
    folder="distillation",
    pointer="stage3_checkpoint",
    reads=("stage2", "stage1_9", "stage1"),
    ternary=True,
    sections=(*TRAINING_SECTIONS, "influence", "distillation"),
    objective=_objective,
    teacher="task",
)
