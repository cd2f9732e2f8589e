"""Scores that count: always at lambda = 1 and full SubLN strength, whatever the training step was at.

Bits per byte over held-out documents (comparable across tokenizers, low noise), and task scores. Intervals are
percentile bootstraps: over documents for bits per byte, over examples for task scores.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from wrinklefree.data.finetune_dataset import encode_choices, encode_prompt
from wrinklefree.data.pretrain_dataset import HeldOut
from wrinklefree.data.tasks import Example, Task
from wrinklefree.distillation.cross_entropy import target_nll
from wrinklefree.models.bitlinear import quantization_of, set_quantization
from wrinklefree.models.generate import generate
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import IGNORE, Batch
from wrinklefree.models.subln import set_subln_strength, subln_strength_of
from wrinklefree.training.device import Compute
from wrinklefree.utils.errors import DataError
from wrinklefree.utils.tokenizer import TextTokenizer

BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval (95%)."""

    low: float
    high: float


@dataclass(frozen=True)
class LanguageScore:
    """How well a model predicts held-out text."""

    bits_per_byte: float
    interval: Interval
    nats_per_token: float
    perplexity: float
    tokens: int
    document_bits: tuple[float, ...]
    """Bits of each document; kept for paired comparisons."""
    document_bytes: tuple[int, ...]


@dataclass(frozen=True)
class TaskScore:
    """A task's headline metric and its parts."""

    task: str
    metric: str
    value: float
    interval: Interval
    per_example: tuple[float, ...]
    """1 or 0 for classification, ROUGE-L for generation; kept for paired comparisons."""
    macro_f1: float | None = None


@contextmanager
def fully_quantized(model: CausalLM) -> Iterator[None]:
    """Evaluate `model` as it will be served: lambda and SubLN strength at 1, eval mode, no gradient; then restore."""
    was_training = model.training
    value, strength = quantization_of(model), subln_strength_of(model)
    model.eval()
    set_quantization(model, 1.0)
    set_subln_strength(model, 1.0)
    try:
        with torch.no_grad():
            yield
    finally:
        set_quantization(model, value)
        set_subln_strength(model, strength)
        model.train(was_training)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0) -> Interval:
    """95% bootstrap interval of sum(numerators) / sum(denominators), resampling pairs."""
    generator = np.random.default_rng(seed)
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    picks = generator.integers(0, len(top), size=(BOOTSTRAP_SAMPLES, len(top)))
    samples = top[picks].sum(axis=1) / bottom[picks].sum(axis=1)
    low, high = np.percentile(samples, [2.5, 97.5])
    return Interval(float(low), float(high))


def score_language(model: CausalLM, held_out: HeldOut, compute: Compute) -> LanguageScore:
    """Bits per byte, perplexity and their interval on held-out documents.

    Raises:
        DataError: when the held-out set is empty.
    """
    if not held_out.document_bytes:
        raise DataError("the held-out set is empty; raise data.held_out_percent or add text")
    nats = torch.zeros(len(held_out.document_bytes), dtype=torch.float64)
    tokens = 0
    with fully_quantized(model):
        for batch, documents in zip(held_out.batches, held_out.document_index, strict=True):
            moved = batch.to(compute.device)
            with compute.autocast():
                losses = target_nll(model(moved), moved.labels)
            targets = batch.labels != IGNORE
            nats.index_add_(0, documents[targets].long(), losses.double().cpu()[targets])
            tokens += batch.num_targets
    bits = (nats / math.log(2)).tolist()
    mean_nats = float(nats.sum()) / tokens
    return LanguageScore(
        bits_per_byte=sum(bits) / sum(held_out.document_bytes),
        interval=ratio_interval(bits, held_out.document_bytes),
        nats_per_token=mean_nats,
        perplexity=math.exp(min(mean_nats, 700.0)),
        tokens=tokens,
        document_bits=tuple(bits),
        document_bytes=tuple(held_out.document_bytes),
    )


def _padded_batch(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Batch, torch.Tensor]:
    """Right-padded rows; labels are each row's own next tokens. Also the row lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    real = torch.arange(width)[None, :] < lengths[:, None]
    labels = torch.full_like(ids, IGNORE)
    labels[:, :-1] = torch.where(real[:, 1:], ids[:, 1:], IGNORE)
    positions = torch.arange(width).expand_as(ids) * real
    return Batch(ids, labels, positions, real.long()), lengths


def choice_scores(
    model: CausalLM, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]], *,
    pad_token_id: int, compute: Compute, rows_per_batch: int = 64,
) -> list[list[float]]:  # fmt: skip
    """Log-probability of each choice's tokens after its prompt, summed over the choice's tokens.

    Choices that are one token long share one forward pass of their prompt.
    """
    rows: list[list[int]] = []
    owners: list[tuple[int, int | None]] = []
    for index, (prompt, options) in enumerate(zip(prompts, choices, strict=True)):
        if all(len(option) == 1 for option in options):
            rows.append(list(prompt))
            owners.append((index, None))
        else:
            rows.extend([*prompt, *option] for option in options)
            owners.extend((index, position) for position in range(len(options)))
    scores: list[list[float]] = [[0.0] * len(options) for options in choices]
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    with fully_quantized(model):
        for start in range(0, len(order), rows_per_batch):
            picked = order[start : start + rows_per_batch]
            batch, lengths = _padded_batch([rows[row] for row in picked], pad_token_id)
            with compute.autocast():
                output = model(batch.to(compute.device))
            for place, row in enumerate(picked):
                index, option = owners[row]
                prompt_length = len(prompts[index])
                end = int(lengths[place])
                first = prompt_length - 1
                hidden = output.hidden[place, first : (prompt_length if option is None else end - 1)]
                logits = (hidden @ output.head_weight.to(hidden.dtype).T).float()
                log_probabilities = functional.log_softmax(logits, dim=-1).cpu()
                if option is None:
                    for number, tokens in enumerate(choices[index]):
                        scores[index][number] = float(log_probabilities[0, tokens[0]])
                else:
                    tokens = choices[index][option]
                    scores[index][option] = float(log_probabilities[torch.arange(len(tokens)), list(tokens)].sum())
    return scores


def macro_f1(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """Mean over the classes that occur in `labels` of each class's F1."""
    values = []
    for label in sorted(set(labels)):
        hits = sum(1 for a, b in zip(labels, predictions, strict=True) if a == b == label)
        predicted = sum(1 for b in predictions if b == label)
        actual = sum(1 for a in labels if a == label)
        values.append(2 * hits / (predicted + actual))
    return sum(values) / len(values)


