"""Cross-entropy and KL from hidden states: our chunked pass against dense logits, and against Liger's chunked loss.

    uv run --with liger-kernel==0.8.5 python -m benchmark.losses                                # 1024 rows x 49,152 words
    uv run --with liger-kernel==0.8.5 python -m benchmark.losses --rows 512 --vocabulary 151936
    uv run python -m benchmark.losses --dtype float32 --rows 512

Each variant multiplies both heads, takes mean cross-entropy + mean KL at temperature 5, and the gradients of the hidden
states and of the student's head. Parameters are float32, products in the dtype. Peak: what the allocator holds at once
beyond the inputs, gradients included. Error: of both gradients, against dense logits in float32. Liger weighs a KL whose
teacher it runs itself in the same way; its head's gradient is bfloat16.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional

from benchmark.peers import installed
from benchmark.timing import Variant, comparison
from wrinklefree.distillation.head_losses import SoftTargets, head_losses
from wrinklefree.utils.allocator import keep_large_buffers

TEMPERATURE = 5.0


class Case:
    """Random states and heads; the student's are leaves."""

    def __init__(self, rows: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator) * std

        # Logits of a trained model spread over about 3.
        self.head = normal(vocabulary, hidden, std=3 / hidden**0.5).requires_grad_()
        self.teacher_head = (self.head.detach() + normal(vocabulary, hidden, std=1 / hidden**0.5)).requires_grad_(False)
        states = normal(rows, hidden)
        self.hidden = states.to(dtype).requires_grad_()
        self.teacher_hidden = (states + 0.3 * normal(rows, hidden)).to(dtype)
        self.labels = torch.randint(0, vocabulary, (rows,), generator=generator)
        self.rows, self.dtype = rows, dtype
        self.leaves = (self.hidden, self.head)

    def autocast(self) -> torch.autocast:
        """As in training."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def dense(self) -> None:
        """Logits of all rows; what most trainers do."""
        with self.autocast():
            logits = functional.linear(self.hidden, self.head)
            with torch.no_grad():
                teacher = functional.linear(self.teacher_hidden, self.teacher_head)
            hard = functional.cross_entropy(logits.float(), self.labels)
            soft = functional.kl_div(
                functional.log_softmax(logits.float() / TEMPERATURE, -1),
                functional.log_softmax(teacher.float() / TEMPERATURE, -1),
                reduction="batchmean",
                log_target=True,
            )
        (hard + soft).backward()

    def ours(self) -> None:
        """One chunked pass."""
        counted = torch.ones(self.rows, dtype=torch.bool)
        with self.autocast():
            soft = SoftTargets(self.teacher_hidden, self.teacher_head, counted, TEMPERATURE, t_squared=False)
            share = 1 / self.rows
            losses = head_losses(
                self.hidden, self.head, self.labels, soft=soft, cross_entropy_factor=share, divergence_factor=share
            )
        losses.total.backward()

    def liger(self) -> None:
        """Liger's fused linear JSD with beta 0, which is the KL from teacher to student."""
        loss = import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
            weight_hard_loss=1.0, weight_soft_loss=1.0, beta=0.0, temperature=TEMPERATURE, compiled=False,
            chunk_size=128,
        )  # fmt: skip
        total = loss(
            self.hidden, self.head.to(self.dtype), self.teacher_hidden, self.teacher_head.to(self.dtype), self.labels
        )
        total.backward()

    def reference(self) -> list[Tensor]:
        """Gradients of `dense` in float32, of the same (rounded) hidden states."""
        hidden = self.hidden.detach().float().requires_grad_()
        exact = Case.__new__(Case)
        exact.__dict__.update(self.__dict__, hidden=hidden, leaves=(hidden, self.head), dtype=torch.float32)
        exact.teacher_hidden = self.teacher_hidden.float()
        return Variant(exact.dense, exact.leaves).gradients()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.losses", description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    keep_large_buffers()
    case = Case(arguments.rows, arguments.hidden, arguments.vocabulary, getattr(torch, arguments.dtype))
    variants = {"dense": Variant(case.dense, case.leaves), "WrinkleFree": Variant(case.ours, case.leaves)}
    version = installed("liger-kernel")
    if version is not None:
        variants[f"Liger {version}"] = Variant(case.liger, case.leaves)
    sys.stdout.write(
        f"CE + KL, {arguments.rows} rows x {arguments.vocabulary} words, width {arguments.hidden}, {arguments.dtype}, "
        f"{arguments.threads} thread(s), torch {torch.__version__}\n\n"
        + comparison(variants, arguments.rounds, case.reference())
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
