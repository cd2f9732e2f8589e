"""Dense types against the gguf package's and torch's rounding."""

import re

import gguf
import numpy as np
import pytest
import torch

from wrinklefree.serving.dense_types import DENSE_TYPES
from wrinklefree.utils.errors import ConfigError

VALUES = np.random.default_rng(5).standard_normal((7, 96)).astype(np.float32) * np.float32(3)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0"])
def test_bytes_are_those_of_the_gguf_package(name: str) -> None:
    values = np.concatenate([VALUES, np.zeros((1, 96), np.float32)])
    ours = DENSE_TYPES[name].encode(values)
    theirs = gguf.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8)
    np.testing.assert_array_equal(ours, theirs)
    assert ours.shape == (8, DENSE_TYPES[name].row_bytes(96))


def test_ties_round_to_even() -> None:
    ties = np.array([[1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38]], dtype=np.float32)
    stored = torch.from_numpy(DENSE_TYPES["BF16"].encode(ties)).view(torch.bfloat16)
    assert torch.equal(stored, torch.from_numpy(ties).to(torch.bfloat16))
    halves = np.array([[1 + 2**-11, 1 + 3 * 2**-11, 65504, 2**-24]], dtype=np.float32)
    assert torch.equal(
        torch.from_numpy(DENSE_TYPES["F16"].encode(halves)).view(torch.half), torch.from_numpy(halves).half()
    )


@pytest.mark.parametrize(("name", "value"), [("F16", 70000.0), ("Q8_0", 9e6)])
def test_values_that_do_not_fit_are_refused(name: str, value: float) -> None:
    values = VALUES.copy()
    values[3, 5] = -value
    with pytest.raises(ConfigError, match=re.escape(f"a value of {value:g} does not fit into {name}")):
        DENSE_TYPES[name].encode(values)


def test_rows_are_whole_blocks() -> None:
    with pytest.raises(ConfigError, match="type Q8_0 stores 32 values a block and a row has 48; use F16"):
        DENSE_TYPES["Q8_0"].row_bytes(48)
