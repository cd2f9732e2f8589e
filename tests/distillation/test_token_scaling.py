"""Token-scaled logit distillation against a dense second implementation, document by document."""

from dataclasses import replace

import pytest
import torch

from wrinklefree.composition import compose
from wrinklefree.distillation import token_scaling
from wrinklefree.distillation.combined_loss import stage3_objective
from wrinklefree.distillation.config import DistillationConfig, LogitsConfig
from wrinklefree.distillation.logits_loss import LogitsDistillation, logits_kl
from wrinklefree.distillation.token_scaling import document_numbers, surprise, token_weights
from wrinklefree.models.records import IGNORE
from wrinklefree.utils.errors import ConfigError


def test_two_documents_in_closed_form() -> None:
    found = token_weights(
        torch.tensor([0.0, 2.0, 9.0, 1.0, 50.0]),
        torch.tensor([1, 1, 1, 2, 2]),
        torch.tensor([True, True, False, True, False]),
        temperature=2.0,
    )
    e = torch.e
    torch.testing.assert_close(found, torch.tensor([2 / (1 + e), 2 * e / (1 + e), 0.0, 1.0, 0.0]))


def test_a_high_temperature_counts_tokens_alike() -> None:
    counted = torch.ones(6, dtype=torch.bool)
    found = token_weights(torch.arange(6.0), torch.zeros(6, dtype=torch.long), counted, temperature=1e6)
    torch.testing.assert_close(found, torch.ones(6), rtol=0, atol=1e-5)


def test_documents_of_different_rows_have_different_numbers() -> None:
    numbers = document_numbers(torch.tensor([[1, 1, 2, 0], [1, 2, 2, 2]]))
    assert numbers.tolist() == [1, 1, 2, 3, 4, 5, 5, 5]


def test_surprise_does_not_depend_on_the_chunk(make, monkeypatch: pytest.MonkeyPatch) -> None:
    output, labels = make.output(1, 50), torch.randint(0, make.vocabulary, (50,))
    expected = torch.nn.functional.cross_entropy(output.logits()[0], labels, reduction="none")
    for rows in (7, 1000):
        monkeypatch.setattr(token_scaling, "rows_a_chunk", lambda device, vocabulary, rows=rows: rows)
        found = surprise(output.hidden[0], output.head_weight, labels)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [37, 9000], ids=["rows", "blocks of the vocabulary"])
@pytest.mark.parametrize("with_cross_entropy", [False, True])
def test_value_and_gradient_equal_the_dense_form(make, with_cross_entropy: bool, vocabulary: int) -> None:
    make.vocabulary = vocabulary
    batch = make.batch([[7, 5], [9]], 12)
    student, teacher = make.output(2, 12, gradients=True), make.output(2, 12)
    term = LogitsDistillation(
        temperature=1.0, t_squared=False, positions="response", with_cross_entropy=with_cross_entropy, token_scaling=3.0
    )
    weights = dict.fromkeys(term.names, 0.0) | {"logits": 1.0}
    found = term(student, teacher, batch, term.counts(batch), weights)

    total = torch.zeros(())
    for row in range(2):
        for document in (1, 2):
            here = (batch.document_ids[row] == document) & (batch.labels[row] != IGNORE)
            theirs, labels = teacher.logits()[row][here], batch.labels[row][here]
            share = torch.softmax(torch.nn.functional.cross_entropy(theirs, labels, reduction="none") / 3.0, 0)
            total = total + (logits_kl(student.logits()[row][here], theirs, temperature=1.0) * share * here.sum()).sum()
    expected = total / (batch.labels != IGNORE).sum()
    torch.testing.assert_close(found.values["logits"], expected.detach(), rtol=1e-5, atol=1e-6)
    (mine,) = torch.autograd.grad(found.weighted, student.hidden)
    (wanted,) = torch.autograd.grad(expected, student.hidden)
    torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


def test_splitting_a_batch_changes_nothing(make) -> None:
    batch, student, teacher = make.batch([[7, 5], [9]], 12), make.output(2, 12), make.output(2, 12)
    term = LogitsDistillation(temperature=1.0, t_squared=False, positions="response", token_scaling=2.0)
    counts = term.counts(batch)
    whole = term(student, teacher, batch, counts, {"logits": 1.0}).values["logits"]
    parts = []
    for rows in (slice(0, 1), slice(1, 2)):
        part = replace(
            batch, input_ids=batch.input_ids[rows], labels=batch.labels[rows], position_ids=batch.position_ids[rows],
            document_ids=batch.document_ids[rows],
        )  # fmt: skip
        mine, theirs = (replace(output, hidden=output.hidden[rows]) for output in (student, teacher))
        parts.append(term(mine, theirs, part, counts, {"logits": 1.0}).values["logits"])
    torch.testing.assert_close(sum(parts), whole)


def test_stage_3_takes_it_from_the_configuration(architecture) -> None:
    config = DistillationConfig(name="x", gamma_attention=0.0, logits=LogitsConfig(token_scaling=10.0))
    [term] = stage3_objective(config, architecture(), architecture()).terms
    assert isinstance(term, LogitsDistillation)
    assert term.token_scaling == 10.0
    with pytest.raises(ConfigError, match=r"token_scaling=10 weighs targets.*positions=response"):
        stage3_objective(config.model_copy(update={"preset": "authors_code"}), architecture(), architecture())


def test_a_cached_teacher_has_no_surprise() -> None:
    command = ["training=stage3_distill", "distillation.gamma_attention=0", "training.teacher.cache=x"]
    with pytest.raises(ConfigError, match=r"token_scaling=10 needs the teacher's cross-entropy"):
        compose([*command, "distillation.logits.token_scaling=10"])
