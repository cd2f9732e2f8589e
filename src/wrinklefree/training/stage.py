"""What a stage is: what it reads, where it writes, and what it minimises. The trainer never asks which one runs.

Each stage has a module with its row (`stage1.py`, `stage1_9.py`, `stage2.py`, `stage3.py`, `sft.py`, `pretrain.py`);
`stages.py` is the table of all rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from wrinklefree.distillation.objective import Objective
from wrinklefree.models.config import Architecture
from wrinklefree.training.config import RunConfig

TeacherKind = Literal["none", "base", "task"]
"""Who teaches: nobody; the pretrained model; the model fine-tuned on the task."""

MakeObjective = Callable[[RunConfig, Architecture, Architecture | None], Objective]
"""(configuration, student, teacher) -> what the stage minimises."""

TRAINING_SECTIONS = ("model", "training", "data", "optimizer", "packing", "seed")
"""Root keys that decide the result of every stage that trains."""


@dataclass(frozen=True)
class Stage:
    """One row of the table."""

    name: str
    title: str
    folder: str
    """Suffix of the stage's folder below `output_dir`."""
    pointer: str
    """Symlink in that folder to the newest completed artifact."""
    reads: tuple[str, ...]
    """Stages whose artifact it takes, the furthest first; empty: the pretrained model."""
    ternary: bool
    """Whether the model that it writes has BitLinear layers."""
    sections: tuple[str, ...]
    """Root keys of the configuration that decide its result: the part that the fingerprint covers."""
    objective: MakeObjective | None
    """None: the stage trains nothing."""
    teacher: TeacherKind = "none"

    def folder_name(self, model_name: str) -> str:
        """Folder of this stage and model below `output_dir`."""
        return f"bitdistill_{model_name}_{self.folder}"
