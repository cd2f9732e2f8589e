"""What rounding the backward products costs: relative errors of both gradients of every kind of projection.

    uv run python -m benchmark.gradient_errors                              # four blocks of SmolLM2-135M's shape, random
    uv run python -m benchmark.gradient_errors --artifact outputs/checkpoint-final --tokens 256   # a trained ternary model

One exact step of the model gives each layer the gradient of its output. From it both products of `backward_products` are made
in every kind, and compared with the exact ones: norm of the difference over norm, over all layers of the name. So these
are a layer's own errors, without those that arrive from the layers above; the error of a whole step is in `benchmark.step`.

The last column is the projection of a kind's gradient of the weight on the exact one: 1 where rounding only adds noise.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmark.step import Step, random_batch, smollm2_shape
from benchmark.timing import relative_error
from wrinklefree.models.artifact import read_artifact
from wrinklefree.models.bitlinear import BitLinear, set_quantization
from wrinklefree.models.byte_products import grad_input, grad_weight
from wrinklefree.models.config import BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.quantization.options import BackwardProducts

KINDS: tuple[BackwardProducts, ...] = get_args(BackwardProducts)


@dataclass(frozen=True)
class Seen:
    """What one layer's backward pass multiplies."""

    layer: BitLinear
    input: Tensor
    grad: Tensor
    """Of the layer's output."""


def watch(model: CausalLM, batch: Batch) -> dict[str, list[Seen]]:
    """Projection name -> what its layers met in one exact step, last block first."""
    seen: dict[str, list[Seen]] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(layer: BitLinear, inputs: tuple[Any, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda grad: seen.setdefault(name, []).append(Seen(layer, x, grad.detach().clone())))

        return keep

    handles = [
        module.register_forward_hook(hook(name.rpartition(".")[2]))
        for name, module in model.named_modules()
        if isinstance(module, BitLinear)
    ]
    Step(model, [batch], torch.float32)()
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def both_gradients(seen: Seen, kind: BackwardProducts) -> tuple[Tensor, Tensor]:
    """(of the input, of the weight), in float32."""
    weight = seen.layer.ternary_weight(torch.float32)
    codes = seen.layer.encode_input(seen.input)
    x_codes, x_scale = (seen.input, None) if codes is None else (codes.codes, codes.scale)
    of_x = grad_input(seen.grad, weight, dtype=torch.float32, kind=kind)
    return of_x, grad_weight(seen.grad, x_codes, x_scale, dtype=torch.float32, kind=kind)


def projection(mine: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """<mine, exact> / <exact, exact>, over all tensors together."""
    pairs = list(zip(mine, exact, strict=True))
    return sum(float((a.double() * b.double()).sum()) for a, b in pairs) / sum(
        float(b.double().square().sum()) for _, b in pairs
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.gradient_errors", description=__doc__)
    parser.add_argument("--artifact", type=Path, help="a ternary model's folder; without it, random weights")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.artifact is None:
        spec = BitNetSpec(placement="output", gain="ones", quantization_lambda=1.0)
        model = CausalLM(smollm2_shape(arguments.layers), spec)
    else:
        model = read_artifact(arguments.artifact, expect_bitnet=True).load_model()
    set_quantization(model, 1.0)
    seen = watch(model, random_batch(arguments.tokens, model.architecture.vocab_size))
    out = sys.stdout.write
    out(
        f"torch {torch.__version__}, float32, {len(model.blocks)} blocks, width {model.architecture.hidden_size}, "
        f"{arguments.tokens} tokens\n\n"
        "| projection | kind | error of grad_x | error of grad_weight | projection of grad_weight |\n|---|---|---|---|---|\n"
    )
    for name, layers in seen.items():
        exact = [both_gradients(layer, "exact") for layer in layers]
        for kind in KINDS[1:]:
            mine = [both_gradients(layer, kind) for layer in layers]
            of_x = relative_error([x for x, _ in mine], [x for x, _ in exact])
            weights, exact_weights = [w for _, w in mine], [w for _, w in exact]
            out(
                f"| {name} | {kind} | {of_x:.1e} | {relative_error(weights, exact_weights):.1e} | "
                f"{projection(weights, exact_weights):.5f} |\n"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
