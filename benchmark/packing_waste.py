"""What packing saves on real lengths of documents, and that it changes nothing a document's loss depends on.

    uv run python -m benchmark.packing_waste                       # the packaged corpora, the tiny model
    uv run python -m benchmark.packing_waste --steps 0             # without timing

Table 1: padding by way of filling rows. "pad" gives a document (or a row's length of a long one) a row; "pad to longest"
cuts each batch of 8 to its longest row; the packers are the ones of training. Table 2: the tiny model, full precision and
float32, on rows of each packer against the same documents one by one: largest differences of logits, and of the gradient of
the summed loss, relative to its largest entry. Table 3: tokens of text trained on per second (forward and backward).
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from wrinklefree.composition import compose
from wrinklefree.data.corpora import load_corpus
from wrinklefree.data.packing import Piece, Row, best_fit, collate, cut_to_length, next_token_piece, pack
from wrinklefree.data.streams import LARGEST_FINITE_BLOCK
from wrinklefree.data.tokens import encode_documents
from wrinklefree.models.hf import load_pretrained
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import IGNORE, Batch

BATCH = 8


def blocks(documents: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """Documents that are packed together."""
    for first in range(0, len(documents), LARGEST_FINITE_BLOCK):
        yield documents[first : first + LARGEST_FINITE_BLOCK]


def rows_of(way: str, documents: Sequence[Piece], length: int) -> list[Row]:
    """Rows of documents in the order given."""
    if way == "best_fit":
        cut = ([part for piece in block for part in cut_to_length(piece, length)] for block in blocks(documents))
        return [row for pieces in cut for row in best_fit(pieces, length)]
    return pack(documents, length, enabled=way == "concat")


def waste_table(documents: Sequence[Piece], lengths: Sequence[int]) -> Table:
    """Table 1."""
    table = Table("row length", "pad", "pad to longest", "concat", "best_fit", "cut by concat", "cut by best_fit")
    total = sum(map(len, documents))
    for length in lengths:
        padded = rows_of("pad", documents, length)
        to_longest = sum(
            max(map(len, batch)) * len(batch)
            for batch in (padded[at : at + BATCH] for at in range(0, len(padded), BATCH))
        )
        cells = [f"{1 - total / (len(padded) * length):.2%}", f"{1 - total / to_longest:.2%}"]
        pieces: list[str] = []
        for way in ("concat", "best_fit"):
            rows = rows_of(way, documents, length)
            cells.append(f"{1 - total / (len(rows) * length):.2%}")
            # A piece whose last token predicts one that is not in its row was cut.
            cut = sum(int(piece.labels[-1] != IGNORE) for row in rows for piece in row.pieces)
            pieces.append(f"{cut / len(documents):.1%}")
        table.add_row(str(length), *cells, *pieces)
    return table


def loss_and_logits(model: CausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy of all targets, and the logits there [targets, V], ordered by row and position."""
    at_targets = batch.labels != IGNORE
    logits = model(batch).logits()[at_targets]
    return functional.cross_entropy(logits, batch.labels[at_targets], reduction="sum"), logits.detach()


def gradient(model: CausalLM) -> Tensor:
    """All gradients in one vector; clears them."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return flat


def difference(model: CausalLM, rows: Sequence[Row], length: int) -> tuple[float, float, float]:
    """Largest difference of logits, largest logit, and relative largest difference of the gradient, packed and alone."""
    loss, packed = loss_and_logits(model, collate(rows, length, 0))
    loss.backward()
    together = gradient(model)
    alone: list[Tensor] = []
    for piece in itertools.chain.from_iterable(row.pieces for row in rows):
        loss, logits = loss_and_logits(model, collate([Row((piece,))], len(piece), 0))
        loss.backward()
        alone.append(logits)
    apart = gradient(model)
    worst = float((packed - torch.cat(alone)).abs().max())
    return worst, float(packed.abs().max()), float((together - apart).abs().max() / apart.abs().max())


def tokens_a_second(model: CausalLM, rows: Sequence[Row], length: int, steps: int) -> float:
    """Tokens of text (no padding) a second of forward and backward, in batches of 8 rows."""
    batches = [rows[at : at + BATCH] for at in range(0, steps * BATCH, BATCH)]
    loss_and_logits(model, collate(batches[0], length, 0))[0].backward()
    began = time.process_time()
    for batch in batches:
        loss_and_logits(model, collate(batch, length, 0))[0].backward()
    seconds = time.process_time() - began
    model.zero_grad(set_to_none=True)
    return sum(len(row) for batch in batches for row in batch) / seconds


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Waste of packing and padding on real lengths; packed against alone.")
    parser.add_argument("--corpora", nargs="+", default=["boolq_passages", "python_docs"], metavar="NAME")
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048], metavar="T")
    parser.add_argument("--steps", type=int, default=4, help="timed batches of 8 rows; 0: no timing")
    parser.add_argument("--row", type=int, default=256, help="row length of comparisons with the model")
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    model, tokenizer = load_pretrained(compose(["model=tiny"]).config.model)
    texts = [text for name in options.corpora for text in load_corpus(name) if text.strip()]
    order = np.random.default_rng(0).permutation(len(texts))
    documents = [next_token_piece(d) for d in encode_documents([texts[index] for index in order], tokenizer)]
    sizes = np.asarray([len(piece) for piece in documents])
    median, p90 = np.percentile(sizes, (50, 90))
    console.print(
        f"{', '.join(options.corpora)}: {len(sizes)} documents, {sizes.sum()} tokens; median {median:.0f}, mean "
        f"{sizes.mean():.0f}, 90% below {p90:.0f}, longest {sizes.max()}"
    )
    console.print(waste_table(documents, options.lengths))
    few = documents[:200]
    table = Table("packer", "rows", "documents", "largest logit difference", "of logits up to", "gradient, relative")
    for way in ("concat", "best_fit"):
        rows = sorted(rows_of(way, few, options.row), key=lambda row: -len(row.pieces))[:6]
        worst, largest, relative = difference(model, rows, options.row)
        pieces = sum(len(row.pieces) for row in rows)
        table.add_row(way, str(len(rows)), str(pieces), f"{worst:.2g}", f"{largest:.3g}", f"{relative:.2g}")
    console.print(table)
    if options.steps:
        ways = ("pad", "concat", "best_fit")
        speeds = {
            way: tokens_a_second(model, rows_of(way, documents, options.row), options.row, options.steps)
            for way in ways
        }
        table = Table("rows", "tokens of text a CPU second", "of padding's")
        for way, speed in speeds.items():
            table.add_row(way, f"{speed:,.0f}", f"x {speed / speeds['pad']:.2f}")
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
