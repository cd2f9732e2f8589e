"""Objectives of the stages: what each one minimises, composed from terms.

Stage 3 (arXiv:2510.13998, eq. 13):

    L = L_CE + lambda * L_LD + gamma * L_AD

with L_CE the next-token cross-entropy on response targets, L_LD the KL of softened logits (`logits_loss`) and L_AD the
KL of Q, K, V relations at one layer (`attention_loss`). This module composes and decides what a configuration leaves
open; the arithmetic is in the terms.

Published settings (`preset` fills every field that is null):

    preset         form           t_squared   positions   mask
    paper          algorithm_1    no          response    documents
    authors_code   authors_code   yes         all         none

The paper prints 1e5 for gamma with its own algorithm, the authors' code uses 1e5 in its form, which divides by R once
more: 1e5 there is 1e5 / R here. `gamma_attention: published` takes the number as printed, in the form of the preset.
"""

import logging
import math
from dataclasses import dataclass
from typing import Literal

from wrinklefree.distillation.attention_loss import ATTENTION, AttentionRelations, Form, Mask, typical_magnitude
from wrinklefree.distillation.cached_logits_loss import CachedLogitsDistillation
from wrinklefree.distillation.config import AttentionConfig, DistillationConfig, LayerwiseConfig
from wrinklefree.distillation.cross_entropy import CrossEntropy
from wrinklefree.distillation.layerwise_loss import HIDDEN_STATES, MEAN_COSINE, LayerwiseDistillation, layer_weights
from wrinklefree.distillation.logits_loss import LOGITS, LogitsDistillation
from wrinklefree.distillation.teacher_cache import TeacherCache
from wrinklefree.distillation.weighted_sum import CROSS_ENTROPY, Term, WeightedSum
from wrinklefree.models.config import Architecture
from wrinklefree.utils.errors import ConfigError

logger = logging.getLogger(__name__)

AUTO_DEPTH = 0.79
"""Relative depth of the compared block: the paper's block 22 of 28."""
NEGLIGIBLE = 1e-3
"""A weighted relation term below this cannot matter beside a cross-entropy of order one."""


@dataclass(frozen=True)
class ResolvedForm:
    """The fields that a preset may fill, filled."""

    form: Form
    mask: Mask
    t_squared: bool
    positions: Literal["response", "all"]


PRESETS: dict[str, ResolvedForm] = {
    "paper": ResolvedForm("algorithm_1", "documents", t_squared=False, positions="response"),
    "authors_code": ResolvedForm("authors_code", "none", t_squared=True, positions="all"),
}


def resolve_form(config: DistillationConfig) -> ResolvedForm:
    """The configuration's own choices where it makes any, the preset's elsewhere."""
    preset = PRESETS[config.preset]
    return ResolvedForm(
        form=preset.form if config.attention.form is None else config.attention.form,
        mask=preset.mask if config.attention.mask is None else config.attention.mask,
        t_squared=preset.t_squared if config.logits.t_squared is None else config.logits.t_squared,
        positions=preset.positions if config.logits.positions is None else config.logits.positions,
    )


def language_model_objective() -> WeightedSum:
    """Cross-entropy on the targets: pretraining, continued pretraining and fine-tuning."""
    return WeightedSum([CrossEntropy()], {CROSS_ENTROPY: 1.0})


def taught_language_model_objective(
    weight: float,
    temperature: float,
    architecture: Architecture,
    teacher_architecture: Architecture,
    token_scaling: float | None = None,
) -> WeightedSum:
    """Stage 2 with a teacher: cross-entropy plus `weight` x KL(teacher || student) at the targets, scaled as given.

    Raises:
        ConfigError: Vocabularies differ.
    """
    _check_vocabularies(architecture, teacher_architecture)
    term = LogitsDistillation(
        temperature=temperature,
        t_squared=False,
        positions="response",
        with_cross_entropy=True,
        token_scaling=token_scaling,
    )
    return WeightedSum([term], {CROSS_ENTROPY: 1.0, LOGITS: weight})


def layerwise_objective(config: LayerwiseConfig, architecture: Architecture) -> WeightedSum:
    """Stage 1.9: alignment of all block outputs, plus `lm_loss_weight` of cross-entropy."""
    weights = layer_weights(config.layer_weights, architecture.num_hidden_layers, normalize=config.normalize)
    alignment = LayerwiseDistillation(loss_type=config.loss_type, weights=weights, temperature=config.temperature)
    if config.lm_loss_weight == 0:
        return WeightedSum([alignment], {HIDDEN_STATES: 1.0, MEAN_COSINE: 0.0})
    return WeightedSum(
        [alignment, CrossEntropy()], {HIDDEN_STATES: 1.0, MEAN_COSINE: 0.0, CROSS_ENTROPY: config.lm_loss_weight}
    )


def cached_stage3_objective(config: DistillationConfig, architecture: Architecture, cache: TeacherCache) -> WeightedSum:
    """Stage 3 with the teacher's logits from a cache: equation 13 without the relations.

    Raises:
        ConfigError: The cache's vocabulary is another one.
    """
    if cache.identity.vocabulary != architecture.vocab_size:
        raise ConfigError(
            f"{cache.folder} holds logits of {cache.identity.vocabulary} entries, the student's vocabulary has "
            f"{architecture.vocab_size}; make a cache for this model"
        )
    term = CachedLogitsDistillation(cache, t_squared=resolve_form(config).t_squared, with_cross_entropy=True)
    return WeightedSum([term], {CROSS_ENTROPY: 1.0, LOGITS: config.lambda_logits})


