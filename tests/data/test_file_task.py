"""A task of one's own: read, split, judged, refused by line."""

import json
from pathlib import Path
from typing import Any

import pytest

from wrinklefree.data.tasks import get_task
from wrinklefree.training.task_sizes import task_size
from wrinklefree.utils.errors import ConfigError, DataError


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return f"file:{path}"


def test_choices_make_a_classification(tmp_path: Path) -> None:
    name = write(
        tmp_path / "reviews.jsonl",
        [
            {"prompt": "Review: good\nSentiment:", "response": "positive", "choices": ["negative", "positive"],
             "split": "train"},
            "",
            {"prompt": "Review: bad\n", "response": "negative", "choices": ["negative", "positive"], "split": "test"},
        ],
    )  # fmt: skip
    task = get_task(name)
    assert (task.kind, task.metric, task.label_words) == ("classification", "accuracy", ("negative", "positive"))
    [example] = task.load("train")
    assert (example.prompt, example.response, example.label) == ("Review: good\nSentiment:", " positive", 1)
    assert example.choices == (" negative", " positive")
    # White space at the end of a prompt is the response's space.
    assert task.load("test")[0].response == "negative"
    assert task.load("validation") == []


def test_without_choices_text_is_generated_and_splits_are_disjoint(tmp_path: Path) -> None:
    name = write(tmp_path / "qa.jsonl", [{"prompt": f"Q {n}? A:", "response": f"{n} "} for n in range(500)])
    task = get_task(name)
    assert (task.kind, task.metric, task.label_words) == ("generation", "rouge_l", ())
    prompts = {split: {example.prompt for example in task.load(split)} for split in ("train", "validation", "test")}
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values())) == 500
    assert all(25 < len(prompts[split]) < 80 for split in ("validation", "test"))
    assert task.load("train")[0].response.startswith(" ")
    size = task_size(name, 128)
    assert size.examples == len(prompts["train"])
    assert 2 < size.tokens < 5


def test_the_content_is_the_identity(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}])
    same = write(tmp_path / "b.jsonl", [{"prompt": "a", "response": "b"}])
    before = get_task(first).identity()
    assert before == get_task(same).identity()
    write(tmp_path / "a.jsonl", [{"prompt": "a", "response": "c"}])
    assert get_task(first).identity() != before
    assert get_task(first).load(split_of(first))[0].response == " c"


def split_of(name: str) -> Any:
    task = get_task(name)
    return next(split for split in ("train", "validation", "test") if task.load(split))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], r"t\.jsonl:1: "),
        ([["prompt"]], r"t\.jsonl:1: found list; a line is an object with prompt and response"),
        ([{"prompt": "a"}], r"t\.jsonl:1: response is missing or empty"),
        ([{"prompt": " ", "response": "b"}], "prompt is missing or empty"),
        ([{"prompt": "a", "response": "b"}, {"prompt": "a", "answer": "b"}], r"t\.jsonl:2: unknown key 'answer', known are"),
        ([{"prompt": "a", "response": "b", "split": "dev"}], "split is 'dev', and splits are train, validation, test"),
        ([{"prompt": "a", "response": "b", "choices": ["b"]}], "choices are not a list of two or more texts"),
        ([{"prompt": "a", "response": "b", "choices": ["c", "d"]}], "the response 'b' is none of the choices"),
        (
            [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b", "choices": ["b", "c"]}],
            "1 of 2 lines have choices",
        ),
        ([], "has no examples"),
    ],
)  # fmt: skip
def test_mistakes_name_the_line(rows: list[Any], message: str, tmp_path: Path) -> None:
    name = write(tmp_path / "t.jsonl", rows)
    with pytest.raises(DataError, match=message):
        get_task(name)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.task=file:.*none\.jsonl: .*none\.jsonl does not exist"):
        get_task(f"file:{tmp_path / 'none.jsonl'}")
