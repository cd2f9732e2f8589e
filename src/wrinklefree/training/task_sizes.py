"""How large the tasks are, for estimates that must not download them. Characters are of prompt and response together.

Examples of generated and packaged tasks were counted in this repository, those of the hub's are their published
training splits less the 2% that validate. A token is taken to be four characters, as for English text and a vocabulary of
tens of thousands; characters of the hub's tasks are rounded and include our templates.
"""

from dataclasses import dataclass
from types import MappingProxyType

from wrinklefree.data.file_task import PREFIX, file_task
from wrinklefree.utils.errors import ConfigError

CHARACTERS_A_TOKEN = 4.0


@dataclass(frozen=True)
class TaskSize:
    """Training examples, and mean tokens of one."""

    examples: int
    tokens: float
    response_tokens: float


_CHARACTERS = MappingProxyType(
    {
        "recall": (1584, 39, 6),
        "in_context_lookup": (3000, 101, 6),
        "movie_reviews": (8447, 140, 9),
        "news_topic": (1441, 2269, 9),
        "boolq": (2058, 625, 4),
        "xsum": (645, 2385, 127),
        "sst2": (66_002, 80, 9),
        "cola": (8_380, 70, 11),
        "mnli": (384_848, 210, 11),
        "qnli": (102_648, 290, 9),
        "rte": (2_440, 350, 9),
        "wnli": (622, 180, 9),
        "mrpc": (3_595, 260, 11),
        "qqp": (356_569, 150, 9),
        "cnn_dailymail": (281_371, 4300, 290),
    }
)
"""Task -> (training examples, characters of an example, of them characters of the response)."""


def task_size(task: str, max_seq_length: int) -> TaskSize:
    """The size of a task whose examples are cut to the rows.

    Raises:
        ConfigError: a task that nobody has measured.
    """
    if task.startswith(PREFIX):
        found = file_task(task).load("train")
        examples = len(found)
        characters = sum(len(example.prompt) + len(example.response) for example in found) // max(1, examples)
        response = sum(len(example.response) for example in found) // max(1, examples)
        return _size(examples, characters, response, max_seq_length)
    if task not in _CHARACTERS:
        raise ConfigError(
            f"estimate=true does not know the size of task {task!r}: give the run's length (training.max_steps=...) and "
            "the share of positions that are targets (estimation.target_share=...)"
        )
    return _size(*_CHARACTERS[task], max_seq_length)


def _size(examples: int, characters: int, response: int, max_seq_length: int) -> TaskSize:
    tokens = min(float(max_seq_length), characters / CHARACTERS_A_TOKEN + 1)
    return TaskSize(examples, tokens, min(tokens / 2, max(1.0, response / CHARACTERS_A_TOKEN)))
