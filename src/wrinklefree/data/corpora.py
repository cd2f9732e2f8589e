"""The packaged corpora: how the files of each asset become documents.

Sources that share their texts with a packaged task (`bbc_news`, `xsum_articles`, `movie_reviews_text`) hold only that
task's training split, so that pretraining on them does not show a model the test.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

from wrinklefree.data import packaged_tasks
from wrinklefree.utils import assets
from wrinklefree.utils.errors import ConfigError


def _boolq_passages() -> list[str]:
    lines = assets.fetch("boolq_passages").read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(json.loads(line)["passage"] for line in lines if line.strip()))


def _text_files(name: str) -> list[str]:
    """One document a file. Old e-mail is in any encoding: bytes that are not UTF-8 are read as Latin-1."""
    folder = assets.fetch(name)
    return [_decode(path.read_bytes()) for path in sorted(folder.rglob("*.txt"))]


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _moby_dick() -> list[str]:
    """One document a chapter."""
    book = assets.fetch("moby_dick").read_text(encoding="utf-8")
    return re.split(r"(?m)^(?=CHAPTER \d+\.)", book)


def _factbook() -> list[str]:
    """One document a country: headings and their texts, depth first."""
    folder = assets.fetch("factbook")
    profiles = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.json")))
    return ["\n".join(_factbook_lines(profile, "")) for profile in profiles]


def _factbook_lines(node: Mapping[str, Any], heading: str) -> list[str]:
    lines: list[str] = []
    for key, value in node.items():
        if isinstance(value, dict):
            lines.extend(_factbook_lines(value, key))
        elif key == "text" and value:
            lines.append(f"{heading}: {value}")
    return lines


def _python_docs() -> list[str]:
    """The language reference that ships with the running Python: text on every machine, without a network."""
    return list(import_module("pydoc_data.topics").topics.values())


def _bbc_news() -> list[str]:
    return [f"{article.headline}\n\n{article.body}" for article in packaged_tasks.bbc_articles("train")]


def _xsum_articles() -> list[str]:
    return [article.document for article in packaged_tasks.xsum_articles("train")]


def _movie_reviews() -> list[str]:
    return [review.text for review in packaged_tasks.movie_reviews("train")]


CORPORA: Mapping[str, Callable[[], list[str]]] = MappingProxyType(
    {
        "boolq_passages": _boolq_passages,
        "state_of_the_union": lambda: _text_files("state_of_the_union"),
        "moby_dick": _moby_dick,
        "spam_assassin": lambda: _text_files("spam_assassin"),
        "factbook": _factbook,
        "python_docs": _python_docs,
        "bbc_news": _bbc_news,
        "xsum_articles": _xsum_articles,
        "movie_reviews_text": _movie_reviews,
    }
)
"""Name of a packaged source -> its reader."""

_ASSET_OF: Mapping[str, str] = MappingProxyType({"xsum_articles": "xsum", "movie_reviews_text": "movie_reviews"})


@lru_cache(maxsize=len(CORPORA))
def load_corpus(name: str) -> Sequence[str]:
    """Documents of a packaged corpus, in a fixed order.

    Raises:
        ConfigError: there is no corpus of that name.
        NetworkError: its package is not cached and cannot be downloaded.
    """
    _check(name)
    return tuple(CORPORA[name]())


def corpus_fingerprint(name: str) -> str:
    """Identity of a packaged corpus, known without downloading it."""
    _check(name)
    if name == "python_docs":
        return "python " + ".".join(str(part) for part in sys.version_info[:3])
    return assets.identity(_ASSET_OF.get(name, name))


def _check(name: str) -> None:
    if name not in CORPORA:
        raise ConfigError(f"there is no packaged corpus {name!r}; choose one of {', '.join(sorted(CORPORA))}")
