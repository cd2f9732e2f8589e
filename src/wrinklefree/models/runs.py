"""Runs: stretches of a row with one document id."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

MAX_KEYS_FOR_FLOAT32 = 256
"""The CPU's bfloat16 kernel takes up to four times as long as the float32 one on rows up to this length, forward and
backward; longer rows gain from bfloat16."""


@dataclass(frozen=True)
class Run:
    """Positions `start` to `end` of one row: a document, or padding."""

    start: int
    end: int
    is_padding: bool


def find_runs(document_ids: Tensor) -> tuple[tuple[Run, ...], ...]:
    """Runs of each row; reads the tensor, so only for one that lies on the CPU."""
    rows = []
    for ids in document_ids.tolist():
        borders = [0, *(t for t in range(1, len(ids)) if ids[t] != ids[t - 1]), len(ids)]
        rows.append(tuple(Run(a, b, ids[a] == 0) for a, b in pairwise(borders)))
    return tuple(rows)


def uses_float32(states: Tensor, keys: int) -> bool:
    """Whether attention over so many keys is faster in float32 than in the states' own type."""
    return states.device.type == "cpu" and states.dtype == torch.bfloat16 and keys <= MAX_KEYS_FOR_FLOAT32
