"""Per-sample gradients of linear layers, projected to a few floats a layer, from one batched backward pass.

The weight gradient of a linear layer for one sample is sum_t delta_t x_t^T, with x_t the layer's input and delta_t the
gradient of its output at position t. With two random matrices P and Q of size k, P (sum_t delta_t x_t^T) Q^T equals
sum_t (P delta_t)(Q x_t)^T: only [B, T, k] tensors are ever multiplied, and a sample costs k x k floats a layer. Inner
products of projected gradients are unbiased estimates of those of the gradients (random signs over sqrt(k)); a side
that is no longer than k is kept as it is, so small layers are exact.

Layers are tapped: a forward hook passes the output through an autograd function whose backward sees delta. The pass
asks autograd for the gradient of a scalar that every tap depends on, so no parameter's `.grad` is written, weight
gradients are not accumulated, and a sharded weight is never needed. Works for subclasses of `nn.Linear` with their own
autograd functions, for layers that share an input, for a layer that is called twice, and under non-reentrant activation
checkpointing. Reentrant checkpointing forbids `torch.autograd.grad`; it is left out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cheapertraining.errors import CheaperTrainingError
from cheapertraining.state import preserved_training_state

PerSampleLoss = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
"""`loss(model, batch) -> (sums, counts)`: for each row of the batch, [B], the sum of its losses (differentiable) and how
many targets it sums over. It moves the batch to the device and opens autocast as the training step does."""

LayerFilter = Callable[[str, nn.Linear], bool]
"""`choose(name, module) -> bool`."""

LayerInput = Callable[[nn.Linear, Tensor], Tensor]
"""`see(module, input) -> input as the weight multiplies it`, of the same shape."""


@dataclass(frozen=True)
class Layer:
    """One tapped layer and where its gradient lies in a flat vector."""

    name: str
    module: nn.Linear
    rows: int
    """Length of the projected output side: min(k, out_features)."""
    columns: int
    """Length of the projected input side: min(k, in_features)."""
    start: int

    @property
    def span(self) -> slice:
        """Entries of a flat projected gradient that belong to this layer."""
        return slice(self.start, self.start + self.rows * self.columns)


def choose_layers(model: nn.Module, size: int, choose: LayerFilter | None = None) -> tuple[Layer, ...]:
    """The layers to tap, in the model's order.

    Without a filter: every `nn.Linear` with a trainable weight, except output heads, which are recognised by having as
    many outputs as an embedding has rows (their gradients are large, noisy, and often computed without a module call).

    Raises:
        CheaperTrainingError: when no layer is left.
    """
    vocabularies = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}

    def is_inner(_: str, module: nn.Linear) -> bool:
        return module.weight.requires_grad and module.out_features not in vocabularies

    accept = choose or is_inner
    layers: list[Layer] = []
    start = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and accept(name, module):
            layer = Layer(name, module, min(size, module.out_features), min(size, module.in_features), start)
            layers.append(layer)
            start = layer.span.stop
    if not layers:
        raise CheaperTrainingError(
            "no linear layer to take gradients of: the model has no trainable nn.Linear that the filter accepts"
        )
    return tuple(layers)


class _Tap(torch.autograd.Function):
    """The identity; its backward hands the gradient and the projected input to `record`.

    `anchor` is a scalar that every tap depends on, so that autograd visits all of them. The output is a copy, because a
    caller may write into it in place.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, inputs: Tensor, record: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        """`inputs` is [B, T, columns]."""
        ctx.save_for_backward(inputs)
        ctx.record = record
        ctx.anchor_options = {"dtype": anchor.dtype, "device": anchor.device}
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient goes on unchanged; the anchor's is zero."""
        (inputs,) = ctx.saved_tensors
        ctx.record(grads[0], inputs)
        return grads[0], torch.zeros((), **ctx.anchor_options), None, None


