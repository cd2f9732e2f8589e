"""Tasks: labelled examples as a prompt and a response, with fixed, disjoint splits.

A prompt has three parts so that a long one is shortened in its passage and never loses its instruction or its label.
Texts are joined, never formatted, so braces and percent signs in them mean nothing. A classification's response is one
of its label words; accuracy compares the words' probabilities, and training makes the right one the target.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from wrinklefree.data import facts, lookup, packaged_tasks
from wrinklefree.data.file_task import PREFIX, file_task
from wrinklefree.data.hub import TASK_ALTERNATIVES, hub_revision, load_hub_split
from wrinklefree.data.splits import Split, split_by_hash
from wrinklefree.data.task import Example, Metric, Task
from wrinklefree.utils import assets
from wrinklefree.utils.errors import ConfigError

HUB_VALIDATION_SHARE = 0.02
"""Share of a hub task's training rows that validates: GLUE keeps its test labels, so its validation set tests."""


def get_task(name: str) -> Task:
    """The task of that name; `file:PATH` is one of the user's own (see `file_task`).

    Raises:
        ConfigError: there is none.
        DataError: a file that is no task.
    """
    if name.startswith(PREFIX):
        return file_task(name)
    if name not in TASKS:
        known = ", ".join(sorted(TASKS))
        raise ConfigError(f"there is no task {name!r} for data.task; choose one of {known}, or file:PATH for your own")
    return TASKS[name]


def _choice(before: str, passage: str, after: str, label: int, words: tuple[str, ...]) -> Example:
    choices = tuple(f" {word}" for word in words)
    return Example(before, passage, after, choices[label], label, choices)


def _recall(split: Split) -> list[Example]:
    questions = facts.training_statements() if split == "train" else facts.questions(split)
    return [_choice("", "", q.prompt, q.answer, q.attribute.values) for q in questions]


_SENTIMENT = ("negative", "positive")


def _movie_reviews(split: Split) -> list[Example]:
    return [
        _choice("Review: ", review.text, "\nSentiment:", int(review.is_positive), _SENTIMENT)
        for review in packaged_tasks.movie_reviews(split)
    ]


def _news_topic(split: Split) -> list[Example]:
    return [
        _choice("", f"{article.headline}\n{article.body}", "\nTopic:", article.topic, packaged_tasks.BBC_TOPICS)
        for article in packaged_tasks.bbc_articles(split)
    ]


_YES_NO = ("no", "yes")


def _boolq(split: Split) -> list[Example]:
    return [
        _choice("", item.passage, f"\nQuestion: {item.question}?\nAnswer:", int(item.answer), _YES_NO)
        for item in packaged_tasks.passage_questions(split)
    ]


def _summary(document: str, summary: str) -> Example:
    return Example("Article: ", document, "\nSummary:", f" {summary.strip()}")


def _xsum(split: Split) -> list[Example]:
    return [_summary(item.document, item.summary) for item in packaged_tasks.xsum_articles(split)]


def _in_context_lookup(split: Split) -> list[Example]:
    return [_choice("", item.context, item.cue, item.answer, lookup.COLOURS) for item in lookup.lookups(split)]


def _packaged_task(
    name: str, load: Callable[[Split], list[Example]], identity: str, words: tuple[str, ...] = ()
) -> Task:
    kind: Literal["classification", "generation"] = "classification" if words else "generation"
    return Task(name, kind, "accuracy" if words else "rouge_l", words, load, lambda: f"{name} {identity} v1")


@dataclass(frozen=True)
class HubTask:
    """Where a hub dataset's task lies and how a row becomes an example."""

    path: str
    subset: str
    example: Callable[[Mapping[str, Any]], Example]
    words: tuple[str, ...] = ()
    validation_split: str | None = None
    """None: a share of the training rows by hash."""
    test_split: str = "validation"

    def load(self, split: Split) -> list[Example]:
        """Examples of a split."""
        if split == "test":
            return self._rows(self.test_split)
        if self.validation_split is not None:
            return self._rows("train" if split == "train" else self.validation_split)
        return [example for example in self._rows("train") if _hub_split(example) == split]

    def identity(self) -> str:
        """Path and commit of the data, and the version of our templates."""
        return f"{self.path}/{self.subset}@{hub_revision(self.path, None, alternatives=TASK_ALTERNATIVES)} v1"

    def _rows(self, split: str) -> list[Example]:
        return [self.example(row) for row in load_hub_split(self.path, self.subset, split)]


