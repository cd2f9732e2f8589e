"""Hand-made batches and forward passes: the objectives are tested without a model."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from wrinklefree.models.config import Architecture
from wrinklefree.models.records import IGNORE, QKV, Batch, ModelOutput


@dataclass
class Maker:
    """Random records from one seeded generator."""

    vocabulary: int = 37
    hidden: int = 24
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    layers: int = 3

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def batch(self, document_lengths: list[list[int]], length: int, *, target_share: float = 0.6) -> Batch:
        """Rows of packed documents, padded to `length`; a random share of positions are targets, each last is not."""
        documents = torch.zeros(len(document_lengths), length, dtype=torch.long)
        positions = torch.zeros_like(documents)
        can_predict = torch.zeros_like(documents, dtype=torch.bool)
        for row, lengths in enumerate(document_lengths):
            start = 0
            for number, size in enumerate(lengths, start=1):
                documents[row, start : start + size] = number
                positions[row, start : start + size] = torch.arange(size)
                can_predict[row, start : start + size - 1] = True
                start += size
        ids = torch.randint(0, self.vocabulary, documents.shape, generator=self.generator)
        drawn = torch.rand(documents.shape, generator=self.generator) < target_share
        labels = torch.randint(0, self.vocabulary, documents.shape, generator=self.generator)
        return Batch(ids, torch.where(can_predict & drawn, labels, IGNORE), positions, documents)

    def output(self, rows: int, length: int, *, gradients: bool = False) -> ModelOutput:
        """A forward pass of random numbers, all of them leaves."""

        def leaf(*shape: int) -> Tensor:
            return self.normal(*shape).requires_grad_(gradients)

        return ModelOutput(
            hidden=leaf(rows, length, self.hidden),
            head_weight=leaf(self.vocabulary, self.hidden),
            final_norm=lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
            hidden_states={layer: leaf(rows, length, self.hidden) for layer in range(self.layers)},
            qkv=QKV(
                leaf(rows, self.heads, length, self.head_dim),
                leaf(rows, self.kv_heads, length, self.head_dim),
                leaf(rows, self.kv_heads, length, self.head_dim),
            ),
        )


def leaves(output: ModelOutput) -> list[Tensor]:
    assert output.qkv is not None
    states = [output.qkv.query, output.qkv.key, output.qkv.value]
    return [output.hidden, output.head_weight, *output.hidden_states.values(), *states]


def rows_of_output(output: ModelOutput, rows: slice) -> ModelOutput:
    """Some rows of a forward pass; gradients flow back to the whole."""
    assert output.qkv is not None
    qkv = QKV(output.qkv.query[rows], output.qkv.key[rows], output.qkv.value[rows])
    hidden_states = {layer: state[rows] for layer, state in output.hidden_states.items()}
    return replace(output, hidden=output.hidden[rows], hidden_states=hidden_states, qkv=qkv)


def rows_of_batch(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.input_ids[rows], batch.labels[rows], batch.position_ids[rows], batch.document_ids[rows])


@pytest.fixture
def make() -> Maker:
    return Maker()


@pytest.fixture
def take_leaves() -> Callable[[ModelOutput], list[Tensor]]:
    return leaves


@pytest.fixture
def take_output_rows() -> Callable[[ModelOutput, slice], ModelOutput]:
    return rows_of_output


@pytest.fixture
def take_batch_rows() -> Callable[[Batch, slice], Batch]:
    return rows_of_batch


@pytest.fixture
def architecture() -> Callable[..., Architecture]:
    def build(**changes: object) -> Architecture:
        base: dict[str, object] = {
            "family": "llama",
            "vocab_size": 37,
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
        }
        return Architecture.model_validate(base | changes)

    return build
