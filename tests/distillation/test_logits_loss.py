import math
from dataclasses import replace

import pytest
import torch

from wrinklefree.distillation.logits_loss import LogitsDistillation, logits_kl
from wrinklefree.models.records import IGNORE


def loss(term: LogitsDistillation, student, teacher, batch, counts=None):
    return term(student, teacher, batch, counts or term.counts(batch), dict.fromkeys(term.names, 1.0))


def test_two_words_in_closed_form() -> None:
    # Teacher odds 3:1, student odds 1:1: KL = 3/4 log(3/2) + 1/4 log(1/2).
    student, teacher = torch.zeros(1, 2), torch.tensor([[1.0986123, 0.0]])
    assert logits_kl(student, teacher, temperature=1.0).item() == pytest.approx(0.1308120, rel=1e-5)
    # The other direction is another number.
    assert logits_kl(teacher, student, temperature=1.0).item() == pytest.approx(0.1438410, rel=1e-5)
    # Temperature 2: odds sqrt(3):1; against even odds the KL is log 2 less the entropy.
    p = math.sqrt(3) / (1 + math.sqrt(3))
    expected = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    assert logits_kl(student, teacher, temperature=2.0).item() == pytest.approx(expected, rel=1e-5)


def test_zero_only_when_the_distributions_are_equal(make) -> None:
    batch, teacher = make.batch([[12]], 12), make.output(1, 12)
    term = LogitsDistillation(temperature=5.0, t_squared=False, positions="all")
    assert abs(loss(term, teacher, teacher, batch).values["logits"].item()) < 1e-7
    other = replace(teacher, hidden=teacher.hidden + 0.1)
    assert loss(term, other, teacher, batch).values["logits"].item() > 1e-5


def test_t_squared_is_a_factor_of_25_in_value_and_gradient(make) -> None:
    batch, student, teacher = make.batch([[12]], 12), make.output(1, 12, gradients=True), make.output(1, 12)
    plain = loss(LogitsDistillation(temperature=5.0, t_squared=False, positions="response"), student, teacher, batch)
    squared = loss(LogitsDistillation(temperature=5.0, t_squared=True, positions="response"), student, teacher, batch)
    assert squared.values["logits"].item() == pytest.approx(25 * plain.values["logits"].item(), rel=1e-6)
    (small,) = torch.autograd.grad(plain.weighted, student.hidden)
    (large,) = torch.autograd.grad(squared.weighted, student.hidden)
    torch.testing.assert_close(large, 25 * small, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("positions", ["response", "all"])
def test_positions_decide_what_is_averaged(make, positions: str) -> None:
    batch, student, teacher = make.batch([[7, 3], [9]], 12), make.output(2, 12), make.output(2, 12)
    rows = batch.labels != IGNORE if positions == "response" else batch.document_ids != 0
    expected = logits_kl(student.logits()[rows], teacher.logits()[rows], temperature=5.0).mean()
    for with_cross_entropy in (False, True):
        term = LogitsDistillation(
            temperature=5.0, t_squared=False, positions=positions, with_cross_entropy=with_cross_entropy
        )
        torch.testing.assert_close(loss(term, student, teacher, batch).values["logits"], expected, rtol=1e-5, atol=1e-7)


def test_padding_and_prompt_change_nothing(make) -> None:
    batch, student, teacher = make.batch([[7, 3], [9]], 12), make.output(2, 12, gradients=True), make.output(2, 12)
    term = LogitsDistillation(temperature=5.0, t_squared=False, positions="response", with_cross_entropy=True)
    before = loss(term, student, teacher, batch)
    before.weighted.backward()
    assert student.hidden.grad[batch.labels == IGNORE].abs().max() == 0.0
    noise = torch.where((batch.labels == IGNORE)[..., None], 100.0, 0.0)
    after = loss(
        term, replace(student, hidden=student.hidden + noise), replace(teacher, hidden=teacher.hidden - noise), batch
    )
    assert before.values["logits"].item() == after.values["logits"].item()
    assert before.values["cross_entropy"].item() == after.values["cross_entropy"].item()


def test_the_teacher_gets_no_gradient(make) -> None:
    batch = make.batch([[12]], 12)
    student, teacher = make.output(1, 12, gradients=True), make.output(1, 12, gradients=True)
    term = LogitsDistillation(temperature=5.0, t_squared=False, positions="response")
    loss(term, student, teacher, batch).weighted.backward()
    assert student.head_weight.grad is not None
    assert teacher.hidden.grad is None
    assert teacher.head_weight.grad is None


def test_length_does_not_change_the_loss(make) -> None:
    short, student, teacher = make.batch([[16]], 16, target_share=1.0), make.output(1, 16), make.output(1, 16)
    term = LogitsDistillation(temperature=5.0, t_squared=False, positions="response")
    expected = loss(term, student, teacher, short).values["logits"].item()

    def repeated(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor] * 8, dim=1)

    long = replace(
        short,
        input_ids=repeated(short.input_ids),
        labels=repeated(short.labels),
        position_ids=repeated(short.position_ids),
        document_ids=repeated(short.document_ids),
    )
    got = loss(
        term,
        replace(student, hidden=repeated(student.hidden)),
        replace(teacher, hidden=repeated(teacher.hidden)),
        long,
    )
    assert got.values["logits"].item() == pytest.approx(expected, rel=1e-5)


def test_without_a_teacher_it_says_so(make) -> None:
    batch, student = make.batch([[12]], 12), make.output(1, 12)
    term = LogitsDistillation(temperature=5.0, t_squared=False, positions="response")
    with pytest.raises(TypeError, match="logits compares with a teacher"):
        loss(term, student, None, batch)
