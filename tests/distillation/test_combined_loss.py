import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from wrinklefree.distillation.attention_loss import AttentionRelations
from wrinklefree.distillation.combined_loss import (
    compared_layers,
    resolve_form,
    stage3_objective,
    taught_language_model_objective,
)
from wrinklefree.distillation.config import AttentionConfig, DistillationConfig, LogitsConfig
from wrinklefree.distillation.logits_loss import LogitsDistillation
from wrinklefree.models.records import IGNORE, QKV, ModelOutput, Wants
from wrinklefree.utils.errors import ConfigError


def config(**changes: object) -> DistillationConfig:
    base: dict[str, object] = {"name": "test", "attention": AttentionConfig(relation_heads=4)}
    return DistillationConfig.model_validate(base | changes)


def test_presets_fill_what_is_left_open() -> None:
    paper, code = resolve_form(config()), resolve_form(config(preset="authors_code"))
    assert (paper.form, paper.mask, paper.t_squared, paper.positions) == ("algorithm_1", "documents", False, "response")
    assert (code.form, code.mask, code.t_squared, code.positions) == ("authors_code", "none", True, "all")
    own = resolve_form(
        config(
            preset="authors_code",
            logits=LogitsConfig(t_squared=False),
            attention=AttentionConfig(form="equation_12", mask="documents"),
        )
    )
    assert (own.form, own.mask, own.t_squared, own.positions) == ("equation_12", "documents", False, "all")


def test_presets_reach_the_terms(architecture) -> None:
    code = config(preset="authors_code", gamma_attention="published", attention=AttentionConfig(relation_heads=8))
    objective = stage3_objective(code, architecture(), architecture())
    logits, attention = objective.terms
    assert isinstance(logits, LogitsDistillation)
    assert isinstance(attention, AttentionRelations)
    assert (logits.temperature, logits.t_squared, logits.positions) == (5.0, True, "all")
    assert (attention.form, attention.mask, attention.relation_heads) == ("authors_code", "none", 8)
    assert objective.weights == {"cross_entropy": 1.0, "logits": 10.0, "attention": 1e5}
    assert not objective.needs_calibration


def test_total_is_equation_13(make, architecture) -> None:
    batch, student, teacher = make.batch([[7, 5], [9]], 12), make.output(2, 12, gradients=True), make.output(2, 12)
    objective = stage3_objective(config(gamma_attention=7.0, lambda_logits=3.0), architecture(), architecture())
    losses = objective(student, teacher, batch, objective.counts(batch))
    terms = losses.terms
    torch.testing.assert_close(
        losses.total.detach(), terms["cross_entropy"] + 3.0 * terms["logits"] + 7.0 * terms["attention"]
    )
    assert not any(term.requires_grad for term in terms.values())


def test_stage_2_with_a_teacher_adds_the_weighted_kl(make, architecture) -> None:
    batch, student, teacher = make.batch([[7, 5], [9]], 12), make.output(2, 12, gradients=True), make.output(2, 12)
    objective = taught_language_model_objective(0.5, 2.0, architecture(), architecture())
    losses = objective(student, teacher, batch, objective.counts(batch))
    targets = batch.labels != IGNORE
    log_p, log_q = (
        torch.log_softmax(output.hidden[targets] @ output.head_weight.T / 2.0, -1).detach()
        for output in (teacher, student)
    )
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(losses.terms["logits"], divergence)
    torch.testing.assert_close(losses.total.detach(), losses.terms["cross_entropy"] + 0.5 * divergence)
    with pytest.raises(ConfigError, match="both need the same tokenizer"):
        taught_language_model_objective(0.5, 2.0, architecture(), architecture(vocab_size=7))


def test_a_term_of_weight_zero_is_left_out(make, architecture) -> None:
    plain = stage3_objective(config(lambda_logits=0.0, gamma_attention=0.0), architecture(), architecture())
    assert plain.teacher_wants is None
    assert plain.weights == {"cross_entropy": 1.0}
    logits = stage3_objective(config(gamma_attention=0.0), architecture(), architecture())
    assert logits.teacher_wants == Wants()
    attention = stage3_objective(config(lambda_logits=0.0, gamma_attention=1.0), architecture(), architecture())
    assert attention.student_wants == Wants(qkv_layer=1)
    assert attention.weights == {"cross_entropy": 1.0, "attention": 1.0}
    batch, student, teacher = make.batch([[12]], 12), make.output(1, 12), make.output(1, 12)
    with_logits = stage3_objective(config(gamma_attention=1.0), architecture(), architecture())
    for name in ("cross_entropy", "attention"):
        torch.testing.assert_close(
            attention(student, teacher, batch, attention.counts(batch)).terms[name],
            with_logits(student, teacher, batch, with_logits.counts(batch)).terms[name],
        )


@pytest.mark.parametrize(
    ("layer", "student", "teacher", "expected"),
    [
        ("auto", 28, 28, (22, 22)),
        ("auto", 30, 36, (23, 28)),
        ("auto", 4, 4, (2, 2)),
        ("auto", 2, 1, (0, 0)),
        (-8, 28, 36, (20, 28)),
        (5, 28, 28, (5, 5)),
        (27, 28, 36, (27, 35)),
        (13, 28, 56, (13, 27)),
    ],
)
def test_compared_layers(layer, student: int, teacher: int, expected: tuple[int, int]) -> None:
    assert compared_layers(layer, student, teacher) == expected


@pytest.mark.parametrize("layer", [3, 28, -4])
def test_a_layer_out_of_range_is_refused(architecture, layer: int) -> None:
    with pytest.raises(ConfigError, match=rf"layer={layer} is out of range.*from -3 to 2"):
        stage3_objective(
            config(attention=AttentionConfig(relation_heads=4, layer=layer)), architecture(), architecture()
        )


