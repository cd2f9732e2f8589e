"""What `scripts/run_evaluation.py` is told. Imports no torch, so that mistakes are answered at once."""

import difflib
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator

from wrinklefree.composition import compose, groups
from wrinklefree.training.config import RunConfig
from wrinklefree.training.study_config import BASE, split_keys
from wrinklefree.utils.config import Config, decode
from wrinklefree.utils.errors import ConfigError

TEXT = "text"
"""The pseudo-task that stands for bits per byte and perplexity of the `data=` text."""
LM_EVAL = "lm_eval:"
"""Prefix of tasks that lm-eval's harness scores."""

Split = Literal["validation", "test"]


class EvaluationCommand(Config):
    """The command's own keys; all others compose as for training, and choose model and text."""

    checkpoint: str
    """An artifact, a stage's folder, a Hugging Face folder, a GGUF file, or `base`: the model of `model=`."""
    compare: str | None = None
    """A second checkpoint, scored on the same items."""
    tasks: tuple[str, ...] = Field(default=(TEXT,), min_length=1)
    split: Split = "test"
    max_tokens: int = Field(default=50_000, ge=1)
    """Held-out tokens of text."""
    max_examples: int | None = Field(default=None, ge=1)
    """Examples of each task, spread evenly over the split; null: all."""
    max_seq_length: int | None = Field(default=None, ge=8)
    """Tokens a row; null: 512, or the model's context where that is shorter."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Length of generated responses."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    kernels: Literal["auto", "packed", "torch"] = "auto"
    """Who multiplies ternary layers: the CPU engine's two-bit kernels or torch; auto: the kernels where there is no GPU."""
    output: str | None = None
    """Where the JSON goes; null: evaluation.json in `output_dir`."""
    lm_eval_tasks: str | None = None
    """Folder of local lm-eval task files."""

    @field_validator("tasks")
    @classmethod
    def _no_task_twice(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        doubled = sorted({task for task in tasks if tasks.count(task) > 1})
        if doubled:
            raise ValueError(f"{', '.join(doubled)} stands there twice")
        return tasks

    @property
    def harness_tasks(self) -> list[str]:
        """Names of the lm-eval tasks."""
        return [task.removeprefix(LM_EVAL) for task in self.tasks if task.startswith(LM_EVAL)]

    @property
    def own_tasks(self) -> list[str]:
        """Tasks of this library, `text` left out."""
        return [task for task in self.tasks if task != TEXT and not task.startswith(LM_EVAL)]


def parse_evaluation(arguments: Sequence[str]) -> tuple[EvaluationCommand, RunConfig]:
    """Decode a command line of `key=value`; the text is `data=packaged` unless the command chooses another.

    Raises:
        ConfigError: in one line a mistake.
    """
    own, others = split_keys(arguments, EvaluationCommand)
    known = {*RunConfig.model_fields, *groups()}
    for argument in others:
        key = argument.lstrip("+~").partition("=")[0].partition(".")[0]
        if key not in known and key != "hydra":
            close = difflib.get_close_matches(key, [*EvaluationCommand.model_fields, *sorted(known)], n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{key}: unknown key; run_evaluation.py --help lists its own{meant}")
    if "checkpoint" not in own:
        raise ConfigError(
            f"checkpoint: missing; give checkpoint=<folder>, or checkpoint={BASE} for the model of model="
        )
    command = decode(EvaluationCommand, own)
    return command, compose(["training=fp_pretrain", "data=packaged", *others]).config
