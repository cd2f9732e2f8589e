"""Packed rows as a reader sees them: texts, borders, what is a target and what is not."""

from collections.abc import Iterator
from itertools import groupby
from typing import Protocol

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from wrinklefree.models.records import IGNORE, Batch

CONTEXT_MARKS = "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"
"""Around tokens that nothing is predicted into: colour alone would be lost in a file."""


class Decoder(Protocol):
    """The part of a tokenizer that turns ids into text."""

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens included."""
        ...


def show_row(batch: Batch, row: int, tokenizer: Decoder) -> RenderableType:
    """One row, document after document; tokens that are no target of any position stand in marks, dim."""
    ids, labels, documents = (getattr(batch, name)[row].tolist() for name in ("input_ids", "labels", "document_ids"))
    parts: list[RenderableType] = [Rule(f"row {row}: {len(ids)} positions, {_targets(labels)} targets", align="left")]
    for number, positions in groupby(range(len(ids)), key=documents.__getitem__):
        span = list(positions)
        first, last = span[0], span[-1]
        if number == 0:
            parts.append(Text(f"  padding, positions {first}-{last}", style="dim"))
            continue
        targets = _targets(labels[first : last + 1])
        parts.append(Text(f"  document {number}, positions {first}-{last}, {targets} targets", style="bold cyan"))
        parts.append(Text("  ").append_text(_document(ids[first : last + 1], labels[first : last + 1], tokenizer)))
        if labels[last] != IGNORE:
            # A long document that goes on in another row still predicts its next token.
            parts.append(Text(f"  goes on elsewhere; next token {tokenizer.decode([labels[last]])!r}", style="yellow"))
    return Group(*parts)


def _document(ids: list[int], labels: list[int], tokenizer: Decoder) -> Text:
    """A token is a target where the position before it predicts it."""
    text = Text()
    for is_target, tokens in _runs(ids, labels):
        piece = tokenizer.decode(tokens)
        if is_target:
            text.append(piece)
        else:
            text.append(piece.join(CONTEXT_MARKS), style="dim")
    return text


def _runs(ids: list[int], labels: list[int]) -> Iterator[tuple[bool, list[int]]]:
    is_target = [False, *(label != IGNORE for label in labels[:-1])]
    for value, run in groupby(zip(is_target, ids, strict=True), key=lambda pair: pair[0]):
        yield value, [token for _, token in run]


def _targets(labels: list[int]) -> int:
    return sum(label != IGNORE for label in labels)