def score_classification(
    model: CausalLM,
    tokenizer: TextTokenizer,
    task: Task,
    examples: Sequence[Example],
    *,
    max_seq_length: int,
    compute: Compute,
) -> TaskScore:
    """Accuracy and macro-F1 of the most probable label words."""
    encoded = [encode_choices(task, example, tokenizer, max_seq_length) for example in examples]
    scores = choice_scores(
        model,
        [prompt for prompt, _ in encoded],
        [choices for _, choices in encoded],
        pad_token_id=tokenizer.pad_token_id,
        compute=compute,
    )
    predictions = [max(range(len(row)), key=row.__getitem__) for row in scores]
    labels = [example.label for example in examples if example.label is not None]
    if len(labels) != len(examples):
        raise DataError(f"task {task.name}: {len(examples) - len(labels)} of {len(examples)} examples have no label")
    hits = tuple(float(a == b) for a, b in zip(labels, predictions, strict=True))
    return TaskScore(
        task=task.name,
        metric=task.metric,
        value=sum(hits) / len(hits),
        interval=ratio_interval(hits, [1.0] * len(hits)),
        per_example=hits,
        macro_f1=macro_f1(labels, predictions),
    )


def score_generation(
    model: CausalLM, tokenizer: TextTokenizer, task: Task, examples: Sequence[Example], *,
    max_seq_length: int, max_new_tokens: int = 64, compute: Compute, rows_per_batch: int = 16,
) -> TaskScore:  # fmt: skip
    """ROUGE-L F-measure of greedy responses against the references."""
    from rouge_score.rouge_scorer import RougeScorer  # heavy (nltk): only generation tasks pay for it

    prompts = [encode_prompt(task, example, tokenizer, max_seq_length - max_new_tokens) for example in examples]
    responses: list[list[int]] = []
    with fully_quantized(model), compute.autocast():
        for start in range(0, len(prompts), rows_per_batch):
            responses += generate(
                model, prompts[start : start + rows_per_batch],
                max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    values = tuple(
        float(scorer.score(example.response, tokenizer.decode(response))["rougeL"].fmeasure)
        for example, response in zip(examples, responses, strict=True)
    )
    return TaskScore(
        task=task.name,
        metric=task.metric,
        value=sum(values) / len(values),
        interval=ratio_interval(values, [1.0] * len(values)),
        per_example=values,
    )


def score_task(
    model: CausalLM,
    tokenizer: TextTokenizer,
    task: Task,
    examples: Sequence[Example],
    *,
    max_seq_length: int,
    compute: Compute,
) -> TaskScore:
    """The task's own metric on `examples`.

    Raises:
        DataError: when there are no examples.
    """
    if not examples:
        raise DataError(f"task {task.name} has no examples in this split")
    score: Callable[..., TaskScore] = score_classification if task.kind == "classification" else score_generation
    return score(model, tokenizer, task, examples, max_seq_length=max_seq_length, compute=compute)


Values = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class GapClosure:
    """How much of the gap between a baseline and its control a student closes."""

    value: float | None
    """1: as good as the control; None: undefined, see `reason`."""
    reason: str


def gap_closure(
    baseline: Values, student: Values, control: Values, weights: Values, *, smallest_gap: float
) -> GapClosure:  # fmt: skip
    """(baseline - student) / (baseline - control) for means of paired per-item values, weighted by `weights`.

    Lower is better: pass errors, not accuracies. Undefined when the gap is below `smallest_gap` or 3 standard errors of
    the paired difference, where any ratio would be noise.
    """
    base, mine, best, weight = (np.asarray(x, dtype=np.float64) for x in (baseline, student, control, weights))
    total = weight.sum()
    gap = float((base - best).sum() / total)
    residual = (base - best) - gap * weight
    error = float(np.sqrt((residual**2).sum() * len(weight) / max(len(weight) - 1, 1)) / total)
    if gap < smallest_gap:
        return GapClosure(None, f"undefined: the gap is {gap:.4f}, below {smallest_gap:g}")
    if gap < 3 * error:
        return GapClosure(None, f"undefined: the gap is {gap:.4f}, below 3 standard errors ({3 * error:.4f})")
    return GapClosure(float((base - mine).sum() / total) / gap, f"gap {gap:.4f}, standard error {error:.4f}")
