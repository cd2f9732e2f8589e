"""What an update costs, in training steps, and what that is at an interval.

A two-block model of SmolLM2-135M's width (576) is trained on random bytes; a step is forward, backward and AdamW. An
update runs forward and an activation-only backward over all sources' and probes' rows, then scores.

    python -m benchmarks.overhead
"""

import argparse
import statistics
import sys
import time

import torch

from benchmarks.texts import LENGTH, ByteLM, row_loss
from cheapertraining import DataInfCalculator, Probe


def main() -> None:
    """Measure and print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-rows", type=int, default=32, help="rows of a training step")
    parser.add_argument("--sources", type=int, default=4)
    parser.add_argument("--rows", type=int, default=32, help="rows scored of each source and of each probe")
    parser.add_argument("--interval", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ByteLM(width=576)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def draw(rows: int) -> torch.Tensor:
        return torch.randint(0, 128, (rows, LENGTH + 1))

    def step() -> None:
        sums, counts = row_loss(model, draw(arguments.step_rows))
        (sums.sum() / counts.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    calculator = DataInfCalculator(model, row_loss)
    sources = {str(number): lambda update: [draw(arguments.rows)] for number in range(arguments.sources)}
    probes = {"probe": Probe(lambda update: [draw(arguments.rows)])}
    step()
    steps: list[float] = []
    updates: list[float] = []
    # In turn, so that a busy machine slows both alike. The first update also draws the matrices, as every update does.
    for number in range(arguments.repeats):
        began = time.perf_counter()
        step()
        middle = time.perf_counter()
        calculator.scores(sources, probes, update=number)
        steps.append(middle - began)
        updates.append(time.perf_counter() - middle)
    one_step, update = statistics.median(steps), statistics.median(updates)
    rows = (arguments.sources + 1) * arguments.rows
    per_row = (update / rows) / (one_step / arguments.step_rows)
    sys.stdout.write(
        "| rows a step | rows an update | step (s) | update (s) | update in steps | scored row / trained row | "
        f"overhead every {arguments.interval} steps |\n|---|---|---|---|---|---|---|\n"
        f"| {arguments.step_rows} | {rows} | {one_step:.2f} | {update:.2f} | {update / one_step:.1f} | {per_row:.2f} | "
        f"{100 * update / one_step / arguments.interval:.2f}% |\n"
    )


if __name__ == "__main__":
    main()
