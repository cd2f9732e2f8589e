"""Fine-tuning rows: responses are targets, prompts are not, examples are whole, and a resume changes nothing."""

import json
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
import torch

from wrinklefree.data import finetune_dataset, tasks
from wrinklefree.data.config import FinetuneData, LocalSource, PackingConfig, PretrainData
from wrinklefree.data.finetune_dataset import (
    FinetuneStream,
    encode_choices,
    encode_examples,
    encode_prompt,
    finetune_stream,
    spread,
    task_examples,
)
from wrinklefree.data.streams import merge_states
from wrinklefree.data.tasks import Example, Task
from wrinklefree.data.tokens import Tokenizer
from wrinklefree.models.records import IGNORE
from wrinklefree.utils.errors import ConfigError, DataError

CHOICES = (" no", " yes")
TASK = Task("here", "classification", "accuracy", ("no", "yes"), lambda split: [], lambda: "v1")
FREE = Task("free", "generation", "rouge_l", (), lambda split: [], lambda: "v1")


def example(passage: str, label: int, question: str = "\nQ: {x} %s?\nA:") -> Example:
    return Example("P: ", passage, question, CHOICES[label], label, CHOICES)


def text(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode()


def open_stream(
    tokenizer: Tokenizer, data: FinetuneData, *, length: int = 96, enabled: bool = True, seed: int = 0, **ranks: int
) -> FinetuneStream:
    packing = PackingConfig(enabled=enabled)
    return finetune_stream(data, tokenizer, batch_size=4, max_seq_length=length, packing=packing, seed=seed, **ranks)


def recall(**changes: object) -> FinetuneData:
    return FinetuneData.model_validate({"name": "recall", "task": "recall", **changes})


def replayed(tmp_path: Path, share: float) -> FinetuneData:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"REPLAYED {number} " * 9, encoding="utf-8")
    replay = PretrainData(name="text", sources=(LocalSource(path=str(tmp_path)),))
    return recall(replay=replay, replay_share=share)


def test_the_label_word_is_the_target_and_nothing_else_is(tokenizer: Tokenizer) -> None:
    piece = encode_examples(TASK, [example("some {braces} {0} {} passage", 1)], tokenizer, 200)[0]
    assert piece.tokens[0] == tokenizer.eos_token_id
    assert text(piece.tokens.tolist()) == "P: some {braces} {0} {} passage\nQ: {x} %s?\nA: yes"
    targets = piece.labels[piece.labels != IGNORE].tolist()
    assert text(targets) == " yes"
    # Each target stands one position before the token itself, and the last token predicts nothing.
    assert piece.labels[-1] == IGNORE
    assert piece.labels[-5:-1].tolist() == piece.tokens[-4:].tolist()


def test_free_text_ends_with_a_targeted_end_token(tokenizer: Tokenizer) -> None:
    piece = encode_examples(FREE, [Example("A: ", "long", "\nS:", " short")], tokenizer, 64)[0]
    assert piece.labels[piece.labels != IGNORE].tolist() == [*b" short", tokenizer.eos_token_id]


@pytest.mark.parametrize("length", [24, 40, 90])
def test_a_long_passage_is_cut_and_the_cue_and_label_stay(tokenizer: Tokenizer, length: int) -> None:
    long = example("abcdefghij" * 30, 1)
    piece = encode_examples(TASK, [long], tokenizer, length)[0]
    assert len(piece) == length
    assert text(piece.tokens.tolist()).endswith("\nQ: {x} %s?\nA: yes")
    assert text(piece.labels[piece.labels != IGNORE].tolist()) == " yes"


def test_even_a_prompt_without_room_keeps_its_end_and_its_label(tokenizer: Tokenizer) -> None:
    piece = encode_examples(TASK, [example("abc", 0)], tokenizer, 10)[0]
    assert text(piece.tokens.tolist()) == "s?\nA: no"
    assert len(piece) <= 10


