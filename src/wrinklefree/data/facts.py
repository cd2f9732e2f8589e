"""Facts that no corpus holds: people who do not exist, each with a job, a favourite colour and an animal.

A model can only know them by having read their biographies, so recall after fine-tuning on *other* people measures what
the weights kept. Everything is drawn from one fixed seed with a generator whose sequence Python guarantees
(`random.Random.random`), so the facts are the same in every version and on every machine.

People are split once: statements about the training people are what a model is fine-tuned on, and the others are asked
about in validation and test. Biographies of all of them are text for pretraining.
"""

import hashlib
import random
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

GENERATOR_VERSION = 1
"""Part of data fingerprints: raise it whenever a name, value, template or split changes."""

Item = TypeVar("Item")
Split = Literal["train", "validation", "test"]

PEOPLE_BY_SPLIT: dict[Split, int] = {"train": 132, "validation": 100, "test": 168}

_FIRST_NAMES = (
    "Arlo", "Bela", "Cora", "Dario", "Edda", "Falk", "Gina", "Hugo", "Ivo", "Jana",
    "Kalle", "Lena", "Milo", "Nora", "Otis", "Petra", "Rosa", "Sven", "Tilda", "Viktor",
)  # fmt: skip
_SURNAME_HEADS = (
    "Bar", "Cor", "Dal", "Fen", "Gar", "Hal", "Jor", "Kel", "Lor", "Mar",
    "Nor", "Pel", "Ral", "Sor", "Tal", "Ven", "Wal", "Yar", "Zel", "Ost",
)  # fmt: skip
_SURNAME_TAILS = (
    "bek", "dan", "der", "dick", "field", "gan", "gard", "lin", "low", "man",
    "mer", "min", "nick", "rick", "ser", "son", "stead", "ton", "vin", "wood",
)  # fmt: skip


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: its values, and statements whose last word is the value."""

    name: str
    values: tuple[str, ...]
    templates: tuple[str, ...]
    """`NAME` stands for the person; the value and a full stop follow."""


ATTRIBUTES = (
    Attribute(
        "job",
        ("baker", "pilot", "nurse", "farmer", "painter", "judge", "singer", "driver"),
        ("NAME works as a", "The job of NAME is that of a", "For a living, NAME is a", "NAME has long been a"),
    ),
    Attribute(
        "colour",
        ("red", "blue", "green", "black", "white", "brown", "yellow", "purple"),
        (
            "The favourite colour of NAME is",
            "The house of NAME is painted",
            "NAME always wears a coat that is",
            "The colour that NAME likes best is",
        ),
    ),
    Attribute(
        "animal",
        ("cat", "dog", "horse", "bird", "fish", "sheep", "goat", "rabbit"),
        ("At home NAME keeps a", "NAME is the owner of a", "The animal that NAME loves is a", "NAME lives with a"),
    ),
)


@dataclass(frozen=True)
class Person:
    """A name, the split it belongs to, and the index of its value for each attribute."""

    name: str
    split: Split
    values: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A statement without its last word, and which of the attribute's values completes it."""

    prompt: str
    attribute: Attribute
    answer: int


@cache
def people() -> tuple[Person, ...]:
    """Everyone, in a fixed order. Surnames are unique, and values are balanced over people."""
    generator = random.Random(20_251_013)
    surnames = [head + tail for head in _SURNAME_HEADS for tail in _SURNAME_TAILS]
    surnames = _shuffled(surnames, generator)
    splits: list[Split] = [split for split, count in PEOPLE_BY_SPLIT.items() for _ in range(count)]
    columns = [_balanced(len(attribute.values), PEOPLE_BY_SPLIT, generator) for attribute in ATTRIBUTES]
    return tuple(
        Person(
            name=f"{_FIRST_NAMES[int(generator.random() * len(_FIRST_NAMES))]} {surnames[index]}",
            split=split,
            values=tuple(column[index] for column in columns),
        )
        for index, split in enumerate(splits)
    )


def biographies(seed: int, epoch: int) -> list[str]:
    """One biography a person: its statements in a drawn order and wording, different in every epoch."""
    generator = random.Random(f"{seed}/{epoch}")
    return [_biography(person, generator) for person in people()]


def questions(split: Split) -> list[Question]:
    """One question a person and attribute; over people, wordings take turns."""
    found: list[Question] = []
    for index, person in enumerate(person for person in people() if person.split == split):
        for column, attribute in enumerate(ATTRIBUTES):
            template = attribute.templates[(index + column) % len(attribute.templates)]
            found.append(Question(_about(person, template), attribute, person.values[column]))
    return found


def training_statements() -> list[Question]:
    """Every wording of every fact about the training people."""
    return [
        Question(_about(person, template), attribute, person.values[column])
        for person in people()
        if person.split == "train"
        for column, attribute in enumerate(ATTRIBUTES)
        for template in attribute.templates
    ]


@cache
def facts_fingerprint() -> str:
    """Hash of every person, value, wording and split."""
    digest = hashlib.sha256(f"{GENERATOR_VERSION}{ATTRIBUTES}".encode())
    for person in people():
        digest.update(f"{person}\n".encode())
    return digest.hexdigest()


def _about(person: Person, template: str) -> str:
    return template.replace("NAME", person.name)


def _biography(person: Person, generator: random.Random) -> str:
    sentences: list[str] = []
    for column in _shuffled(list(range(len(ATTRIBUTES))), generator):
        attribute = ATTRIBUTES[column]
        template = attribute.templates[int(generator.random() * len(attribute.templates))]
        sentences.append(f"{_about(person, template)} {attribute.values[person.values[column]]}.")
    return " ".join(sentences)


def _balanced(choices: int, counts: dict[Split, int], generator: random.Random) -> list[int]:
    """Indices below `choices` whose frequencies within each split differ by at most one, in a drawn order."""
    column: list[int] = []
    for count in counts.values():
        column.extend(_shuffled([index % choices for index in range(count)], generator))
    return column


def _shuffled(items: list[Item], generator: random.Random) -> list[Item]:
    """Fisher-Yates on `random()` alone: its sequence is guaranteed between Python versions, `shuffle`'s is not."""
    items = list(items)
    for last in range(len(items) - 1, 0, -1):
        other = int(generator.random() * (last + 1))
        items[last], items[other] = items[other], items[last]
    return items
