import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wrinklefree.distillation import relation_pieces
from wrinklefree.distillation.attention_loss import (
    AttentionRelations,
    relation_divergence,
    relation_heads,
    typical_magnitude,
)
from wrinklefree.models.records import IGNORE, QKV, Batch, ModelOutput

FORMS = ["algorithm_1", "equation_12", "authors_code", "attention_map"]


def term(form: str, heads: int = 4, *, mask: str = "documents", block_rows: int | None = None) -> AttentionRelations:
    return AttentionRelations(
        form=form,
        relation_heads=heads,
        mask=mask,
        student_layer=1,
        teacher_layer=1,
        attention_heads=4,
        block_rows=block_rows,
    )


def value(relations: AttentionRelations, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> Tensor:
    return relations(student, teacher, batch, relations.counts(batch), {"attention": 1.0}).weighted


def from_states(query: Tensor, key: Tensor | None = None, state: Tensor | None = None) -> ModelOutput:
    key, state = query if key is None else key, query if state is None else state
    return ModelOutput(torch.zeros(1, query.shape[2], 1), torch.zeros(1, 1), lambda x: x, {}, QKV(query, key, state))


def two_tokens() -> Batch:
    ones = torch.ones(1, 2, dtype=torch.long)
    return Batch(ones, torch.full_like(ones, IGNORE), torch.tensor([[0, 1]]), ones)


def uniform_against(score: float) -> float:
    """KL((1/2, 1/2) || softmax(score, 0)) = log(1 + e^score) - score / 2 - log 2."""
    return math.log1p(math.exp(score)) - score / 2 - math.log(2)


# Student tokens are orthogonal, teacher tokens equal, states have length 3: scores of a row are (x, 0) against (x, x).
TWO_TOKEN_VALUES = {
    "algorithm_1": 3 * uniform_against(1.0),
    "authors_code": 3 * uniform_against(1.0) / 2,
    "equation_12": 3 * uniform_against(9 / math.sqrt(2)),
    # Causal: the first row sees itself only; the second counts half of the two rows.
    "attention_map": uniform_against(9 / math.sqrt(2)) / 2,
}


@pytest.mark.parametrize("form", FORMS)
def test_two_tokens_in_closed_form(form: str) -> None:
    one_head = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    same = torch.tensor([[3.0, 0.0], [3.0, 0.0]])
    student = from_states(torch.stack([one_head, one_head]).unsqueeze(0))
    teacher = from_states(torch.stack([same, same]).unsqueeze(0))
    relations = AttentionRelations(
        form=form, relation_heads=2, mask="documents", student_layer=0, teacher_layer=0, attention_heads=2
    )
    assert value(relations, student, teacher, two_tokens()).item() == pytest.approx(TWO_TOKEN_VALUES[form], rel=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 8, 16])
def test_gamma_of_the_code_is_relation_heads_times_gamma_of_algorithm_1(make, heads: int) -> None:
    batch, student, teacher = make.batch([[7, 5], [9]], 12), make.output(2, 12), make.output(2, 12)
    code = value(term("authors_code", heads), student, teacher, batch).item()
    paper = value(term("algorithm_1", heads), student, teacher, batch).item()
    assert heads * code == pytest.approx(paper, rel=1e-6)


