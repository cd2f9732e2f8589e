"""Stage 1.9: align hidden states with the pretrained model's. Ours; the closest published loss is arXiv:2402.11295."""

from wrinklefree.distillation.combined_loss import layerwise_objective
from wrinklefree.distillation.objective import Objective
from wrinklefree.models.config import Architecture
from wrinklefree.training.config import RunConfig
from wrinklefree.training.stage import TRAINING_SECTIONS, Stage


def _objective(config: RunConfig, student: Architecture, teacher: Architecture | None) -> Objective:
    return layerwise_objective(config.layerwise, student)


STAGE = Stage(
    name="stage1_9",
    title="stage 1.9: layer-wise distillation",
    folder="layerwise_distillation",
    pointer="stage1_9_checkpoint",
    reads=("stage1",),
    ternary=True,
    sections=(*TRAINING_SECTIONS, "layerwise"),
    objective=_objective,
    teacher="base",
)