def stage3_objective(
    config: DistillationConfig, architecture: Architecture, teacher_architecture: Architecture
) -> WeightedSum:
    """Stage 3: equation 13. A term whose weight is 0 is left out, and without any the teacher is not run.

    Raises:
        ConfigError: Vocabularies differ, the layer does not exist, or R does not divide the states of both models.
    """
    resolved = resolve_form(config)
    gamma = config.published_gamma if config.gamma_attention == "published" else config.gamma_attention
    if config.lambda_logits > 0 or gamma != 0:
        _check_vocabularies(architecture, teacher_architecture)
    terms: list[Term] = []
    weights: dict[str, float | Literal["auto"]] = {CROSS_ENTROPY: 1.0}
    if config.lambda_logits > 0:
        if config.logits.token_scaling is not None and resolved.positions == "all":
            raise ConfigError(
                f"distillation.logits.token_scaling={config.logits.token_scaling:g} weighs targets by the teacher's "
                "cross-entropy, and a prompt has none: set distillation.logits.positions=response, or token_scaling=null"
            )
        weights[LOGITS] = config.lambda_logits
        terms.append(
            LogitsDistillation(
                temperature=config.logits.temperature,
                t_squared=resolved.t_squared,
                positions=resolved.positions,
                with_cross_entropy=True,
                token_scaling=config.logits.token_scaling,
            )
        )
    else:
        terms.append(CrossEntropy())
    if gamma != 0:
        weights[ATTENTION] = gamma
        terms.append(_attention_term(config.attention, resolved, architecture, teacher_architecture))
        if gamma != "auto":
            _warn_if_negligible(gamma, resolved.form, config.attention.relation_heads)
    return WeightedSum(terms, weights)


def _check_vocabularies(student: Architecture, teacher: Architecture) -> None:
    if student.vocab_size != teacher.vocab_size:
        raise ConfigError(
            f"the teacher's vocabulary has {teacher.vocab_size} entries, the student's {student.vocab_size}: "
            "distillation compares tokens, so both need the same tokenizer; choose another training.teacher.source"
        )


def compared_layers(layer: int | Literal["auto"], student_layers: int, teacher_layers: int) -> tuple[int, int]:
    """Blocks of student and teacher whose states are compared, counted from 0.

    auto: 79% of each depth, never the last block. Negative: from the end of each. Otherwise the student's block, and
    the teacher's at the same relative depth.

    Raises:
        ConfigError: A model has no such block.
    """
    if layer == "auto":
        student, teacher = (max(0, min(math.floor(AUTO_DEPTH * n), n - 2)) for n in (student_layers, teacher_layers))
        return student, teacher
    depth = student_layers if layer >= 0 else min(student_layers, teacher_layers)
    if not -depth <= layer < depth:
        raise ConfigError(
            f"distillation.attention.layer={layer} is out of range: the student has {student_layers} blocks, the "
            f"teacher {teacher_layers}; give auto or a number from {-depth} to {depth - 1}"
        )
    if layer < 0:
        return student_layers + layer, teacher_layers + layer
    return layer, math.ceil((layer + 1) * teacher_layers / student_layers) - 1


def _attention_term(
    config: AttentionConfig, resolved: ResolvedForm, student: Architecture, teacher: Architecture
) -> AttentionRelations:
    if resolved.form == "attention_map":
        if student.num_attention_heads != teacher.num_attention_heads:
            raise ConfigError(
                f"distillation.attention.form=attention_map compares head by head, but the student has "
                f"{student.num_attention_heads} heads and the teacher {teacher.num_attention_heads}: "
                "use a relation form (algorithm_1, equation_12, authors_code)"
            )
    else:
        _check_relation_heads(config.relation_heads, student, teacher)
    student_layer, teacher_layer = compared_layers(config.layer, student.num_hidden_layers, teacher.num_hidden_layers)
    return AttentionRelations(
        form=resolved.form,
        relation_heads=config.relation_heads,
        mask=resolved.mask,
        student_layer=student_layer,
        teacher_layer=teacher_layer,
        attention_heads=student.num_attention_heads,
    )


def _check_relation_heads(relation_heads: int, student: Architecture, teacher: Architecture) -> None:
    widths = [
        heads * model.head_dim
        for model in (student, teacher)
        for heads in (model.num_attention_heads, model.num_key_value_heads)
    ]
    common = math.gcd(*widths)
    if common % relation_heads:
        works = max(n for n in range(1, relation_heads) if common % n == 0)
        raise ConfigError(
            f"distillation.attention.relation_heads={relation_heads} does not divide the query and key/value widths "
            f"of both models (student {widths[0]} and {widths[1]}, teacher {widths[2]} and {widths[3]}): "
            f"set distillation.attention.relation_heads={works}"
        )


def _warn_if_negligible(gamma: float, form: Form, relation_heads: int) -> None:
    """Say so when even the largest value seen of this form leaves gamma * L_AD below `NEGLIGIBLE`."""
    largest = typical_magnitude(form, relation_heads).high
    if gamma * largest < NEGLIGIBLE:
        logger.warning(
            "distillation.gamma_attention=%g makes the attention term a no-op: in the form %s L_AD is at most about "
            "%.2g, so the weighted term is about %.2g of the loss; use auto, or at least %.2g",
            gamma,
            form,
            largest,
            gamma * largest,
            NEGLIGIBLE / largest,
        )
