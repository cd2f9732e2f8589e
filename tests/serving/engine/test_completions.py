"""llama.cpp's completion messages to tokens, held-back ones included."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wrinklefree.serving.engine.completions import CompletionReader, Undecided, Vocabulary, completion_body
from wrinklefree.serving.engine.protocol import Sampling, Token
from wrinklefree.utils.errors import EngineError
from wrinklefree.utils.tokenizer import TextTokenizer, train_tokenizer

PLAIN = Sampling(8, temperature=0.5, top_k=3, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    """The 256 bytes, and few merges, of which some end inside a character (the euro sign is E2 82 AC)."""
    return Vocabulary(train_tokenizer(["a€b€ " * 20], 260))


@pytest.fixture(scope="module")
def real(tokenizer: TextTokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


def message(content: str, tokens: list[int], total: int, **more: Any) -> dict[str, Any]:
    return {"content": content, "tokens": tokens, "stop": False, "tokens_predicted": total} | more


def byte(vocabulary: Vocabulary, value: int) -> int:
    return vocabulary.ids[bytes([value])]


@given(text=st.text(max_size=12))
@settings(deadline=None, max_examples=200)
def test_bytes_of_tokens_are_the_bytes_of_the_text(real: Vocabulary, text: str) -> None:
    ids = real.tokenizer.encode(text)
    assert b"".join(map(real.bytes_of, ids)) == text.encode()


def test_every_byte_has_its_own_token(vocabulary: Vocabulary) -> None:
    assert sorted(key for key in vocabulary.ids if len(key) == 1) == [bytes([value]) for value in range(256)]


def test_splits_find_all_and_only_spellings(vocabulary: Vocabulary) -> None:
    text = "€".encode()
    singles = [byte(vocabulary, value) for value in text]
    assert vocabulary.splits(text, 3) == [singles]
    for count in (1, 2):
        for split in vocabulary.splits(text, count):
            assert len(split) == count
            assert b"".join(map(vocabulary.bytes_of, split)) == text
    assert vocabulary.splits(text, 4) == []
    assert vocabulary.splits(b"", 0) == [[]]


def test_a_body_samples_as_our_own_engine_does() -> None:
    body = completion_body([1, 2], PLAIN)
    assert body["samplers"] == ["temperature", "top_k", "top_p"]
    assert (body["temperature"], body["top_k"], body["top_p"], body["seed"]) == (0.5, 3, 0.9, 5)
    assert (body["min_p"], body["repeat_penalty"], body["typical_p"]) == (0.0, 1.0, 1.0)
    assert "n_probs" not in body
    everything = completion_body([1], Sampling(4, logprobs=0))
    assert (everything["top_k"], everything["top_p"], everything["n_probs"]) == (0, 1.0, 1)


@pytest.mark.parametrize("seed", [None, 0, -3, 2**32 - 1, 2**40])
def test_seeds_fit_into_32_bits_and_never_mean_random(seed: int | None) -> None:
    assert 0 <= completion_body([1], Sampling(1, seed=seed))["seed"] < 2**32 - 1


def test_ordinary_messages(vocabulary: Vocabulary) -> None:
    reader = CompletionReader(vocabulary, PLAIN)
    a, b = byte(vocabulary, ord("a")), byte(vocabulary, ord("b"))
    assert reader.read({"prompt_progress": {}, "tokens": [0], "content": "", "stop": False}) == []
    assert reader.read(message("a", [a], 1)) == [Token(a)]
    assert reader.read(message("b", [b], 2)) == [Token(b)]
    assert not reader.finished
    assert reader.read(message("", [], 2, stop=True)) == []
    assert (reader.finished, reader.missing) == (True, 0)


def test_held_back_tokens_are_told_from_the_text(vocabulary: Vocabulary) -> None:
    reader = CompletionReader(vocabulary, PLAIN)
    first, second, third = (byte(vocabulary, value) for value in "€".encode())
    assert reader.read(message("€", [third], 3)) == [Token(first), Token(second), Token(third)]
    assert reader.counted == 3


def test_text_with_several_spellings_or_none_is_asked_for_again(vocabulary: Vocabulary) -> None:
    a = byte(vocabulary, ord("a"))
    broken = message("\ufffda", [a], 3)
    with pytest.raises(Undecided) as raised:
        CompletionReader(vocabulary, PLAIN).read(broken)
    assert raised.value.count == 3


def test_tokens_held_back_at_the_end_are_counted(vocabulary: Vocabulary) -> None:
    reader = CompletionReader(vocabulary, PLAIN)
    a = byte(vocabulary, ord("a"))
    reader.read(message("a", [a], 1))
    assert reader.read(message("", [], 3, stop=True)) == []
    assert reader.missing == 2


def test_logprobs_and_alternatives(vocabulary: Vocabulary) -> None:
    a = byte(vocabulary, ord("a"))
    entry = {"id": a, "logprob": -0.5, "top_logprobs": [{"id": a, "logprob": -0.5}, {"id": 9, "logprob": -1.5}]}
    probabilities = message("a", [a], 1, completion_probabilities=[entry])
    for count, expected in ((0, ()), (1, ((a, -0.5),)), (2, ((a, -0.5), (9, -1.5)))):
        reader = CompletionReader(vocabulary, Sampling(1, logprobs=count))
        assert reader.read(probabilities) == [Token(a, -0.5, expected)]


def test_servers_without_token_ids_are_read_by_their_text(vocabulary: Vocabulary) -> None:
    reader = CompletionReader(vocabulary, PLAIN)
    tokens = reader.read({"content": "ab", "stop": False}) + reader.read({"content": "", "stop": True})
    assert vocabulary.tokenizer.decode([token.id for token in tokens]) == "ab"
    assert reader.finished


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"error": {"code": 400, "message": "too\nlong"}}, "refused the request: too long"),
        ({"error": "dead"}, "refused the request: dead"),
        ({"stop": False}, "not of its API"),
        ({"content": "a", "stop": False, "tokens": "x"}, "not of its API"),
        ({"content": "a", "stop": False, "tokens": [None]}, "not of its API"),
    ],
)
def test_errors_and_nonsense(vocabulary: Vocabulary, bad: dict[str, Any], text: str) -> None:
    with pytest.raises(EngineError, match=text):
        CompletionReader(vocabulary, PLAIN).read(bad)
