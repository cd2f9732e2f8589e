import logging

import pytest
import torch

from wrinklefree.distillation.attention_loss import AttentionRelations
from wrinklefree.distillation.cross_entropy import CrossEntropy
from wrinklefree.distillation.layerwise_loss import LayerwiseDistillation
from wrinklefree.distillation.weighted_sum import WeightedSum, merge_wants
from wrinklefree.models.records import Wants
from wrinklefree.utils.errors import ConfigError, NonFiniteError


def relations() -> AttentionRelations:
    return AttentionRelations(
        form="algorithm_1",
        relation_heads=4,
        mask="documents",
        student_layer=1,
        teacher_layer=1,
        attention_heads=4,
    )


def automatic() -> WeightedSum:
    return WeightedSum([CrossEntropy(), relations()], {"cross_entropy": 1.0, "attention": "auto"})


def test_after_calibration_the_weighted_term_equals_cross_entropy(make, take_output_rows, take_batch_rows) -> None:
    batch = make.batch([[7, 5], [9], [12], [3, 3]], 12)
    student, teacher = make.output(4, 12, gradients=True), make.output(4, 12)
    objective = automatic()
    counts = objective.counts(batch)
    terms: dict[str, float] = {}
    with torch.no_grad():
        for start in (0, 2):
            rows = slice(start, start + 2)
            part = objective(
                take_output_rows(student, rows), take_output_rows(teacher, rows), take_batch_rows(batch, rows), counts
            )
            assert part.weights["attention"] == 0.0
            for name, number in part.terms.items():
                terms[name] = terms.get(name, 0.0) + number.item()
    objective.calibrate(terms)
    losses = objective(student, teacher, batch, counts)
    weighted = losses.weights["attention"] * losses.terms["attention"].item()
    assert weighted == pytest.approx(losses.terms["cross_entropy"].item(), rel=1e-5)
    assert losses.total.item() == pytest.approx(2 * losses.terms["cross_entropy"].item(), rel=1e-5)


def test_training_before_calibration_is_refused(make) -> None:
    batch, student, teacher = make.batch([[12]], 12), make.output(1, 12, gradients=True), make.output(1, 12)
    objective = automatic()
    assert objective.needs_calibration
    with pytest.raises(RuntimeError, match="calibrate"):
        objective(student, teacher, batch, objective.counts(batch))


def test_the_weight_is_fixed_once_and_survives_a_checkpoint() -> None:
    objective = automatic()
    objective.calibrate({"cross_entropy": 3.0, "attention": 0.02})
    assert objective.state_dict() == {"attention": pytest.approx(150.0)}
    objective.calibrate({"cross_entropy": 1.0, "attention": 1.0})
    assert objective.weights["attention"] == pytest.approx(150.0)

    restored = automatic()
    restored.load_state_dict(objective.state_dict())
    assert not restored.needs_calibration
    restored.calibrate({"cross_entropy": 1.0, "attention": 1.0})
    assert restored.weights == objective.weights


def test_a_checkpoint_from_before_calibration_leaves_it_open() -> None:
    objective = automatic()
    objective.load_state_dict({})
    assert objective.needs_calibration


def test_a_checkpoint_of_another_configuration_is_refused() -> None:
    objective = WeightedSum([CrossEntropy()], {"cross_entropy": 1.0})
    assert not objective.needs_calibration
    with pytest.raises(ConfigError, match="automatic weights for attention"):
        objective.load_state_dict({"attention": 2.0})


def test_a_student_that_equals_its_teacher_does_not_blow_the_weight_up(caplog: pytest.LogCaptureFixture) -> None:
    objective = automatic()
    with caplog.at_level(logging.WARNING):
        objective.calibrate({"cross_entropy": 3.0, "attention": 0.0})
    assert objective.weights["attention"] == pytest.approx(3.0 / 1e-4)
    assert "the student still equals its teacher" in caplog.text


def test_values_without_meaning_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="attention=nan"):
        automatic().calibrate({"cross_entropy": 3.0, "attention": float("nan")})
    with pytest.raises(ConfigError, match=r"cross_entropy is 0\.0"):
        automatic().calibrate({"cross_entropy": 0.0, "attention": 0.1})


def test_weights_must_name_every_value() -> None:
    with pytest.raises(ValueError, match="weights name"):
        WeightedSum([CrossEntropy()], {"cross_entropy": 1.0, "logits": 1.0})


def test_wants_are_merged() -> None:
    assert merge_wants([Wants((2, 0)), Wants((1, 2), 5), Wants()]) == Wants((0, 1, 2), 5)
    with pytest.raises(ValueError, match=r"several layers: \[1, 2\]"):
        merge_wants([Wants(qkv_layer=2), Wants(qkv_layer=1)])


def test_a_diagnostic_has_no_gradient(make) -> None:
    batch, student, teacher = make.batch([[12]], 12), make.output(1, 12, gradients=True), make.output(1, 12)
    term = LayerwiseDistillation(loss_type="mse", weights=(1.0, 1.0, 1.0))
    objective = WeightedSum([term], {"hidden_states": 1.0, "mean_cosine": 0.0})
    losses = objective(student, teacher, batch, objective.counts(batch))
    assert not losses.terms["mean_cosine"].requires_grad
    assert losses.total.item() == losses.terms["hidden_states"].item()
