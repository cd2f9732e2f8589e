"""Fine-tuning rows: prompts that are context, responses that are targets, and text to keep the language alive.

Rows of an epoch are a function of (seed, epoch): examples in a drawn order, packed whole, several to a row, none seeing
another. All processes know all rows, and each takes one of the next `world_size`: every example is trained on once an
epoch by one of them, all agree on the length of an epoch, and a run may continue on any other number. The state of the
stream is a row number and the state of the replayed text.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from wrinklefree.data.config import FinetuneData, PackingConfig
from wrinklefree.data.packing import Piece, Row, best_fit, collate, pack_whole
from wrinklefree.data.pretrain_dataset import pretrain_stream
from wrinklefree.data.splits import Split
from wrinklefree.data.streams import TextStream
from wrinklefree.data.tasks import Example, Task, get_task
from wrinklefree.data.tokens import Tokenizer, start_token_id
from wrinklefree.models.records import IGNORE, Batch
from wrinklefree.utils.errors import ConfigError, DataError

_FIXED_ORDER_SEED = 0
"""Order in which `max_examples` counts: the same for every run, so that runs differ by their seed only."""


class FinetuneStream:
    """Packed examples of a task, epoch after epoch, with rows of text mixed in."""

    def __init__(
        self, examples: Sequence[Piece], *, replay: TextStream | None, replay_share: float, batch_size: int, length: int,
        packing: PackingConfig, pad_token_id: int, seed: int, rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        self._examples = list(examples)
        self._replay, self._replay_share = replay, replay_share
        self._batch_size, self._length, self._pad_token_id = batch_size, length, pad_token_id
        self._packing, self._seed = packing, seed
        self._rank, self._world_size = rank, world_size
        self._rows_drawn = 0
        """Rows that all processes together have drawn, replayed ones included."""
        self._epoch, self._index = 0, 0
        """The next row of examples, for the first process; the others take those behind it."""
        self._rows: dict[int, list[Row]] = {}
        self._rows_per_epoch = len(self._rows_of(0))
        self._example_rows = self._padding = 0
        """Rows of examples that all processes have drawn, and the padding in them."""

    @property
    def tokens_per_batch(self) -> int:
        """See `BatchStream`."""
        return self._batch_size * self._length

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a process until every example was drawn once, replayed rows included (it ends inside a batch)."""
        rows = self._rows_per_epoch / (1 - self._replay_share)
        return max(1, -int(-rows // (self._batch_size * self._world_size)))

    @property
    def padding_share(self) -> float:
        """See `BatchStream`; of the examples of all processes, and this process's text."""
        positions, padding = self._example_rows * self._length, float(self._padding)
        if self._replay is not None:
            replayed = (self._rows_drawn - self._example_rows) * self._length
            positions, padding = positions + replayed, padding + self._replay.padding_share * replayed
        return padding / max(1, positions)

    @property
    def epoch(self) -> int:
        """Passes over the examples that were begun before the next row."""
        return self._epoch

    def set_weights(self, weights: Sequence[float]) -> None:
        """Mix the sources of the replayed text by other weights.

        Raises:
            ConfigError: no text is replayed.
        """
        if self._replay is None:
            raise ConfigError("a task without data.replay has no sources to weigh")
        self._replay.set_weights(weights)

    def next_batch(self) -> Batch:
        """See `BatchStream`."""
        return collate([self._next_row() for _ in range(self._batch_size)], self._length, self._pad_token_id)

    def state_dict(self) -> dict[str, Any]:
        """See `BatchStream`."""
        return {
            "rows_drawn": self._rows_drawn,
            "epoch": self._epoch,
            "index": self._index,
            "example_rows": self._example_rows,
            "padding": self._padding,
            "replay": None if self._replay is None else self._replay.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `BatchStream`."""
        self._rows_drawn, self._epoch, self._index = state["rows_drawn"], state["epoch"], state["index"]
        self._example_rows, self._padding = state["example_rows"], state["padding"]
        if self._replay is not None:
            self._replay.load_state_dict(state["replay"])

    def close(self) -> None:
        """End worker processes."""
        if self._replay is not None:
            self._replay.close()

    def _next_row(self) -> Row:
        # Evenly spread: after n rows of a process, floor(n * share) of them were replayed; all processes replay at once.
        drawn = self._rows_drawn // self._world_size
        self._rows_drawn += self._world_size
        if self._replay is not None and int((drawn + 1) * self._replay_share) > int(drawn * self._replay_share):
            return self._replay.next_row()
        rows = [self._next_example_row() for _ in range(self._world_size)]
        self._example_rows += self._world_size
        self._padding += sum(self._length - len(row) for row in rows)
        return rows[self._rank]

    def _next_example_row(self) -> Row:
        while self._index >= len(self._rows_of(self._epoch)):
            self._epoch, self._index = self._epoch + 1, 0
        self._index += 1
        return self._rows_of(self._epoch)[self._index - 1]

    def _rows_of(self, epoch: int) -> list[Row]:
        if epoch not in self._rows:
            generator = np.random.default_rng([self._seed, epoch])
            examples = [self._examples[index] for index in generator.permutation(len(self._examples))]
            if self._packing.enabled and self._packing.packer == "best_fit":
                rows = best_fit(examples, self._length)
                rows = [rows[index] for index in generator.permutation(len(rows))]
            else:
                rows = pack_whole(examples, self._length, enabled=self._packing.enabled)
            self._rows = {epoch: rows}
        return self._rows[epoch]


def finetune_stream(
    config: FinetuneData, tokenizer: Tokenizer, *, batch_size: int, max_seq_length: int, packing: PackingConfig,
    seed: int, rank: int = 0, world_size: int = 1,
) -> FinetuneStream:  # fmt: skip
    """An endless stream over a task's training examples.

    Raises:
        DataError: the task has no training examples, or fewer than ranks.
        ConfigError: rows too short for the task's label words.
        NetworkError: a task that needs a network that is not there.
    """
    task = get_task(config.task)
    examples = task_examples(config, "train")
    if len(examples) < world_size:
        raise DataError(f"task {task.name} has {len(examples)} training examples for {world_size} processes; use fewer")
    replay = None
    if config.replay is not None:
        replay = pretrain_stream(
            config.replay, tokenizer, batch_size=batch_size, max_seq_length=max_seq_length, packing=packing, seed=seed,
            rank=rank, world_size=world_size,
        )  # fmt: skip
    return FinetuneStream(
        encode_examples(task, examples, tokenizer, max_seq_length),
        replay=replay,
        replay_share=config.replay_share,
        batch_size=batch_size,
        length=max_seq_length,
        packing=packing,
        pad_token_id=tokenizer.pad_token_id,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


def task_examples(config: FinetuneData, split: Split) -> list[Example]:
    """Examples of a split; `max_examples` limits the training split, after a shuffle that is the same for every seed.

    Raises:
        DataError: the split is empty.
    """
    examples = get_task(config.task).load(split)
    if not examples:
        raise DataError(f"task {config.task} has no examples in its {split} split")
    if split != "train" or config.max_examples is None:
        return examples
    order = np.random.default_rng(_FIXED_ORDER_SEED).permutation(len(examples))
    return [examples[index] for index in order[: config.max_examples]]


def spread(examples: Sequence[Example], most: int | None) -> Sequence[Example]:
    """At most so many examples, evenly spread over all of them: what a task lists is often sorted by class."""
    if most is None or len(examples) <= most:
        return examples
    return [examples[index * len(examples) // most] for index in range(most)]


def encode_examples(task: Task, examples: Sequence[Example], tokenizer: Tokenizer, max_seq_length: int) -> list[Piece]:
    """Start token, prompt and response of each example. The response is the target; free text ends with an end."""
    parts = [text for e in examples for text in (e.before, e.passage, e.after, e.response)]
    encoded = tokenizer.encode_batch(parts)
    longest = {
        choices: max(len(_response(task, ids, tokenizer, max_seq_length)) for ids in tokenizer.encode_batch(choices))
        for choices in {example.choices for example in examples if example.choices}
    }
    pieces: list[Piece] = []
    for number, example in enumerate(examples):
        before, passage, after, ids = encoded[4 * number : 4 * number + 4]
        response = _response(task, ids, tokenizer, max_seq_length)
        room = max_seq_length - longest.get(example.choices, len(response))
        prompt = _prompt(before, passage, after, tokenizer, room)
        tokens = np.asarray([*prompt, *response], dtype=np.int32)
        labels = np.full_like(tokens, IGNORE)
        labels[len(prompt) - 1 : -1] = response
        pieces.append(Piece(tokens, labels))
    return pieces


def encode_prompt(task: Task, example: Example, tokenizer: Tokenizer, max_prompt_length: int) -> list[int]:
    """Start token and prompt, its passage cut to fit: what a response is generated from.

    Raises:
        ConfigError: no room for a prompt.
    """
    if max_prompt_length < 2:
        raise ConfigError(
            f"task {task.name}: {max_prompt_length} tokens are no room for a prompt; raise max_seq_length"
        )
    before, passage, after = tokenizer.encode_batch([example.before, example.passage, example.after])
    return _prompt(before, passage, after, tokenizer, max_prompt_length)


def encode_choices(
    task: Task, example: Example, tokenizer: Tokenizer, max_seq_length: int
) -> tuple[list[int], list[list[int]]]:
    """The prompt as training encodes it, and the token ids of each choice. Room is left for the longest choice."""
    choices = [_response(task, ids, tokenizer, max_seq_length) for ids in tokenizer.encode_batch(example.choices)]
    return encode_prompt(task, example, tokenizer, max_seq_length - max(map(len, choices))), choices


def _response(task: Task, ids: list[int], tokenizer: Tokenizer, max_seq_length: int) -> list[int]:
    """Target tokens: a label word whole, free text with its end token and at most half of the row."""
    if task.kind == "classification":
        if len(ids) + 2 > max_seq_length:
            raise ConfigError(
                f"a label word of task {task.name} has {len(ids)} tokens and training.max_seq_length "
                f"is {max_seq_length}; raise it"
            )
        return ids
    return [*ids[: max_seq_length // 2 - 1], tokenizer.eos_token_id]


def _prompt(before: list[int], passage: list[int], after: list[int], tokenizer: Tokenizer, room: int) -> list[int]:
    """Parts are encoded apart, so that what is cut from the passage changes no token around it."""
    start = [start_token_id(tokenizer)]
    space = room - len(start) - len(before) - len(after)
    if space >= 0:
        return [*start, *before, *passage[:space], *after]
    # Even the fixed parts are too long: their end holds the cue, so it stays.
    return [*start, *[*before, *after][-(room - 1) :]]
