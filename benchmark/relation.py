"""The relation loss of Q, K and V: our row-streamed pass against dense relations under autograd.

    uv run python -m benchmark.relation                      # one row of 2048 positions, 9 relation heads of width 64
    uv run python -m benchmark.relation --documents 7        # packed: relations within seven documents

float32, as in training; the sum over Q, K and V of KL(teacher || student) over rows, and the gradients of the student's
states. The dense form holds heads x T x T of everything. Error: against the dense form in float64.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmark.attention import packed_documents
from benchmark.timing import Variant, comparison
from wrinklefree.distillation.unit_relations import unit_relation_divergence
from wrinklefree.utils.allocator import keep_large_buffers


def dense_divergence(student: Tensor, teacher: Tensor, documents: Tensor) -> Tensor:
    """Sum over rows and heads of KL(teacher || student) of the relations of states [B, H, T, width]."""
    allowed = (documents[:, :, None] == documents[:, None, :])[:, None]

    def log_relation(states: Tensor) -> Tensor:
        return functional.log_softmax((states @ states.mT).masked_fill(~allowed, -1e30), dim=-1)

    return functional.kl_div(log_relation(student), log_relation(teacher), reduction="sum", log_target=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.relation", description=__doc__)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    keep_large_buffers()
    generator = torch.Generator().manual_seed(0)
    shape = (1, arguments.heads, arguments.length, arguments.width)
    students = [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]
    teachers = [state.detach() + 0.5 * torch.randn(shape, generator=generator) for state in students]
    documents = packed_documents(arguments.length, arguments.documents)
    share = 1 / (arguments.heads * arguments.length)

    def ours() -> None:
        total = torch.zeros(())
        for student, teacher in zip(students, teachers, strict=True):
            total = total + unit_relation_divergence(student, teacher, documents)
        (total * share).backward()

    def dense(states: Sequence[Tensor] = students, others: Sequence[Tensor] = teachers) -> None:
        total = torch.zeros((), dtype=states[0].dtype)
        for student, teacher in zip(states, others, strict=True):
            left, right = functional.normalize(student, dim=-1), functional.normalize(teacher, dim=-1)
            total = total + dense_divergence(left, right, documents)
        (total * share).backward()

    exact = [state.detach().double().requires_grad_() for state in students]
    dense(exact, [state.double() for state in teachers])
    reference = [state.grad for state in exact if state.grad is not None]
    sys.stdout.write(
        f"relations of Q, K, V: {arguments.length} positions, {arguments.heads} heads of {arguments.width}, "
        f"{arguments.documents} document(s), float32, {arguments.threads} thread(s), torch {torch.__version__}\n\n"
    )
    variants = {"dense": Variant(dense, students), "WrinkleFree": Variant(ours, students)}
    sys.stdout.write(comparison(variants, arguments.rounds, reference))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
