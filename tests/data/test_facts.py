"""The generated world is the same everywhere and forever, and its questions can be answered from its biographies."""

from collections import Counter

from wrinklefree.data.facts import (
    ATTRIBUTES,
    PEOPLE_BY_SPLIT,
    biographies,
    facts_fingerprint,
    people,
    questions,
    training_statements,
)


def test_the_facts_never_change() -> None:
    assert facts_fingerprint() == "bed292ce8a98142f2da997f247b380f5da6b98a40ebcd6306672c71e1d0139c0"
    assert biographies(7, 3)[0] == (
        "Hugo Walmin always wears a coat that is blue. The animal that Hugo Walmin loves is a dog. "
        "The job of Hugo Walmin is that of a singer."
    )


def test_people_are_distinct_and_split_as_declared() -> None:
    assert len({person.name.split()[1] for person in people()}) == len(people()) == 400
    assert Counter(person.split for person in people()) == PEOPLE_BY_SPLIT


def test_enough_questions_for_narrow_intervals() -> None:
    assert len(questions("validation")) == 300
    assert len(questions("test")) == 504
    assert len(training_statements()) == 132 * 3 * 4


def test_splits_ask_about_different_people() -> None:
    names = {
        split: {
            person.name for person in people() if person.split == split and any(person.name in q.prompt for q in asked)
        }
        for split, asked in (("validation", questions("validation")), ("test", questions("test")))
    }
    assert len(names["validation"]) == 100
    assert len(names["test"]) == 168
    trained = " ".join(question.prompt for question in training_statements())
    assert not [name for name in names["validation"] | names["test"] if name in trained]


def test_guessing_one_value_cannot_win() -> None:
    for split in ("validation", "test"):
        for attribute in ATTRIBUTES:
            answers = Counter(q.answer for q in questions(split) if q.attribute is attribute)
            assert max(answers.values()) - min(answers.values()) <= 1
            assert len(answers) == 8


def test_a_biography_states_every_fact_in_the_words_of_a_question() -> None:
    for person, biography in zip(people(), biographies(0, 0), strict=True):
        sentences = biography.removesuffix(".").split(". ")
        statements = {
            f"{template.replace('NAME', person.name)} {attribute.values[value]}"
            for attribute, value in zip(ATTRIBUTES, person.values, strict=True)
            for template in attribute.templates
        }
        assert len(sentences) == 3
        assert set(sentences) <= statements


def test_wording_and_order_change_with_the_epoch_and_nothing_else() -> None:
    assert biographies(1, 0) == biographies(1, 0)
    changed = sum(a != b for a, b in zip(biographies(1, 0), biographies(1, 1), strict=True))
    assert changed > 390


def test_the_value_comes_last_and_after_the_name() -> None:
    for attribute in ATTRIBUTES:
        assert len(set(attribute.values)) == len(attribute.values)
        for template in attribute.templates:
            assert template.count("NAME") == 1
            # An article before a vowel would give the value away.
            assert not any(value[0] in "aeiou" for value in attribute.values)
