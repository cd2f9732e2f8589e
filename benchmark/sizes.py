"""Cost against size: time a token of a training step's blocks, and its share of the machine's own peak.

    uv run python -m benchmark.sizes                              # widths 256 to 2048, rows of 256 to 4096 positions
    uv run python -m benchmark.sizes --dtype float32 --plot docs/images/step_cost.png

Two blocks, uncompiled, one row of one document, products in bfloat16 or in `--dtype`; forward and backward without head or
optimizer.
Operations are those of the products (6 a weight and token) and of causal attention (6 d a token and pair of positions, of
which half are computed). Peak: the best rate of square products measured here at the start.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmark.peers import plain
from benchmark.step import random_batch, smollm2_shape
from benchmark.timing import interleaved
from wrinklefree.models.bitlinear import set_quantization
from wrinklefree.models.config import BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.training.device import Compute, measured_flops_per_second
from wrinklefree.training.plots import Curve, Panel, draw_curves
from wrinklefree.utils.allocator import keep_large_buffers

LAYERS = 2
WORDS = 512
OURS = "WrinkleFree"
LINEAR = "nn.Linear"


def operations_per_token(model: CausalLM, length: int) -> float:
    """Of the blocks' forward and backward pass."""
    weights = sum(p.numel() for block in model.blocks for p in block.parameters() if p.dim() == 2)
    heads = model.architecture.num_attention_heads * model.architecture.head_dim
    # Two products of T x T scores forward and four backward, two operations each, half of the pairs.
    return 6 * weights + LAYERS * 6 * heads * length


def step(model: CausalLM, batch: Batch, dtype: torch.dtype) -> None:
    """Forward and backward of the blocks; weight codes are made anew."""
    model.zero_grad(set_to_none=True)
    set_quantization(model, 1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden = model(batch).hidden
    (hidden.float().square().sum() / hidden.numel()).backward()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.sizes", description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 576, 1024, 2048])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    keep_large_buffers()
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    peak = measured_flops_per_second(Compute(torch.device("cpu"), dtype))
    out = sys.stdout.write
    out(
        f"{LAYERS} blocks, {arguments.dtype}, {arguments.threads} thread(s), torch {torch.__version__}, measured peak "
        f"{peak / 1e9:.0f} GFLOP/s\n\n"
        "| width | positions | nn.Linear, us a token | WrinkleFree, us a token | ratio | share of the peak |\n"
        "|---|---|---|---|---|---|\n"
    )
    curves: dict[int, tuple[list[float], list[float]]] = {length: ([], []) for length in arguments.lengths}
    for width in arguments.widths:
        torch.manual_seed(0)
        spec = BitNetSpec(placement="output", gain="ones", quantization_lambda=1.0)
        ours = CausalLM(smollm2_shape(LAYERS, hidden=width, vocabulary=WORDS), spec)
        full = plain(ours)
        for length in arguments.lengths:
            batch = random_batch(length, WORDS)
            times = interleaved(
                {LINEAR: lambda m=full, b=batch: step(m, b, dtype), OURS: lambda m=ours, b=batch: step(m, b, dtype)},
                arguments.rounds,
            )
            mine = times[OURS].cpu / length
            share = operations_per_token(ours, length) / (mine * peak)
            curves[length][0].append(mine * 1e6)
            curves[length][1].append(100 * share)
            out(
                f"| {width} | {length} | {times[LINEAR].cpu / length * 1e6:.1f} | {mine * 1e6:.1f} | "
                f"{times[OURS].cpu / times[LINEAR].cpu:.3f} | {share:.1%} |\n"
            )
            sys.stdout.flush()
    if arguments.plot is not None:
        widths = [float(width) for width in arguments.widths]
        panels = [
            Panel(
                label,
                [Curve(f"{t} positions", widths, curves[t][index]) for t in arguments.lengths],
                True,
                log=not index,
            )
            for index, label in enumerate(("us a token, two blocks", "% of the measured peak"))
        ]
        draw_curves(arguments.plot, panels, title="Cost of a training step against size, one core", x_label="width")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
