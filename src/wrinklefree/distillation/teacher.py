"""The frozen model that a student is compared with."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wrinklefree.models.records import Batch, ModelOutput, Wants


class Teacher:
    """A model in eval mode, without gradients, outside the optimizer; optionally on the CPU between steps.

    Not an `nn.Module`, so that no student can adopt its parameters. It runs under the caller's autocast. `no_grad`
    rather than `inference_mode`: the logit lens differentiates through the teacher's norm, and inference tensors may
    not be saved for a backward pass.
    """

    def __init__(
        self, model: nn.Module, *, offload: bool = False, on_release: Callable[[], None] | None = None
    ) -> None:
        """Freeze `model`, called as `model(batch, wants) -> ModelOutput`.

        Args:
            model: The teacher; its parameters lose `requires_grad`.
            offload: Keep the weights in (pinned) CPU memory. The blocks (`model.blocks`) are on the batch's device
                during a forward pass only, so each call sends them; the rest, of which losses read the head, stays
                there from the first call of a step to `release`.
            on_release: Called by `release`.
        """
        self.model = model.eval().requires_grad_(False)
        self.offload = offload
        self._on_release = on_release
        self._blocks: list[tuple[Tensor, Tensor]] = []
        self._rest: list[tuple[Tensor, Tensor]] = []
        if offload:
            model.to("cpu")
            blocks = getattr(model, "blocks", None)
            of_blocks: set[int] = (
                {id(tensor) for tensor in _tensors(blocks)} if isinstance(blocks, nn.Module) else set()
            )
            pin = torch.cuda.is_available()
            for tensor in _tensors(model):
                host = tensor.data.pin_memory() if pin else tensor.data
                (self._blocks if id(tensor) in of_blocks else self._rest).append((tensor, host))
            self.release()

    @torch.no_grad()
    def __call__(self, batch: Batch, wants: Wants) -> ModelOutput:
        """The teacher's forward pass; every tensor of the result is without gradient."""
        device = batch.input_ids.device
        _send(self._rest, device)
        _send(self._blocks, device)
        self.model.eval()
        output: ModelOutput = self.model(batch, wants)
        _return(self._blocks)
        return output

    def release(self) -> None:
        """Give the device memory back (with `offload`); call it when a step's micro-batches are done."""
        _return(self._blocks)
        _return(self._rest)
        if self._on_release is not None:
            self._on_release()


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _send(pairs: list[tuple[Tensor, Tensor]], device: torch.device) -> None:
    """Copy weights that are at home to the device."""
    for tensor, host in pairs:
        if tensor.data_ptr() == host.data_ptr():
            tensor.data = host.to(device, non_blocking=True)


def _return(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Let go of the device's copies. Nothing is copied: a frozen teacher's CPU weights are still its weights."""
    for tensor, host in pairs:
        tensor.data = host
