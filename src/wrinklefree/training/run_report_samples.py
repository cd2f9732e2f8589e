"""What a trained model says: greedy continuations of the run's own held-out text and task, kept for its page.

Written once, after the last step, by a run in one process: of a sharded model no process could generate alone.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from wrinklefree.data.finetune_dataset import encode_prompt
from wrinklefree.data.pretrain_dataset import HeldOut
from wrinklefree.data.tasks import Example, Task
from wrinklefree.models.generate import generate
from wrinklefree.models.llama import CausalLM
from wrinklefree.training.callbacks import Callback, RunInfo, StepReport
from wrinklefree.training.device import Compute
from wrinklefree.training.evaluation import fully_quantized
from wrinklefree.utils.storage import atomic_write
from wrinklefree.utils.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.json"
NEW_TOKENS = 40
PROMPT_TOKENS = 24
"""Of a prompt from held-out text."""


@dataclass(frozen=True)
class Prompt:
    """Where a prompt is from, and its tokens, the start token first."""

    source: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """A prompt and what the model makes of it."""

    source: str
    prompt: str
    continuation: str


@dataclass(frozen=True)
class Validation:
    """The scores of a run's validations, and prompts out of the same held-out data."""

    scorers: Sequence[Callable[[], Mapping[str, float]]]
    prompts: Sequence[Prompt]

    def __call__(self) -> Mapping[str, float]:
        """Every score by its name."""
        return {name: value for scorer in self.scorers for name, value in scorer().items()}


def text_prompt(held_out: HeldOut) -> Prompt:
    """The beginning of the first held-out document; at most half of it, so that there is something to go on with."""
    batch = held_out.batches[0]
    documents = batch.document_ids[0].tolist()
    length = next((at for at, document in enumerate(documents) if document != documents[0]), len(documents))
    return Prompt("held-out text", tuple(batch.input_ids[0, : max(1, min(PROMPT_TOKENS, length // 2))].tolist()))


def task_prompt(task: Task, example: Example, tokenizer: TextTokenizer, max_seq_length: int) -> Prompt:
    """A task's question, cut as in training."""
    longest = max(max_seq_length - NEW_TOKENS, max_seq_length // 2)
    return Prompt(f"{task.name}, validation", tuple(encode_prompt(task, example, tokenizer, longest)))


class Samples(Callback):
    """Writes `samples.json` into the run's folder after the last step; a failure costs the samples alone."""

    def __init__(self, model: CausalLM, tokenizer: TextTokenizer, compute: Compute, prompts: Sequence[Prompt]) -> None:
        self._model, self._tokenizer, self._compute = model, tokenizer, compute
        self._prompts = prompts
        self._path: Path | None = None

    def on_start(self, run: RunInfo) -> None:
        """Remember the folder; samples of an earlier run in it are gone."""
        self._path = run.run_dir / SAMPLES_FILE
        self._path.unlink(missing_ok=True)

    def on_end(self, report: StepReport | None) -> None:
        """Generate and write."""
        assert self._path is not None, "on_start comes first"
        try:
            samples = [asdict(sample) for sample in self._continue()]
            atomic_write(self._path, json.dumps(samples, indent=1, ensure_ascii=False) + "\n")
        except Exception as error:  # noqa: BLE001 (the trained model is not written yet, and worth more)
            reason = " ".join(str(error).split())[:300]
            logger.warning("no samples of this run (%s: %s); the run goes on", type(error).__name__, reason)

    def _continue(self) -> list[Sample]:
        tokenizer, samples = self._tokenizer, list[Sample]()
        with fully_quantized(self._model), self._model.uncompiled(), self._compute.autocast():
            for prompt in self._prompts:
                room = self._model.architecture.max_position_embeddings - len(prompt.ids)
                [new] = generate(
                    self._model,
                    [prompt.ids],
                    max_new_tokens=max(0, min(NEW_TOKENS, room)),
                    eos_token_id=tokenizer.eos_token_id,
                )
                samples.append(Sample(prompt.source, tokenizer.decode(prompt.ids[1:]), tokenizer.decode(new)))
        return samples


def read_samples(folder: Path) -> list[Sample]:
    """The samples in a run's folder; none without the file, or where it is damaged."""
    try:
        return [Sample(**entry) for entry in json.loads((folder / SAMPLES_FILE).read_bytes())]
    except (OSError, ValueError, TypeError):
        return []
