"""A small language model, its loss per row, and batches that are functions of a number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two linear layers that share an input, and one that reads their product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.silu(self.gate(x)) * self.up(x))


class TinyLM(nn.Module):
    def __init__(self, vocabulary: int = 20, width: int = 12, blocks: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = self.dropout(block(x))
        return self.head(x)


def row_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token loss of each row, [B], and its targets."""
    logits = model(tokens[:, :-1])
    losses = functional.cross_entropy(logits.transpose(1, 2).float(), tokens[:, 1:], reduction="none")
    return losses.sum(1), torch.full((len(tokens),), losses.shape[1])


@pytest.fixture
def tiny_lm() -> Callable[..., TinyLM]:
    def make(**options: Any) -> TinyLM:
        torch.manual_seed(0)
        return TinyLM(**options)

    return make


@pytest.fixture
def loss() -> Callable[..., Any]:
    return row_loss


def language(successor: int, *, rows: int, seed: int, noise: float = 0.0, vocabulary: int = 20) -> Tensor:
    """Rows in which a token is followed by itself plus `successor`; a share `noise` of the tokens is random."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, vocabulary, (rows, 1), generator=generator)
    tokens = (start + successor * torch.arange(12)) % vocabulary
    random = torch.randint(0, vocabulary, tokens.shape, generator=generator)
    return torch.where(torch.rand(tokens.shape, generator=generator) < noise, random, tokens)


@pytest.fixture
def make_language() -> Callable[..., Tensor]:
    return language
