"""Tokens to text: equal to decoding everything at once, whole characters, stop strings wherever token borders fall."""

import json
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serving.conftest import TINY
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE

from wrinklefree.serving.engine.protocol import Token
from wrinklefree.serving.text_stream import Finish, Piece, StopStrings, TokenBytes, stream_text
from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.tokenizer import SpecialTokens, TextTokenizer

TOKENIZER = TextTokenizer.from_folder(TINY)
BYTES = TokenBytes(TOKENIZER)
SINGLE_BYTES = [TOKENIZER.encode(chr(code))[0] for code in range(32, 127)]


def run(ids: Sequence[int], stops: Sequence[str] = (), max_tokens: int = 10**6) -> tuple[list[Piece], Finish]:
    *pieces, finish = stream_text(map(Token, ids), BYTES, max_tokens=max_tokens, stops=stops)
    assert isinstance(finish, Finish)
    return [piece for piece in pieces if isinstance(piece, Piece)], finish


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@given(st.lists(st.integers(1, TOKENIZER.vocab_size - 1), max_size=40))
def test_any_tokens_give_the_text_of_decoding_them_together(ids: list[int]) -> None:
    pieces, finish = run(ids)
    assert text_of(pieces) == b"".join(BYTES.text_bytes(index) for index in ids).decode(errors="replace")
    assert text_of(pieces) == TOKENIZER.decode(ids)
    assert [token.id for piece in pieces for token in piece.tokens] == ids
    assert finish == Finish("stop", len(ids))


@given(st.text(max_size=60))
def test_text_survives_and_no_piece_ends_inside_a_character(text: str) -> None:
    pieces, _ = run(TOKENIZER.encode(text))
    assert text_of(pieces) == text
    assert "�" in text or not any("�" in piece.text for piece in pieces)


def test_a_character_of_four_tokens_is_held_back_until_it_is_whole() -> None:
    ids = TOKENIZER.encode("a🙂b")
    pieces, _ = run(ids)
    assert len(ids) > 3
    assert [piece.text for piece in pieces if piece.text] == ["a", "🙂", "b"]


def test_a_character_that_never_ends_is_shown_as_broken() -> None:
    ids = TOKENIZER.encode("a🙂")[:-1]
    pieces, _ = run(ids)
    assert text_of(pieces) == "a�"
    assert sum(len(piece.tokens) for piece in pieces) == len(ids)


@settings(max_examples=200)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(0, 30), max_size=12),
)
def test_stop_strings_are_found_wherever_the_borders_fall(text: str, stops: list[str], cuts: list[int]) -> None:
    borders = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    strings = StopStrings(stops)
    out = ""
    for start, end in zip(borders, borders[1:], strict=False):
        out += strings.push(text[start:end])
        # An independent statement: what is out must never contain a stop, and never be more than the text before the first.
        assert not any(stop in out for stop in stops)
    out += "" if strings.found else strings.flush()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert strings.found == bool(ends)
    if not ends:
        assert out == text
    else:
        # The first that is complete wins; of several complete in the same push, the one that starts first.
        assert text.startswith(out)
        assert any(text.startswith(stop, len(out)) for stop in stops)


def test_a_stop_string_cuts_its_tokens_off_and_closes_the_source() -> None:
    closed: list[bool] = []

    def source() -> Iterator[Token]:
        try:
            for index in TOKENIZER.encode("one two three four"):
                yield Token(index, -1.0)
        finally:
            closed.append(True)

    *pieces, finish = stream_text(source(), BYTES, max_tokens=100, stops=[" three"])
    assert all(isinstance(piece, Piece) for piece in pieces)
    texts = [piece for piece in pieces if isinstance(piece, Piece)]
    assert text_of(texts) == "one two"
    kept = [token.id for piece in texts for token in piece.tokens]
    assert TOKENIZER.decode(kept) == "one two"
    assert isinstance(finish, Finish)
    assert finish.reason == "stop"
    assert finish.tokens > len(kept)
    assert closed == [True]


def test_what_only_looked_like_a_stop_string_comes_out_at_the_end() -> None:
    pieces, finish = run(TOKENIZER.encode("wait: User"), stops=["User:"])
    assert text_of(pieces) == "wait: User"
    assert finish.reason == "stop"


def test_the_limit_is_length_even_where_the_source_would_go_on() -> None:
    ids = TOKENIZER.encode("one two three four")
    pieces, finish = run(ids, max_tokens=2)
    assert [token.id for piece in pieces for token in piece.tokens] == ids[:2]
    assert finish == Finish("length", 2)


def test_a_stop_string_in_the_last_allowed_token_is_a_stop() -> None:
    ids = TOKENIZER.encode("one two")
    assert run(ids, stops=["two"], max_tokens=len(ids))[1].reason == "stop"


def test_control_tokens_have_no_text_but_a_name() -> None:
    eos = TOKENIZER.eos_token_id
    assert text_of(run([*TOKENIZER.encode("a"), eos, *TOKENIZER.encode("b")])[0]) == "ab"
    assert BYTES.spelling(eos) == "<|endoftext|>"


def test_closing_closes_the_source() -> None:
    closed: list[bool] = []

    def source() -> Iterator[Token]:
        try:
            while True:
                yield Token(SINGLE_BYTES[40])
        finally:
            closed.append(True)

    text = stream_text(source(), BYTES, max_tokens=10**6)
    next(text)
    text.close()  # type: ignore[attr-defined]
    assert closed == [True]


def sentencepiece() -> TextTokenizer:
    words = ["<s>", "</s>", "▁Hello", "▁world", "!", "<0xC3>", "<0xB6>", "<think>"]
    tokenizer = Tokenizer(BPE({word: index for index, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.add_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True), AddedToken("<think>")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextTokenizer(tokenizer, SpecialTokens(eos="</s>", bos="<s>", add_bos=True))


def test_sentencepiece_spaces_and_bytes() -> None:
    tokenizer = sentencepiece()
    ids = [2, 3, 5, 6, 4, 7]
    *pieces, _ = stream_text(map(Token, ids), TokenBytes(tokenizer), max_tokens=99)
    text = "".join(piece.text for piece in pieces if isinstance(piece, Piece))
    assert text == " Hello worldö!<think>"
    assert text.removeprefix(" ") == tokenizer.decode(ids)


def test_another_kind_of_tokenizer_is_refused() -> None:
    description = json.loads(TOKENIZER.json)
    description["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    wordpiece = TextTokenizer(Tokenizer.from_str(json.dumps(description)), SpecialTokens(eos="<|endoftext|>"))
    with pytest.raises(CheckpointError, match=r"decoder \(WordPiece\) is neither byte-level nor SentencePiece"):
        TokenBytes(wordpiece)