def test_relation_heads_that_do_not_divide_are_refused_with_one_that_does(architecture) -> None:
    teacher = architecture(num_attention_heads=6, num_key_value_heads=3, head_dim=16)
    with pytest.raises(ConfigError, match=r"student 32 and 16, teacher 96 and 48\): set .*relation_heads=16"):
        stage3_objective(config(attention=AttentionConfig(relation_heads=32)), architecture(), teacher)


def test_other_vocabularies_are_refused(architecture) -> None:
    with pytest.raises(ConfigError, match="teacher's vocabulary has 99 entries, the student's 37"):
        stage3_objective(config(), architecture(), architecture(vocab_size=99))


def test_attention_maps_need_equal_heads(architecture) -> None:
    with pytest.raises(ConfigError, match="student has 4 heads and the teacher 8"):
        stage3_objective(
            config(attention=AttentionConfig(form="attention_map")), architecture(), architecture(num_attention_heads=8)
        )


@pytest.mark.parametrize(
    ("form", "gamma", "warns"),
    [
        ("algorithm_1", 1e-5, True),
        ("algorithm_1", 1e-3, True),
        ("algorithm_1", 1.0, False),
        ("equation_12", 1e-5, True),
        ("equation_12", 0.01, False),
        ("authors_code", 0.05, True),
        ("authors_code", 1e5, False),
        ("attention_map", 10.0, True),
    ],
)
def test_a_gamma_without_effect_earns_a_warning(
    architecture, caplog: pytest.LogCaptureFixture, form: str, gamma: float, warns: bool
) -> None:
    with caplog.at_level(logging.WARNING):
        stage3_objective(
            config(gamma_attention=gamma, attention=AttentionConfig(form=form, relation_heads=4)),
            architecture(),
            architecture(),
        )
    assert ("makes the attention term a no-op" in caplog.text) == warns


class Toy:
    """Hidden, Q, K and V states as projections of one input, so that gradient norms of the terms compare."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.teacher_input = torch.randn(4, 32, 64, generator=generator)
        self.student_input = (self.teacher_input + 0.5 * torch.randn(4, 32, 64, generator=generator)).requires_grad_()
        self.head = 0.3 * torch.randn(37, 64, generator=generator)
        self.projections = [torch.randn(64, 64, generator=generator) / 8 for _ in range(3)]

    def output(self, x: Tensor) -> ModelOutput:
        states = [(x @ p).view(4, 32, 4, 16).transpose(1, 2) for p in self.projections]
        return ModelOutput(x, self.head, lambda y: y, {}, QKV(*states))


@pytest.mark.parametrize(
    ("changes", "low", "high"),
    [
        ({"gamma_attention": "published"}, 0.1, 1.0),
        ({"gamma_attention": "published", "preset": "authors_code"}, 0.1, 1.0),
        ({"gamma_attention": "auto"}, 0.01, 0.99),
        ({"gamma_attention": 1e-5}, 0.0, 1e-4),
    ],
)
def test_gradient_share_of_the_relation_term(make, architecture, changes, low: float, high: float) -> None:
    make.vocabulary = 37
    batch, toy = make.batch([[32], [20, 12], [16, 16], [30]], 32), Toy()
    shape = architecture(num_key_value_heads=4, head_dim=16, hidden_size=64)
    objective = stage3_objective(config(**changes), shape, shape)
    teacher, counts = toy.output(toy.teacher_input), objective.counts(batch)
    with torch.no_grad():
        step_0 = objective(toy.output(toy.student_input), teacher, batch, counts)
    objective.calibrate({name: term.item() for name, term in step_0.terms.items()})
    parts = [
        torch.autograd.grad(
            term(toy.output(toy.student_input), teacher, batch, counts, objective.weights).weighted, toy.student_input
        )[0].norm()
        for term in objective.terms
    ]
    share = (parts[1] / (parts[0] + parts[1])).item()
    assert low < share < high


def test_stage_3_accumulates_exactly(make, architecture, take_output_rows, take_batch_rows, take_leaves) -> None:
    batch = make.batch([[3, 9], [12], [2, 2, 2], [11]] * 4, 12, target_share=0.3)
    student, teacher = make.output(16, 12, gradients=True), make.output(16, 12)
    objective = stage3_objective(config(gamma_attention=20.0, preset="authors_code"), architecture(), architecture())
    counts = objective.counts(batch)
    inputs = [student.hidden, student.head_weight, student.qkv.query, student.qkv.key, student.qkv.value]
    whole = torch.autograd.grad(objective(student, teacher, batch, counts).total, inputs)
    parts = [torch.zeros_like(x) for x in inputs]
    for start in range(0, 16, 4):
        rows = slice(start, start + 4)
        losses = objective(
            take_output_rows(student, rows), take_output_rows(teacher, rows), take_batch_rows(batch, rows), counts
        )
        for part, gradient in zip(parts, torch.autograd.grad(losses.total, inputs), strict=True):
            part += gradient
    for part, gradient in zip(parts, whole, strict=True):
        assert (part - gradient).abs().max() / gradient.abs().max() < 1e-6


def test_moving_a_batch_keeps_its_count_of_targets(make) -> None:
    batch = make.batch([[7, 5], [9]], 12)
    moved = batch.to("meta")
    assert moved.labels.device.type == "meta"
    assert moved.num_targets == batch.num_targets > 0
    assert replace(batch, labels=torch.full_like(batch.labels, -100)).num_targets == 0
