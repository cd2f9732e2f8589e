"""Rows of both packers mean what their documents mean alone; waste counted by hand."""

import numpy as np
import pytest
import torch

from benchmark.packing_waste import difference, rows_of, waste_table
from wrinklefree.data.packing import Piece, next_token_piece
from wrinklefree.models.config import Architecture
from wrinklefree.models.llama import CausalLM


def documents(sizes: list[int]) -> list[Piece]:
    generator = np.random.default_rng(0)
    return [next_token_piece(generator.integers(0, 50, size).astype(np.int32)) for size in sizes]


@pytest.mark.parametrize("way", ["concat", "best_fit"])
@pytest.mark.parametrize("length", [24, 520])
def test_packed_logits_and_gradients_are_those_of_documents_alone(way: str, length: int) -> None:
    """520 positions take the loop over documents, 24 the mask."""
    torch.manual_seed(0)
    model = CausalLM(
        Architecture(
            family="qwen3", vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, qk_norm=True,
        )
    )  # fmt: skip
    rows = rows_of(way, documents([3, length // 2, 9, 2 * length + 5, 7, 1, length // 3, 11]), length)
    assert max(len(row.pieces) for row in rows) > 2
    worst, largest, gradient = difference(model, rows, length)
    assert largest > 0.1
    assert worst < 1e-5
    assert gradient < 1e-5


def test_waste_by_hand() -> None:
    table = waste_table(documents([3, 6, 2, 5]), [8])
    # 16 tokens: four rows padded to 8 or to their longest (6); two rows packed (6 + 2, 5 + 3), or end to end.
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["8", "50.00%", "33.33%", "0.00%", "0.00%", "25.0%", "0.0%"]
