"""Scores that count: always at lambda = 1 and full SubLN strength, whatever the training step was at.

Bits per byte over held-out documents (comparable across tokenizers, low noise), and task scores. Intervals are
percentile bootstraps: over documents for bits per byte, over examples for task scores.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from wrinklefree.data.finetune_dataset import encode_choices, encode_examples, encode_prompt
from wrinklefree.data.pretrain_dataset import HeldOut
from wrinklefree.data.tasks import Example, Task
from wrinklefree.distillation.cross_entropy import target_nll
from wrinklefree.models.bitlinear import quantization_of, set_quantization
from wrinklefree.models.generate import generate
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import IGNORE, Batch
from wrinklefree.models.subln import set_subln_strength, subln_strength_of
from wrinklefree.training.comparison import BOOTSTRAP_SAMPLES, Interval, ratio_interval
from wrinklefree.training.device import Compute
from wrinklefree.utils.errors import DataError
from wrinklefree.utils.tokenizer import TextTokenizer

ROUGE = ("rouge1", "rouge2", "rougeL")


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
    perplexity_interval: Interval | None = None
    """Over documents; perplexity is per token, so it compares models with one tokenizer only."""


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
    macro_f1_interval: Interval | None = None
    rouge: Mapping[str, tuple[float, Interval]] | None = None
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures with their intervals; None for classification."""


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


def score_language(model: CausalLM, held_out: HeldOut, compute: Compute) -> LanguageScore:
    """Bits per byte, perplexity and their interval on held-out documents.

    Raises:
        DataError: when the held-out set is empty.
    """
    if not held_out.document_bytes:
        raise DataError("the held-out set is empty; raise data.held_out_percent or add text")
    nats = torch.zeros(len(held_out.document_bytes), dtype=torch.float64)
    counts = torch.zeros(len(held_out.document_bytes), dtype=torch.float64)
    with fully_quantized(model):
        for batch, documents in zip(held_out.batches, held_out.document_index, strict=True):
            moved = batch.to(compute.device)
            with compute.autocast():
                losses = target_nll(model(moved), moved.labels)
            targets = batch.labels != IGNORE
            owners = documents[targets].long()
            nats.index_add_(0, owners, losses.double().cpu()[targets])
            counts.index_add_(0, owners, torch.ones(len(owners), dtype=torch.float64))
    return _language_score(nats.tolist(), counts.tolist(), held_out.document_bytes)


def _language_score(nats: Sequence[float], counts: Sequence[float], sizes: Sequence[int]) -> LanguageScore:
    """The score of items with these nats, target tokens and bytes."""
    bits = [value / math.log(2) for value in nats]
    tokens = int(sum(counts))
    mean_nats = sum(nats) / tokens
    nats_interval = ratio_interval(nats, counts)
    return LanguageScore(
        bits_per_byte=sum(bits) / sum(sizes),
        interval=ratio_interval(bits, sizes),
        nats_per_token=mean_nats,
        perplexity=_perplexity(mean_nats),
        perplexity_interval=Interval(_perplexity(nats_interval.low), _perplexity(nats_interval.high)),
        tokens=tokens,
        document_bits=tuple(bits),
        document_bytes=tuple(sizes),
    )


def _perplexity(nats_per_token: float) -> float:
    return math.exp(min(nats_per_token, 700.0))  # beyond that a float ends


def padded_batch(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Batch, torch.Tensor]:
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
            batch, lengths = padded_batch([rows[row] for row in picked], pad_token_id)
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


def macro_f1_interval(labels: Sequence[int], predictions: Sequence[int], *, seed: int = 0) -> Interval:
    """95% bootstrap interval of macro-F1 over examples, over the classes of the whole set."""
    truth, guess = np.asarray(labels), np.asarray(predictions)
    classes = np.unique(truth)
    # [examples, classes]: right, and the two halves of F1's denominator.
    right = ((truth[:, None] == classes) & (guess[:, None] == classes)).astype(np.float64)
    either = (truth[:, None] == classes).astype(np.float64) + (guess[:, None] == classes)
    times = np.random.default_rng(seed).multinomial(len(truth), np.full(len(truth), 1 / len(truth)), BOOTSTRAP_SAMPLES)
    hits, total = times @ right, times @ either
    values = (2 * hits / np.maximum(total, 1)).sum(axis=1) / np.maximum((total > 0).sum(axis=1), 1)
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(float(low), float(high))


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
        macro_f1_interval=macro_f1_interval(labels, predictions),
    )


def score_generation(
    model: CausalLM, tokenizer: TextTokenizer, task: Task, examples: Sequence[Example], *,
    max_seq_length: int, max_new_tokens: int = 64, compute: Compute, rows_per_batch: int = 16,
) -> TaskScore:  # fmt: skip
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures of greedy responses against the references; ROUGE-L is the headline."""
    from rouge_score.rouge_scorer import RougeScorer  # heavy (nltk): only generation tasks pay for it

    prompts = [encode_prompt(task, example, tokenizer, max_seq_length - max_new_tokens) for example in examples]
    responses: list[list[int]] = []
    with fully_quantized(model), compute.autocast():
        for start in range(0, len(prompts), rows_per_batch):
            responses += generate(
                model, prompts[start : start + rows_per_batch],
                max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    found = [
        scorer.score(example.response, tokenizer.decode(response))
        for example, response in zip(examples, responses, strict=True)
    ]
    values = {name: tuple(float(scores[name].fmeasure) for scores in found) for name in ROUGE}
    ones = [1.0] * len(found)
    rouge = {name: (sum(each) / len(each), ratio_interval(each, ones)) for name, each in values.items()}
    return TaskScore(
        task=task.name,
        metric=task.metric,
        value=rouge["rougeL"][0],
        interval=rouge["rougeL"][1],
        per_example=values["rougeL"],
        rouge=rouge,
    )


def score_responses(
    model: CausalLM, tokenizer: TextTokenizer, task: Task, examples: Sequence[Example], *,
    max_seq_length: int, compute: Compute, rows_per_batch: int = 32,
) -> LanguageScore:  # fmt: skip
    """How well the model predicts the reference responses, the end token included: bits per byte by example.

    Far less noisy than the overlap of generated words, and it needs no decoding.

    Raises:
        DataError: when there are no examples.
    """
    if not examples:
        raise DataError(f"task {task.name} has no examples in this split")
    pieces = encode_examples(task, examples, tokenizer, max_seq_length)
    nats: list[float] = []
    with fully_quantized(model):
        for start in range(0, len(pieces), rows_per_batch):
            picked = pieces[start : start + rows_per_batch]
            batch, lengths = padded_batch([piece.tokens.tolist() for piece in picked], tokenizer.pad_token_id)
            labels = torch.full_like(batch.labels, IGNORE)
            for row, piece in enumerate(picked):
                labels[row, : int(lengths[row])] = torch.from_numpy(piece.labels)
            moved = replace(batch, labels=labels).to(compute.device)
            with compute.autocast():
                losses = target_nll(model(moved), moved.labels)
            nats += losses.double().sum(dim=1).cpu().tolist()
    counts = [float((piece.labels != IGNORE).sum()) for piece in pieces]
    texts = ([int(token) for token in piece.labels if token != IGNORE] for piece in pieces)
    sizes = [len(tokenizer.decode([id_ for id_ in ids if id_ != tokenizer.eos_token_id]).encode()) for ids in texts]
    return _language_score(nats, counts, sizes)


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
