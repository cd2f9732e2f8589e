"""How many bytes two processes gather in a step: ternary weights as codes, in float32, and a plain model in bfloat16.

    uv run python -m benchmark.gathered_bytes

Every all-gather of one training step (forward and backward pass) is counted as it is issued, on two processes over gloo.
The bar: the BitLinear weights of a step at most 1/7 of their bfloat16 size. The whole model, with norms, embedding and
head, stands beside it: those travel in float32, so a small model with a large vocabulary gains less.
"""

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed
from torch import Tensor

from benchmark.sharded_equality import Bed, Ranks, build
from wrinklefree.models.config import Architecture
from wrinklefree.training.config import DistributedConfig

ARCHITECTURE = Architecture(
    family="llama",
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Gathered:
    """Bytes that arrive at one process in one step."""

    blocks: int
    """Of the groups that hold a block: its matrices and its norms."""
    outside: int
    """Embedding, head, final norm."""
    matrices: int
    """Weights of the linear layers inside the blocks: their number, not bytes."""
    norms: int
    """Other parameters inside the blocks."""


def measure(bed: Bed) -> Gathered:
    """The second step of a bed on this rank, so that nothing of the first use is counted."""
    sizes: list[int] = []
    distributed: Any = torch.distributed
    original = distributed.all_gather_single

    def counted(*arguments: Any, **named: Any) -> Any:
        output: Tensor = named["output"] if "output" in named else arguments[0]
        sizes.append(output.numel() * output.element_size())
        return original(*arguments, **named)

    trainer, _ = build(bed)
    matrices = sum(p.numel() for block in trainer.model.blocks for p in block.parameters() if p.ndim == 2)
    norms = sum(p.numel() for block in trainer.model.blocks for p in block.parameters() if p.ndim == 1)
    trainer.train_step()
    distributed.all_gather_single = counted
    try:
        trainer.train_step()
    finally:
        distributed.all_gather_single = original
    blocks = len(trainer.model.blocks)
    # The outermost group is gathered once, first; each block twice: it is given back after the forward pass.
    if len(sizes) != 1 + 2 * blocks:
        raise RuntimeError(f"{len(sizes)} all-gathers in a step of {blocks} blocks")
    return Gathered(sum(sizes[1:]), sizes[0], matrices, norms)


def compare(ranks: Ranks, architecture: Architecture = ARCHITECTURE) -> dict[str, Gathered]:
    """Codes, float32 and bfloat16, by name."""
    plain = Bed(stage="fp_pretrain", steps=2, warmup=False, bfloat16=True, architecture=architecture)
    ternary = replace(plain, stage="stage2")
    full = replace(ternary, distributed=DistributedConfig(name="bed", strategy="fsdp", gather="full"))
    beds = {"codes": ternary, "float32": full, "bfloat16": plain}
    return {name: ranks.run(2, measure, bed)[0] for name, bed in beds.items()}


def matrix_bytes(gathered: Gathered) -> int:
    """Bytes of the linear layers' weights, gathered twice a step; norms travel beside them in float32."""
    return gathered.blocks - 2 * 4 * gathered.norms


def main() -> int:
    """Print the table; 1 when the codes miss the bar."""
    ranks = Ranks(2)
    try:
        results = compare(ranks)
    finally:
        ranks.close()
    base = results["bfloat16"]
    lines = [f"{'gathered as':12} {'linear weights':>16} {'of bfloat16':>12} {'whole model':>14} {'of bfloat16':>12}"]
    for name, result in results.items():
        total = result.blocks + result.outside
        share = matrix_bytes(result) / matrix_bytes(base)
        lines.append(
            f"{name:12} {matrix_bytes(result):>16,} {share:>12.4f} {total:>14,} "
            f"{total / (base.blocks + base.outside):>12.4f}"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if 7 * matrix_bytes(results["codes"]) <= matrix_bytes(base) else 1


if __name__ == "__main__":
    # Under its own name: the processes of the pool must find what is sent to them.
    from benchmark.gathered_bytes import main as run

    sys.exit(run())
