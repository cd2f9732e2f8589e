"""Whether the CPU engine computes each block's function; `benchmark.engine_parity --blocks` prints the table.

Every block stands alone: the engine reads the hidden states that PyTorch's block read, and its output is held against what
PyTorch's block made of them. A one-block model does that whose embedding table is the hidden states and whose head is the
identity. Two things would hide errors. The residual stream, which a block only adds to: so the error of the *update*
(output minus input) is reported, relative to the update. And the final norm, which divides a token's size away: so behind
the block stands a second one with zero weights and a bias of `MARK` on channel 0. All that the norm then divides by is
`MARK`, which is known, and the output can be read back with its size, without a number of PyTorch's. Channel 0 itself is lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from wrinklefree.models.attention import plan_attention, rotary_table
from wrinklefree.models.config import Architecture
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch, Wants
from wrinklefree.models.weights import EMBEDDING, HEAD
from wrinklefree.serving.engine.native.model import NativeModel, NativeOptions, PackedModel, parameter_shapes

WINDOW = 256
MARK = 2.0**40
"""Beside it a hidden state is below float32's last bit; its square is far from the largest float32."""
EXACT = 1e-5
"""Relative error of an update up to which float32's last bits alone explain it."""
FLIPPED = 1e-3
"""Relative error of an update at which an activation code that was rounded to its neighbour is plainly seen."""

_FIRST, _SECOND = "model.layers.0.", "model.layers.1."
_BIAS = "self_attn.o_proj.bias"


class BlockProbe:
    """One block of a ternary model in the engine, with 32-bit cache and read-out: hidden states in, hidden states out."""

    def __init__(self, model: CausalLM, index: int) -> None:
        assert model.bitnet is not None
        rows = max(WINDOW, model.architecture.hidden_size)
        probed: dict[str, object] = {"num_hidden_layers": 2, "vocab_size": rows, "tie_word_embeddings": False}
        architecture = Architecture.model_validate(
            model.architecture.model_dump() | probed | {"attention_output_bias": True}
        )
        tensors = {name: torch.zeros(shape) for name, shape in parameter_shapes(architecture, model.bitnet).items()}
        block = model.blocks[index]
        tensors |= {f"{_FIRST}{name}": parameter.detach() for name, parameter in block.named_parameters()}
        tensors["model.norm.weight"] = torch.ones(architecture.hidden_size)
        tensors[HEAD] = torch.eye(rows, architecture.hidden_size)
        tensors[_SECOND + _BIAS][0] = MARK
        tensors[EMBEDDING] = torch.zeros(rows, architecture.hidden_size)
        self.packed = PackedModel.from_tensors(architecture, model.bitnet, tensors.items(), "f32")

    def output(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """The block's output [T, D] for hidden states [T, D] of a window; channel 0 means nothing."""
        embedding = np.zeros((self.packed.architecture.vocab_size, inputs.shape[1]), np.float32)
        embedding[: len(inputs)] = inputs
        options = NativeOptions(WINDOW, max_tokens=WINDOW, cache="f32")
        native = NativeModel(replace(self.packed, embedding=embedding), options)
        normed = native.logits(range(len(inputs)))[:, : inputs.shape[1]]
        native.close()
        return (normed * (MARK / normed[:, :1])).astype(np.float32)


@torch.inference_mode()
def hidden_states(model: CausalLM, ids: list[int]) -> NDArray[np.float32]:
    """What PyTorch's blocks read and write in one window, [L + 1, T, D]: block i reads row i and writes row i + 1."""
    row = torch.tensor([ids])
    batch = Batch(row, row, torch.arange(len(ids))[None], torch.ones_like(row))
    found = model(batch, Wants(hidden_layers=tuple(range(len(model.blocks))))).hidden_states
    embedded = model.model.embed_tokens(row)
    return torch.cat([embedded, *(found[index] for index in range(len(model.blocks)))]).numpy()


@torch.inference_mode()
def torch_outputs(model: CausalLM, states: NDArray[np.float32]) -> NDArray[np.float32]:
    """What PyTorch's blocks, each alone, make of their inputs in `states` [L + 1, T, D]: [L, T, D]."""
    positions = torch.arange(states.shape[1])[None]
    table = rotary_table(model.architecture, positions)
    plan = plan_attention(torch.ones_like(positions), positions.shape[1])
    inputs = torch.from_numpy(states[:-1])
    outputs = [block(x[None], table, plan, None)[0][0] for block, x in zip(model.blocks, inputs, strict=True)]
    return torch.stack(outputs).numpy()


@dataclass(frozen=True)
class BlockErrors:
    """Relative errors of each token, one array entry a token."""

    output: NDArray[np.float32]
    update: NDArray[np.float32]

    @classmethod
    def between(
        cls, found: NDArray[np.float32], expected: NDArray[np.float32], inputs: NDArray[np.float32]
    ) -> "BlockErrors":
        """Of outputs [T, D] against PyTorch's, without channel 0."""
        norm = partial(np.linalg.norm, axis=1)
        difference = norm((found - expected)[:, 1:])
        return cls(difference / norm(expected[:, 1:]), difference / norm((expected - inputs)[:, 1:]))

    @classmethod
    def together(cls, parts: Sequence["BlockErrors"]) -> "BlockErrors":
        """Of all parts' tokens."""
        return cls(np.concatenate([part.output for part in parts]), np.concatenate([part.update for part in parts]))

    def row(self, label: str) -> str:
        """A row of the table."""
        cells = [label, f"{len(self.update)}", f"{np.median(self.output):.1e}", f"{self.output.max():.1e}"]
        cells += [f"{np.median(self.update):.1e}", f"{np.percentile(self.update, 99):.1e}", f"{self.update.max():.1e}"]
        cells += [f"{100 * np.mean(self.update > limit):.3f} %" for limit in (EXACT, FLIPPED)]
        return f"| {' | '.join(cells)} |"


HEADER = (
    "| what | tokens | output: median | largest | update: median | 99th percentile | largest | "
    f"above {EXACT:g} | above {FLIPPED:g} |\n|---|---|---|---|---|---|---|---|---|"
)


def errors(states: Sequence[NDArray[np.float32]], outputs: Sequence[NDArray[np.float32]]) -> list[BlockErrors]:
    """Of every block: outputs [L, T, D] against PyTorch's `hidden_states` [L + 1, T, D], window by window."""
    pairs = list(zip(states, outputs, strict=True))
    return [
        BlockErrors.together([BlockErrors.between(found[i], seen[i + 1], seen[i]) for seen, found in pairs])
        for i in range(len(outputs[0]))
    ]


def engine_errors(model: CausalLM, states: Sequence[NDArray[np.float32]]) -> list[BlockErrors]:
    """The engine's errors of every block, on windows of PyTorch's `hidden_states`."""
    found: list[BlockErrors] = []
    for index in range(len(model.blocks)):
        # One at a time: all blocks packed at once would be a second model in memory.
        probe = BlockProbe(model, index)
        parts = [BlockErrors.between(probe.output(seen[index]), seen[index + 1], seen[index]) for seen in states]
        found.append(BlockErrors.together(parts))
    return found


def rows(label: str, blocks: Sequence[BlockErrors]) -> list[str]:
    """Rows of all blocks together and of the one whose update has the largest mean error."""
    worst = max(range(len(blocks)), key=lambda index: float(np.mean(blocks[index].update)))
    return [
        BlockErrors.together(blocks).row(f"{label}, all {len(blocks)} blocks"),
        blocks[worst].row(f"{label}, worst block (number {worst})"),
    ]