def _hub_split(example: Example) -> Split:
    return split_by_hash(example.prompt, validation=HUB_VALIDATION_SHARE, test=0.0)


def _glue(
    subset: str, words: tuple[str, ...], parts: Callable[[Mapping[str, Any]], tuple[str, str, str]],
    test_split: str = "validation",
) -> HubTask:  # fmt: skip
    """A GLUE task; `words` are in the order of the data set's label numbers."""

    def example(row: Mapping[str, Any]) -> Example:
        return _choice(*parts(row), row["label"], words)

    return HubTask("nyu-mll/glue", subset, example, words, test_split=test_split)


def _pair(
    first: str, second: str, first_title: str, second_title: str, cue: str
) -> Callable[[Mapping[str, Any]], tuple[str, str, str]]:
    return lambda row: (f"{first_title}: ", row[first], f"\n{second_title}: {row[second]}\n{cue}:")


_SAME = ("no", "yes")
_HUB_TASKS: Mapping[str, HubTask] = MappingProxyType(
    {
        "sst2": _glue("sst2", _SENTIMENT, lambda row: ("Review: ", row["sentence"], "\nSentiment:")),
        "cola": _glue("cola", _SAME, lambda row: ("Sentence: ", row["sentence"], "\nAcceptable:")),
        "mnli": _glue(
            "mnli",
            ("yes", "maybe", "no"),
            _pair("premise", "hypothesis", "Premise", "Hypothesis", "Entailed"),
            "validation_matched",
        ),
        "qnli": _glue("qnli", ("yes", "no"), _pair("sentence", "question", "Passage", "Question", "Answered")),
        "rte": _glue("rte", ("yes", "no"), _pair("sentence1", "sentence2", "Premise", "Hypothesis", "Entailed")),
        "wnli": _glue("wnli", _SAME, _pair("sentence1", "sentence2", "Premise", "Hypothesis", "Entailed")),
        "mrpc": _glue("mrpc", _SAME, _pair("sentence1", "sentence2", "First", "Second", "Same meaning")),
        "qqp": _glue("qqp", _SAME, _pair("question1", "question2", "First", "Second", "Same meaning")),
        "cnn_dailymail": HubTask(
            "abisee/cnn_dailymail",
            "3.0.0",
            lambda row: _summary(row["article"], row["highlights"]),
            validation_split="validation",
            test_split="test",
        ),
    }
)


def _hub_task(name: str, source: HubTask) -> Task:
    kind: Literal["classification", "generation"] = "classification" if source.words else "generation"
    metric: Metric = "accuracy" if source.words else "rouge_l"
    return Task(name, kind, metric, source.words, source.load, source.identity)


_RECALL_WORDS = tuple(value for attribute in facts.ATTRIBUTES for value in attribute.values)

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "recall": _packaged_task("recall", _recall, facts.facts_fingerprint(), _RECALL_WORDS),
        "in_context_lookup": _packaged_task(
            "in_context_lookup", _in_context_lookup, f"version {lookup.GENERATOR_VERSION}", lookup.COLOURS
        ),
        "movie_reviews": _packaged_task("movie_reviews", _movie_reviews, assets.identity("movie_reviews"), _SENTIMENT),
        "news_topic": _packaged_task("news_topic", _news_topic, assets.identity("bbc_news"), packaged_tasks.BBC_TOPICS),
        "boolq": _packaged_task("boolq", _boolq, assets.identity("boolq"), _YES_NO),
        "xsum": _packaged_task("xsum", _xsum, assets.identity("xsum")),
        **{name: _hub_task(name, source) for name, source in _HUB_TASKS.items()},
    }
)
"""Task name (`data.task`) -> task."""
