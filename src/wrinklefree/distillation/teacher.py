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
            offload: Keep the weights in (pinned) CPU memory and on the batch's device only from the first call of a
                step to `release`.
            on_release: Called by `release`.
        """
        self.model = model.eval().requires_grad_(False)
        self.offload = offload
        self._on_release = on_release
        self._resident: torch.device | None = None
        self._host: list[tuple[Tensor, Tensor]] = []
        if offload:
            model.to("cpu")
            tensors = [*model.parameters(), *model.buffers()]
            pin = torch.cuda.is_available()
            self._host = [(tensor, tensor.data.pin_memory() if pin else tensor.data) for tensor in tensors]
            self.release()

    @torch.no_grad()
    def __call__(self, batch: Batch, wants: Wants) -> ModelOutput:
        """The teacher's forward pass; every tensor of the result is without gradient."""
        if self.offload:
            self._load(batch.input_ids.device)
        self.model.eval()
        output: ModelOutput = self.model(batch, wants)
        return output

    def release(self) -> None:
        """Give the device memory back (with `offload`); call it when a step's micro-batches are done.

        Nothing is copied: a frozen teacher's CPU weights are still its weights.
        """
        for tensor, host in self._host:
            tensor.data = host
        self._resident = None
        if self._on_release is not None:
            self._on_release()

    def _load(self, device: torch.device) -> None:
        if self._resident == device:
            return
        for tensor, host in self._host:
            tensor.data = host.to(device, non_blocking=True)
        self._resident = device