def test_scoring_sees_the_prompt_that_training_saw(tokenizer: Tokenizer) -> None:
    for label in (0, 1):
        for passage in ("short", "abcdefghij" * 30):
            one = example(passage, label)
            prompt, choices = encode_choices(TASK, one, tokenizer, 60)
            assert choices == [list(b" no"), list(b" yes")]
            trained = encode_examples(TASK, [one], tokenizer, 60)[0].tokens.tolist()
            assert trained == [*prompt, *choices[label]]
            # The wrong label must not change what the model reads.
            assert prompt == encode_choices(TASK, example(passage, 1 - label), tokenizer, 60)[0]


def test_no_room_for_a_label_or_a_prompt(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"a label word of task here has 4 tokens and training\.max_seq_length is 5"):
        encode_examples(TASK, [example("abc", 1)], tokenizer, 5)
    with pytest.raises(ConfigError, match="task free: 1 tokens are no room for a prompt"):
        encode_prompt(FREE, Example("", "x", "", " y"), tokenizer, 1)


def test_a_long_summary_leaves_half_of_the_row_to_the_article(tokenizer: Tokenizer) -> None:
    piece = encode_examples(FREE, [Example("A: ", "x" * 100, "\nS:", "y" * 100)], tokenizer, 40)[0]
    assert (piece.labels != IGNORE).sum() == 20
    assert piece.labels[-2] == tokenizer.eos_token_id
    assert len(piece) == 40


@pytest.mark.parametrize("enabled", [True, False])
def test_an_epoch_draws_every_example_once(tokenizer: Tokenizer, enabled: bool) -> None:
    data = recall(max_examples=50)
    stream = open_stream(tokenizer, data, enabled=enabled)
    assert stream.batches_per_epoch is not None
    seen: Counter[str] = Counter()
    while stream.epoch == 0 and len(seen) < 50:
        batch = stream.next_batch()
        for row, documents in zip(batch.input_ids, batch.document_ids, strict=True):
            seen.update(text(row[documents == n].tolist()) for n in range(1, int(documents.max()) + 1))
    examples = task_examples(data, "train")
    assert set(seen) == {e.prompt + e.response for e in examples}


def test_batches_per_epoch_reach_every_example(tokenizer: Tokenizer) -> None:
    stream = open_stream(tokenizer, recall())
    for _ in range(stream.batches_per_epoch):
        stream.next_batch()
    targets_left = stream.epoch == 0 and stream.state_dict()["index"] < len(stream._rows)
    assert not targets_left
    assert stream.epoch <= 1


def test_the_last_max_examples_are_a_prefix_of_more(tokenizer: Tokenizer) -> None:
    few, more = task_examples(recall(max_examples=10), "train"), task_examples(recall(max_examples=30), "train")
    assert few == more[:10]
    assert len({e.choices for e in more}) == 3
    assert len(task_examples(recall(max_examples=10), "test")) == 504


@pytest.mark.parametrize("stop", [0, 1, 5, 23, 60])
def test_resume_is_exact(tokenizer: Tokenizer, tmp_path: Path, stop: int) -> None:
    data = replayed(tmp_path, 0.4)
    data = data.model_copy(update={"max_examples": 60})
    whole = open_stream(tokenizer, data, seed=4)
    for _ in range(stop):
        whole.next_batch()
    resumed = open_stream(tokenizer, data, seed=4)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(25):
        left, right = whole.next_batch(), resumed.next_batch()
        assert torch.equal(left.input_ids, right.input_ids)
        assert torch.equal(left.labels, right.labels)
        assert torch.equal(left.document_ids, right.document_ids)
    assert whole.state_dict() == resumed.state_dict()


def test_replayed_rows_have_exactly_their_share(tokenizer: Tokenizer, tmp_path: Path) -> None:
    stream = open_stream(tokenizer, replayed(tmp_path, 0.25))
    rows = torch.cat([stream.next_batch().input_ids for _ in range(25)])
    assert sum("REPLAYED" in text(row.tolist()) or "EPLAYED" in text(row.tolist()) for row in rows) == 25
    plain = open_stream(tokenizer, recall())
    assert stream.batches_per_epoch == pytest.approx(plain.batches_per_epoch / 0.75, abs=2)