def dense(form: str, student: QKV, teacher: QKV, documents: Tensor | None, heads: int) -> Tensor:
    """The definition, written without blocks: one row at a time."""

    def pairs(states: QKV) -> list[tuple[Tensor, Tensor]]:
        if form == "attention_map":
            groups = states.query.shape[1] // states.key.shape[1]
            key = torch.stack([states.key[:, h // groups] for h in range(states.query.shape[1])], 1)
            return [(states.query / states.query.shape[-1] ** 0.5, key)]
        result = []
        for state in (states.query, states.key, states.value):
            merged = torch.cat(list(state.unbind(1)), dim=-1)
            split = torch.stack(merged.chunk(heads, dim=-1), 1)
            if form == "equation_12":
                result.append((split / split.shape[-1] ** 0.5, split))
            else:
                unit = split / split.norm(dim=-1, keepdim=True)
                result.append((unit, unit))
        return result

    total, counted = torch.zeros(()), 0
    for number, ((a, b), (c, d)) in enumerate(zip(pairs(student), pairs(teacher), strict=True)):
        for row in range(a.shape[0]):
            for i in range(a.shape[2]):
                if documents is not None and documents[row, i] == 0:
                    continue
                seen = (
                    torch.ones(a.shape[2], dtype=torch.bool)
                    if documents is None
                    else documents[row] == documents[row, i]
                )
                if form == "attention_map":
                    seen = seen & (torch.arange(a.shape[2]) <= i)
                for h in range(a.shape[1]):
                    mine = torch.log_softmax(b[row, h, seen] @ a[row, h, i], -1)
                    theirs = torch.log_softmax(d[row, h, seen] @ c[row, h, i], -1)
                    total = total + (theirs.exp() * (theirs - mine)).sum()
                    counted += 1 if number == 0 else 0
    return total / counted / (heads if form == "authors_code" else 1)


@pytest.mark.parametrize("mask", ["documents", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_equal_the_definition_in_value_and_gradient(make, form: str, mask: str) -> None:
    batch = make.batch([[7, 5], [3, 6]], 12)
    student, teacher = make.output(2, 12, gradients=True), make.output(2, 12)
    states = [student.qkv.query, student.qkv.key, student.qkv.value]
    expected = dense(form, student.qkv, teacher.qkv, batch.document_ids if mask == "documents" else None, 4)
    wanted = torch.autograd.grad(expected, states, allow_unused=True)
    for block_rows in (1, 5, None):
        got = value(term(form, mask=mask, block_rows=block_rows), student, teacher, batch)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        for mine, theirs in zip(torch.autograd.grad(got, states, allow_unused=True), wanted, strict=True):
            if theirs is None:
                assert mine is None
            else:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block_rows", [1, 5, None])
@pytest.mark.parametrize("mask", ["documents", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_a_masked_batch_equals_its_documents_one_by_one(
    make, monkeypatch: pytest.MonkeyPatch, form: str, mask: str, block_rows: int | None
) -> None:
    """The one piece of other devices against the pieces of a CPU."""
    batch = make.batch([[7, 4], [3, 2, 6], [12]], 12)
    student, teacher = make.output(3, 12, gradients=True), make.output(3, 12)
    states = [student.qkv.query, student.qkv.key, student.qkv.value]
    relations = term(form, mask=mask, block_rows=block_rows)
    expected = value(relations, student, teacher, batch)
    wanted = torch.autograd.grad(expected, states, allow_unused=True)
    monkeypatch.setattr(relation_pieces, "document_pieces", lambda *given: [relation_pieces.whole_batch(*given)])
    got = value(relations, student, teacher, batch)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(torch.autograd.grad(got, states, allow_unused=True), wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


class LargestResult(TorchDispatchMode):
    """Numbers in the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.size = max(self.size, result.numel())
        return result


@pytest.mark.parametrize("form", FORMS)
def test_scores_are_held_a_block_at_a_time(make, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    length, height = 512, 32
    monkeypatch.setattr(relation_pieces, "CPU_ROWS", height)
    monkeypatch.setattr(relation_pieces, "CPU_BLOCK_BYTES", 4 * height * length // torch.get_num_threads())
    batch = make.batch([[length]], length)
    student, teacher = make.output(1, length, gradients=True), make.output(1, length)
    with LargestResult() as largest:
        value(term(form), student, teacher, batch).backward()
    assert largest.size == height * length


@pytest.mark.parametrize("form", FORMS)
def test_zero_when_equal_positive_and_asymmetric_otherwise(make, form: str) -> None:
    batch, student, teacher = make.batch([[12]], 12), make.output(1, 12), make.output(1, 12)
    assert abs(value(term(form), teacher, teacher, batch).item()) < 1e-6
    forward, backward = value(term(form), student, teacher, batch), value(term(form), teacher, student, batch)
    assert forward.item() > 1e-3 / 4
    assert abs(forward.item() - backward.item()) > 1e-3 * forward.item()


@pytest.mark.parametrize("form", FORMS)
def test_the_teacher_gets_no_gradient(make, form: str) -> None:
    student, teacher = make.output(1, 12, gradients=True), make.output(1, 12, gradients=True)
    value(term(form), student, teacher, make.batch([[12]], 12)).backward()
    assert student.qkv.query.grad.abs().max() > 0
    assert teacher.qkv.query.grad is None
    assert teacher.qkv.key.grad is None


@pytest.mark.parametrize("form", FORMS)
def test_padding_and_other_documents_change_nothing(make, form: str, take_output_rows) -> None:
    lengths = [5, 4]
    batch, student, teacher = make.batch([lengths], 12), make.output(1, 12, gradients=True), make.output(1, 12)
    packed = value(term(form), student, teacher, batch)
    packed.backward()
    assert student.qkv.query.grad[:, :, 9:].abs().max() == 0.0
    assert student.qkv.key.grad[:, :, 9:].abs().max() == 0.0

    def piece(output: ModelOutput, part: slice) -> ModelOutput:
        qkv = QKV(output.qkv.query[:, :, part], output.qkv.key[:, :, part], output.qkv.value[:, :, part])
        return replace(output, qkv=qkv)

    alone = 0.0
    for part in (slice(0, 5), slice(5, 9)):
        size = part.stop - part.start
        single = make.batch([[size]], size)
        alone += value(term(form), piece(student, part), piece(teacher, part), single).item() * size / 9
    assert packed.item() == pytest.approx(alone, rel=1e-5)

    loud = torch.zeros(1, 1, 12, 1)
    loud[:, :, 9:] = 1e4
    noisy = QKV(student.qkv.query + loud, student.qkv.key - loud, student.qkv.value + loud)
    assert value(term(form), replace(student, qkv=noisy), teacher, batch).item() == pytest.approx(
        packed.item(), rel=1e-6
    )


def test_without_a_mask_padding_is_part_of_every_row(make) -> None:
    batch, student, teacher = make.batch([[8]], 12), make.output(1, 12), make.output(1, 12)
    unmasked = term("authors_code", mask="none")
    assert unmasked.counts(batch) == {"attention": 12.0 * 4}
    assert term("authors_code").counts(batch) == {"attention": 8.0 * 4}
    full = replace(batch, document_ids=torch.ones_like(batch.document_ids))
    assert value(unmasked, student, teacher, batch).item() == pytest.approx(
        value(term("authors_code"), student, teacher, full).item(), rel=1e-6
    )


@pytest.mark.parametrize("form", ["algorithm_1", "equation_12"])
def test_models_may_differ_in_width_and_heads(make, form: str) -> None:
    batch, student = make.batch([[12]], 12), make.output(1, 12)
    wide = from_states(make.normal(1, 8, 12, 16), make.normal(1, 8, 12, 16), make.normal(1, 8, 12, 16))
    got = value(term(form), student, wide, batch)
    torch.testing.assert_close(got, dense(form, student.qkv, wide.qkv, None, 4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["algorithm_1", "authors_code", "equation_12"])
def test_values_have_the_documented_size_and_do_not_grow_with_length(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = {}
    for length in (64, 256):
        for noise in (0.3, 1.0):
            total = 0.0
            for _ in range(3):
                teacher = torch.randn(1, 32, length, 32, generator=generator)
                student = teacher + noise * torch.randn(1, 32, length, 32, generator=generator)
                pair = [relation_heads(x, 32) for x in (student, teacher)]
                if form == "equation_12":
                    sides = [(x / 32**0.5, x) for x in pair]
                else:
                    sides = [(x, x) for x in (torch.nn.functional.normalize(x, dim=-1) for x in pair)]
                divided = 32 * length * (32 if form == "authors_code" else 1)
                total += relation_divergence(sides[0], sides[1], None).item() / divided
            seen[length, noise] = total
    bounds = typical_magnitude(form, 32)
    assert all(bounds.low * 0.6 < got < bounds.high * 1.6 for got in seen.values()), seen
    if form != "equation_12":
        assert all(seen[256, noise] < 1.3 * seen[64, noise] for noise in (0.3, 1.0)), seen


def test_bfloat16_states_under_autocast_are_compared_in_float32(make) -> None:
    batch, student, teacher = make.batch([[12]], 12), make.output(1, 12), make.output(1, 12)

    def low(output: ModelOutput) -> ModelOutput:
        return replace(output, qkv=QKV(*(x.bfloat16() for x in (output.qkv.query, output.qkv.key, output.qkv.value))))

    def back(output: ModelOutput) -> ModelOutput:
        return replace(output, qkv=QKV(*(x.float() for x in (output.qkv.query, output.qkv.key, output.qkv.value))))

    expected = value(term("equation_12"), back(low(student)), back(low(teacher)), batch)
    with torch.autocast("cpu", torch.bfloat16):
        got = value(term("equation_12"), low(student), low(teacher), batch)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_accumulated_micro_batches_give_the_gradient_of_one_batch(make, take_output_rows, take_batch_rows) -> None:
    batch = make.batch([[3, 9], [12], [2, 2, 2], [11]] * 4, 12)
    student, teacher = make.output(16, 12, gradients=True), make.output(16, 12)
    relations = term("algorithm_1")
    counts = relations.counts(batch)
    states = [student.qkv.query, student.qkv.key, student.qkv.value]
    whole = torch.autograd.grad(relations(student, teacher, batch, counts, {"attention": 2.0}).weighted, states)
    parts = [torch.zeros_like(state) for state in states]
    for start in range(0, 16, 4):
        rows = slice(start, start + 4)
        mine, theirs = take_output_rows(student, rows), take_output_rows(teacher, rows)
        total = relations(mine, theirs, take_batch_rows(batch, rows), counts, {"attention": 2.0}).weighted
        for part, gradient in zip(parts, torch.autograd.grad(total, states), strict=True):
            part += gradient
    for part, gradient in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, gradient, rtol=1e-5, atol=1e-8)


def test_missing_states_are_named(make) -> None:
    batch, student = make.batch([[12]], 12), make.output(1, 12)
    with pytest.raises(TypeError, match="needs the Q, K, V states"):
        value(term("algorithm_1"), student, replace(student, qkv=None), batch)
