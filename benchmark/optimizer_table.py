"""What each optimizer holds and costs: bytes of state a parameter, and the time of its update.

    uv run python -m benchmark.optimizer_table
    uv run python -m benchmark.optimizer_table --layers 30 --vocabulary 49152      # SmolLM2-135M, needs 4 GB

A SmolLM2-135M of few blocks with random gradients. Updates run by turns in one process; the smallest processor time counts. The
last column divides it by that of a forward and backward pass of this model over 1,024 tokens, which is what an update comes
on top of: in bfloat16, or in float32 on a CPU that does not multiply bfloat16, as in training. What each optimizer reaches at
equal tokens: `scripts/run_study.py study=optimizers_tiny`.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

import torch

from benchmark.step import random_batch, smollm2_shape
from benchmark.timing import interleaved
from wrinklefree.models.config import BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.training.config import OptimizerConfig
from wrinklefree.training.device import multiplies_bfloat16
from wrinklefree.training.optimizers import OptimizerType, build_optimizer, state_bytes_per_parameter

TOKENS = 1024
RATE = 1e-5


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.optimizer_table", description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    spec = BitNetSpec(placement="output", gain="ones", quantization_lambda=1.0)
    model = CausalLM(smollm2_shape(options.layers, vocabulary=options.vocabulary), spec)
    batch = random_batch(TOKENS, options.vocabulary)
    has_bfloat16 = multiplies_bfloat16(torch.device("cpu"))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16):
            hidden = model(batch).hidden
        (hidden.float().square().sum() / hidden.numel()).backward()

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step()
    step_seconds = interleaved({"step": step}, options.rounds)["step"].cpu
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    names: tuple[OptimizerType, ...] = get_args(OptimizerType)
    optimizers = {name: build_optimizer(model, name, OptimizerConfig(rank=256), RATE) for name in names}
    times = interleaved({name: optimizer.step for name, optimizer in optimizers.items()}, options.rounds)
    count = sum(parameter.numel() for parameter in parameters)
    sys.stdout.write(
        f"{count / 1e6:.1f} million parameters, {options.threads} thread(s), torch {torch.__version__}\n\n"
        "| optimizer | state, bytes a parameter | update / AdamW's | update / forward and backward of 1,024 tokens |\n"
        "|---|---|---|---|\n"
    )
    for name in names:
        state = state_bytes_per_parameter(optimizers[name])
        mine = times[name].cpu
        ratios = f"{mine / times['adamw'].cpu:.2f} | {mine / step_seconds:.2f}"
        sys.stdout.write(f"| {name} | {state:.2f} | {ratios} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