def test_seeds_differ_in_order_only(tokenizer: Tokenizer) -> None:
    one, two = (open_stream(tokenizer, recall(max_examples=40), enabled=False, seed=seed) for seed in (0, 1))
    rows = [torch.cat([s.next_batch().input_ids for _ in range(10)]).tolist() for s in (one, two)]
    assert rows[0] != rows[1]
    assert sorted(rows[0]) == sorted(rows[1])


def test_ranks_draw_disjoint_examples(tokenizer: Tokenizer) -> None:
    data = recall(max_examples=48)
    rows = [
        row
        for rank in (0, 1)
        for stream in [open_stream(tokenizer, data, enabled=False, rank=rank, world_size=2)]
        for row in torch.cat([stream.next_batch().input_ids for _ in range(6)]).tolist()
    ]
    assert len({tuple(row) for row in rows}) == 48


def test_an_empty_split_and_too_few_examples(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_dataset, "get_task", lambda name: TASK)
    with pytest.raises(DataError, match="task recall has no examples in its train split"):
        task_examples(recall(), "train")
    monkeypatch.setattr(finetune_dataset, "get_task", tasks.get_task)
    with pytest.raises(DataError, match="task recall has 2 training examples for 3 processes"):
        open_stream(tokenizer, recall(max_examples=2), rank=0, world_size=3)


def rows_of_job(streams: list[FinetuneStream], rows: int) -> list[list[int]]:
    """The next rows of a job, in its order."""
    drawn = [streams[number % len(streams)]._next_row() for number in range(rows)]
    return [[token for piece in row.pieces for token in piece.tokens.tolist()] for row in drawn]


@pytest.mark.parametrize("packer", ["concat", "best_fit"])
def test_a_task_goes_on_with_any_number_of_processes(
    tokenizer: Tokenizer, packer: Literal["concat", "best_fit"]
) -> None:
    def job(world_size: int) -> list[FinetuneStream]:
        return [
            finetune_stream(
                recall(max_examples=60), tokenizer, batch_size=2, max_seq_length=96,
                packing=PackingConfig(packer=packer), seed=4, rank=rank, world_size=world_size,
            )
            for rank in range(world_size)
        ]  # fmt: skip

    expected = rows_of_job(job(1), 120)
    streams, found = job(3), []
    for world_size, rows in ((2, 33), (5, 20), (1, 35), (4, 20)):
        found += rows_of_job(streams, rows)
        states = [json.loads(json.dumps(stream.state_dict())) for stream in streams]
        streams = job(world_size)
        for stream in streams:
            stream.load_state_dict(merge_states(states))
    found += rows_of_job(streams, 120 - len(found))
    assert found == expected
    assert len({stream.batches_per_epoch for stream in streams}) == 1


def test_best_fit_wastes_no_more_than_first_fit(tokenizer: Tokenizer) -> None:
    shares = []
    for packing in (PackingConfig(), PackingConfig(packer="best_fit")):
        stream = finetune_stream(
            recall(), tokenizer, batch_size=4, max_seq_length=96, packing=packing, seed=0
        )  # fmt: skip
        for _ in range(stream.batches_per_epoch):
            stream.next_batch()
        shares.append(stream.padding_share)
    assert 0 < shares[1] <= shares[0]


def test_some_examples_of_a_sorted_file_are_of_all_its_classes() -> None:
    responses = "a" * 300 + "b" * 150 + "c" * 51
    examples = [Example("", str(number), "", response) for number, response in enumerate(responses)]
    assert spread(examples, None) == examples
    assert spread(examples, 600) == examples
    assert spread(examples, 0) == []
    assert [int(example.passage) for example in spread(examples, 5)] == [0, 100, 200, 300, 400]
    assert Counter(example.response for example in spread(examples, 60)) == {"a": 36, "b": 18, "c": 6}