class GradientProjector:
    """Projected per-sample gradients of a model's linear layers.

    Args:
        model: The module that the loss calls. Hooks are in place only while gradients are taken.
        size: k. A layer of at least k inputs and outputs costs k * k floats a gradient.
        choose: Which layers; by default all but output heads (`choose_layers`).
        seed: Of the random matrices.
        layer_input: For a layer that transforms its input before the weight sees it (a norm, a rounding): returns the
            input as the weight multiplies it. Without it the input of the module is taken.

    Raises:
        CheaperTrainingError: when there is no layer to tap, or `size` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        size: int = 32,
        choose: LayerFilter | None = None,
        seed: int = 0,
        layer_input: LayerInput | None = None,
    ) -> None:
        if size < 1:
            raise CheaperTrainingError(f"projection size {size}: it must be at least 1")
        self.model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.size = size
        self.layers = choose_layers(self.model, size, choose)
        self._seed = seed
        self._layer_input = layer_input
        self._number = 0
        self._signs: dict[tuple[int, torch.device], tuple[Tensor | None, Tensor | None]] = {}

    @property
    def width(self) -> int:
        """Floats of one projected gradient."""
        return self.layers[-1].span.stop

    @property
    def spans(self) -> tuple[slice, ...]:
        """For each layer, its entries of a flat projected gradient."""
        return tuple(layer.span for layer in self.layers)

    def cache_bytes(self, gradients: int) -> int:
        """Bytes that `gradients` projected gradients (float32) and the random signs (int8) take together."""
        signs = sum(
            self.size * side
            for layer in self.layers
            for side in (layer.module.in_features, layer.module.out_features)
            if side > self.size
        )
        return 4 * self.width * gradients + signs

    def redraw(self, number: int) -> None:
        """Use the random matrices that belong to `number`: equal on every rank, independent between numbers.

        Gradients may be compared only under the same number. A new one for every update keeps the error of a projection
        from pushing a source the same way each time.
        """
        if number != self._number:
            self._number = number
            self._signs.clear()

    def per_sample(self, batch: Any, loss: PerSampleLoss) -> tuple[Tensor, Tensor]:
        """Projected gradients [B, width] (float32) of each row's summed loss, and the rows' target counts [B].

        `.grad`, random states and train/eval flags are afterwards as before; the model runs in eval mode, so that
        dropout adds no noise.

        Raises:
            CheaperTrainingError: when the loss does not return one sum and count a row, or a layer's input does not
                have the batch as its first dimension.
        """
        with preserved_training_state(self.model), torch.enable_grad():
            self.model.eval()
            return self._tapped_pass(batch, loss)

    def _tapped_pass(self, batch: Any, loss: PerSampleLoss) -> tuple[Tensor, Tensor]:
        anchor: dict[torch.device, Tensor] = {}
        gradients: list[Tensor] = []
        handles = [
            layer.module.register_forward_hook(self._tap(index, anchor, gradients), with_kwargs=True)
            for index, layer in enumerate(self.layers)
        ]
        try:
            sums, counts = loss(self.model, batch)
            _check_loss(sums, counts)
            if not anchor:
                raise CheaperTrainingError(
                    f"the loss called none of the {len(self.layers)} layers (first: {self.layers[0].name}); let it "
                    "call the module that the projector was built with"
                )
            gradients.append(torch.zeros(len(sums), self.width, device=sums.device))
            torch.autograd.grad(sums.sum(), list(anchor.values()), allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        return gradients[0], counts.detach()

    def _tap(self, index: int, anchors: dict[torch.device, Tensor], gradients: list[Tensor]) -> Callable[..., Any]:
        layer = self.layers[index]

        def record(grad: Tensor, inputs: Tensor) -> None:
            deltas = self._project(grad, index, side=0)
            destination = gradients[0]
            if len(deltas) != len(destination):
                raise CheaperTrainingError(
                    f"layer {layer.name} saw {len(deltas)} rows in a batch of {len(destination)}: its first dimension "
                    "must be the batch's; leave the layer out with `choose`"
                )
            product = torch.bmm(deltas.transpose(1, 2), inputs).flatten(1)
            destination[:, layer.span] += product.to(destination.device)

        def hook(module: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            x: Tensor = args[0] if args else kwargs["input"]
            if output.device not in anchors:
                anchors[output.device] = torch.zeros((), device=output.device, requires_grad=True)
            with torch.no_grad():
                seen = x if self._layer_input is None else self._layer_input(module, x)
                inputs = self._project(seen.detach(), index, side=1)
            tapped: Tensor = _Tap.apply(output, anchors[output.device], inputs, record)  # pyright: ignore[reportAssignmentType]
            return tapped

        return hook

    def _project(self, values: Tensor, index: int, *, side: int) -> Tensor:
        """[B, ..., features] to [B, T, rows or columns] in float32; `side` 0 is the output's, 1 the input's."""
        flat = values.flatten(1, -2) if values.ndim > 2 else values.unsqueeze(1)
        signs = self._matrices(index, values.device)[side]
        if signs is None:
            return flat.float()
        with torch.autocast(values.device.type, enabled=False):
            return (flat @ signs.to(flat.dtype)).float().mul_(1 / math.sqrt(self.size))

    def _matrices(self, index: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Random signs [features, k], int8, of a layer's output and input side; None for a side that is kept."""
        key = (index, device)
        if key not in self._signs:
            module = self.layers[index].module
            # Drawn on the CPU: the same on every rank and device. Own generator: the global one is the training's.
            generator = torch.Generator().manual_seed(_mix(self._seed, self._number, index))
            self._signs[key] = (
                self._draw(module.out_features, generator, device),
                self._draw(module.in_features, generator, device),
            )
        return self._signs[key]

    def _draw(self, features: int, generator: torch.Generator, device: torch.device) -> Tensor | None:
        if features <= self.size:
            return None
        bits = torch.randint(0, 2, (features, self.size), generator=generator, dtype=torch.int8)
        return (2 * bits - 1).to(device)


def group_means(gradients: Sequence[Tensor], counts: Sequence[Tensor], groups: int) -> Tensor:
    """[groups, width]: rows in order dealt into groups of nearly equal size; each the gradient of its mean loss.

    The mean is over targets: a group's summed gradient over its summed counts.

    Raises:
        CheaperTrainingError: with fewer rows than groups, or a group without a target.
    """
    rows, targets = torch.cat(list(gradients)), torch.cat(list(counts)).to(torch.float32)
    if len(rows) < groups:
        raise CheaperTrainingError(
            f"{len(rows)} rows do not fill {groups} groups; draw more rows or ask for fewer groups"
        )
    means = []
    for part, part_targets in zip(rows.tensor_split(groups), targets.tensor_split(groups), strict=True):
        total = float(part_targets.sum())
        if total <= 0:
            raise CheaperTrainingError(f"a group of {len(part)} rows has no target; draw rows that hold targets")
        means.append(part.sum(0) / total)
    return torch.stack(means)


def _check_loss(sums: Tensor, counts: Tensor) -> None:
    if sums.ndim != 1 or sums.shape != counts.shape:
        raise CheaperTrainingError(
            f"the loss returned sums {list(sums.shape)} and counts {list(counts.shape)}: return one of each a row, [B]"
        )
    if not sums.requires_grad:
        raise CheaperTrainingError("the loss returned sums without a gradient: do not detach them, nor use no_grad")


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers (the finaliser of SplitMix64, chained)."""
    mask = (1 << 64) - 1
    value = 0
    for number in numbers:
        value = (value + number + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return value >> 1
