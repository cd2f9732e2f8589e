"""Tasks: disjoint splits, label words in their place, texts that no template can harm."""

from collections.abc import Mapping
from typing import Any

import pytest

from wrinklefree.data import tasks
from wrinklefree.data.tasks import TASKS, Example, get_task
from wrinklefree.utils.errors import ConfigError

GENERATED = ("recall", "in_context_lookup")
SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize("name", GENERATED)
def test_generated_splits_are_disjoint_and_answers_are_choices(name: str) -> None:
    prompts: set[str] = set()
    total = 0
    for split in SPLITS:
        examples = get_task(name).load(split)
        assert all(e.label is not None and e.choices[e.label] == e.response for e in examples)
        prompts.update(e.prompt for e in examples)
        total += len(examples)
    assert len(prompts) == total


def test_a_lookup_answers_with_the_colour_in_its_context() -> None:
    for one in get_task("in_context_lookup").load("test"):
        assert f"{one.after.strip()}{one.response}." in one.passage


def test_an_unknown_task_lists_the_known() -> None:
    with pytest.raises(
        ConfigError, match=r"there is no task 'sst-2' for data\.task; choose one of boolq, cnn_dailymail, cola"
    ):
        get_task("sst-2")


def test_every_name_in_the_table_is_the_tasks_own() -> None:
    assert {name: task.name for name, task in TASKS.items()} == {name: name for name in TASKS}
    assert all((task.kind == "classification") == bool(task.label_words) for task in TASKS.values())
    assert all(task.metric == ("accuracy" if task.label_words else "rouge_l") for task in TASKS.values())


GLUE_ROWS: Mapping[str, dict[str, Any]] = {
    "sst2": {"sentence": "{dull} 100%"},
    "cola": {"sentence": "{dull} 100%"},
    "mnli": {"premise": "{dull} 100%", "hypothesis": "h"},
    "qnli": {"sentence": "{dull} 100%", "question": "q"},
    "rte": {"sentence1": "{dull} 100%", "sentence2": "s"},
    "wnli": {"sentence1": "{dull} 100%", "sentence2": "s"},
    "mrpc": {"sentence1": "{dull} 100%", "sentence2": "s"},
    "qqp": {"question1": "{dull} 100%", "question2": "s"},
}
# Meaning of label 0 and 1 in the data sets' own documentation.
FIRST_WORDS = {
    "sst2": (" negative", " positive"),
    "cola": (" no", " yes"),
    "mnli": (" yes", " maybe"),
    "qnli": (" yes", " no"),
    "rte": (" yes", " no"),
    "wnli": (" no", " yes"),
    "mrpc": (" no", " yes"),
    "qqp": (" no", " yes"),
}


@pytest.mark.parametrize("name", sorted(GLUE_ROWS))
def test_glue_rows_become_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def rows(path: str, subset: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, subset, split))
        return [GLUE_ROWS[name] | {"label": label} for label in (0, 1)]

    monkeypatch.setattr(tasks, "load_hub_split", rows)
    examples = get_task(name).load("test")
    assert asked == [("nyu-mll/glue", name, "validation_matched" if name == "mnli" else "validation")]
    assert tuple(e.response for e in examples) == FIRST_WORDS[name]
    assert all("{dull} 100%" in e.prompt and e.prompt.endswith(":") for e in examples)


def test_hub_training_rows_are_split_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"sentence": f"sentence {n}", "label": n % 2} for n in range(3000)]
    monkeypatch.setattr(tasks, "load_hub_split", lambda path, subset, split: rows if split == "train" else [])
    train, validation = (get_task("sst2").load(split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 3000
    assert 30 < len(validation) < 90
    assert not {e.prompt for e in train} & {e.prompt for e in validation}


def test_summaries_keep_the_hubs_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tasks,
        "load_hub_split",
        lambda path, subset, split: [{"article": f"{split} {{text}}", "highlights": " Short. "}],
    )
    task = get_task("cnn_dailymail")
    assert [task.load(split) for split in SPLITS] == [
        [Example("Article: ", f"{split} {{text}}", "\nSummary:", " Short.")] for split in SPLITS
    ]
    assert task.kind == "generation"


def test_label_words_of_a_task_are_distinct() -> None:
    for task in TASKS.values():
        assert len(set(task.label_words)) == len(task.label_words)
