"""Real text that every Python brings along, and a small byte-level language model to train on it.

Six sources and two probes. `reference` is the prose of Python's language reference, `code` the standard library,
`docstrings` its documentation strings, `tables` its character-encoding tables, `shuffled` is reference prose with the
letters of each document in random order, `noise` random bytes. The probes are held-out documents of `reference` and of
`code`; test documents are held out again, so that neither sources nor probes hold them.
"""

import ast
import random
import sysconfig
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

LENGTH = 64
"""Bytes a row predicts."""
SOURCES = ("reference", "code", "docstrings", "tables", "shuffled", "noise")
PROBES = ("reference", "code")


def _documents() -> dict[str, list[str]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    code, docstrings = [], []
    for path in sorted(library.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        code.append(text)
        nodes = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module))
        docstrings.append("\n".join(doc for node in nodes if (doc := ast.get_docstring(node))))
    topics = [text for _, text in sorted(import_module("pydoc_data.topics").topics.items())]
    tables = [path.read_text(encoding="utf-8") for path in sorted((library / "encodings").glob("cp*.py"))]
    draw = random.Random(0)
    return {
        "reference": topics,
        "code": code,
        "docstrings": [text for text in docstrings if text],
        "tables": tables,
        "shuffled": ["".join(draw.sample(text, len(text))) for text in topics],
        "noise": ["".join(chr(draw.randrange(32, 127)) for _ in range(4000)) for _ in range(50)],
    }


@dataclass(frozen=True)
class Corpus:
    """Rows [n, LENGTH + 1] of bytes."""

    train: dict[str, Tensor]
    probe: dict[str, Tensor]
    test: dict[str, Tensor]


def load_corpus(rows: int = 3000) -> Corpus:
    """At most so many rows of each source; of every ten documents of a probe's kind one is probe and one is test."""
    train, probe, test = {}, {}, {}
    for name, texts in _documents().items():
        kept = [text for index, text in enumerate(texts) if index % 10 not in (0, 5)]
        train[name] = _rows(kept, rows, seed=1)
        if name in PROBES:
            probe[name] = _rows(texts[0::10], 256, seed=2)
            test[name] = _rows(texts[5::10], 512, seed=3)
    return Corpus(train, probe, test)


def _rows(texts: list[str], count: int, *, seed: int) -> Tensor:
    content = b"".join(text.encode("ascii", errors="replace") for text in texts)
    whole = torch.frombuffer(bytearray(content), dtype=torch.uint8).long().clamp(max=127)
    rows = whole[: len(whole) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]


class Block(nn.Module):
    """Causal attention and a feed-forward network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to the same."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.out(mixed)
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class ByteLM(nn.Module):
    """Two blocks of width 64: 0.12M parameters."""

    def __init__(self, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(128, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] to logits [B, T, 128]."""
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def row_loss(model: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Summed next-byte loss of each row, and its targets."""
    logits = model(rows[:, :-1])
    losses = functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    return losses.sum(1), torch.full((len(rows),), LENGTH)


def mean_loss(model: nn.Module, rows: Tensor) -> float:
    """Nats a byte."""
    with torch.no_grad():
        return float(sum(row_loss(model, part)[0].sum() for part in rows.split(128)) / (len(rows) * LENGTH))
