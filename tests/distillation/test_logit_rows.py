"""One pass of C a block against chains of tensor operations, on every instruction set: sums, gradients, losses, NaN."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from wrinklefree.distillation.logit_rows import Hard, LogitRows, NativeLogitRows, Soft, logit_rows
from wrinklefree.models.records import IGNORE
from wrinklefree.native.library import ISA_VARIABLE, is_available, isa_names
from wrinklefree.utils.errors import EngineError

ROWS = 11
CPU = torch.device("cpu")
EDGES = (0, 1, 16, 37, 100, 164, 1001)
"""Of blocks: one word, whole and broken registers."""

needs_library = pytest.mark.skipif(not is_available(), reason="needs the C library")


@pytest.fixture(autouse=True, params=isa_names() if is_available() else ["none"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, request.param)


class Case:
    def __init__(self, dtype: torch.dtype = torch.float32, words: int = EDGES[-1]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.student = (torch.randn(ROWS, words, generator=generator) * 4).to(dtype)
        self.teacher = (torch.randn(ROWS, words, generator=generator) * 4 + 5).to(dtype)
        self.labels = torch.randint(0, words, (ROWS,), generator=generator)
        self.labels[::3] = IGNORE
        self.counted = torch.rand(ROWS, generator=generator) < 0.6

    def run(self, kind: type[LogitRows], temperature: float | None, *, labels: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy, KL and the gradient, blocks of rows within blocks of words."""
        hard = Hard(self.labels, 0.5) if labels else None
        soft = None if temperature is None else Soft(self.counted, temperature, 2.0)
        rows = kind(ROWS, CPU, hard, soft)
        blocks = [(slice(*part), slice(*words)) for words in pairwise(EDGES) for part in ((0, 7), (7, ROWS))]
        gradient = torch.empty_like(self.student)

        def logits(part: slice, words: slice) -> tuple[Tensor, Tensor | None]:
            taught = None if soft is None else self.teacher[part, words].clone(memory_format=torch.contiguous_format)
            return self.student[part, words].clone(memory_format=torch.contiguous_format), taught

        for part, words in blocks:
            rows.add(*logits(part, words), part, words)
        for part, words in blocks:
            gradient[part, words] = rows.gradient(*logits(part, words), part, words)
        return rows.cross_entropy(), rows.divergence(), gradient


CASES = [(None, True), (1.0, True), (5.0, True), (1.0, False), (5.0, False)]


@needs_library
@pytest.mark.parametrize(("temperature", "labels"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_tensor_operations(dtype: torch.dtype, temperature: float | None, labels: bool) -> None:
    case = Case(dtype)
    mine, theirs = (case.run(kind, temperature, labels=labels) for kind in (NativeLogitRows, LogitRows))
    for a, b in zip(mine[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    largest = theirs[2].abs().max().item()
    torch.testing.assert_close(mine[2], theirs[2], rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6 * largest)


@pytest.mark.parametrize("kind", [LogitRows, pytest.param(NativeLogitRows, marks=needs_library)])
@pytest.mark.parametrize(("temperature", "labels"), CASES)
def test_gradient_is_that_of_the_losses(kind: type[LogitRows], temperature: float | None, labels: bool) -> None:
    case = Case()
    cross_entropy, divergence, gradient = case.run(kind, temperature, labels=labels)
    logits = case.student.double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    if labels:
        loss = torch.nn.functional.cross_entropy(logits, case.labels, ignore_index=IGNORE, reduction="sum")
        torch.testing.assert_close(cross_entropy.double(), loss, rtol=1e-6, atol=0)
        total = total + 0.5 * loss
    if temperature is not None:
        student, teacher = ((x.double() / temperature).log_softmax(1) for x in (logits, case.teacher))
        loss = ((teacher.exp() * (teacher - student)).sum(1) * case.counted).sum()
        torch.testing.assert_close(divergence.double(), loss, rtol=1e-5, atol=0)
        total = total + 2.0 * loss
    (expected,) = torch.autograd.grad(total, [logits])
    assert (gradient - expected).abs().max() < 5e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", [LogitRows, pytest.param(NativeLogitRows, marks=needs_library)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("column", [0, 50, 1000])
def test_nan_and_infinity_reach_losses_and_gradient(
    kind: type[LogitRows], side: str, value: float, column: int
) -> None:
    case = Case()
    row = int((case.counted & (case.labels != IGNORE)).nonzero()[0])
    getattr(case, side)[row, column] = value
    cross_entropy, divergence, gradient = case.run(kind, 5.0, labels=True)
    assert not divergence.isfinite()
    assert not gradient[row].isfinite().any()
    assert gradient[torch.arange(ROWS) != row].isfinite().all()
    assert cross_entropy.isfinite() == (side == "teacher")


@needs_library
def test_words_far_below_the_largest_have_no_part() -> None:
    case = Case()
    case.student[:, 1::2] -= 1e4
    case.student[:, 3::4] = -torch.inf
    cross_entropy, _, gradient = case.run(NativeLogitRows, None, labels=True)
    _, _, expected = case.run(LogitRows, None, labels=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    assert cross_entropy > 1e3


@needs_library
def test_a_block_of_no_rows_is_refused() -> None:
    rows = NativeLogitRows(0, CPU, Hard(torch.empty(0, dtype=torch.long), 1.0), None)
    with pytest.raises(EngineError, match="wf_sum_logits refused its arguments"):
        rows.add(torch.empty(0, 5), None, slice(0, 0), slice(0, 5))


def test_other_types_take_tensor_operations() -> None:
    hard = Hard(torch.zeros(2, dtype=torch.long), 1.0)
    assert type(logit_rows(2, CPU, hard, None, torch.float16)) is LogitRows
