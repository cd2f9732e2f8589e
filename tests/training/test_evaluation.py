"""Scores against closed forms, and the rule that every score is at lambda = 1 and full SubLN."""

import math

import pytest
import torch

from wrinklefree.data.pretrain_dataset import HeldOut
from wrinklefree.models.bitlinear import quantization_of, set_quantization
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import IGNORE, Batch
from wrinklefree.models.subln import set_subln_strength, subln_strength_of
from wrinklefree.training.device import Compute
from wrinklefree.training.evaluation import (
    choice_scores,
    fully_quantized,
    macro_f1,
    macro_f1_interval,
    score_language,
    score_responses,
)
from wrinklefree.utils.errors import DataError

CPU = Compute(torch.device("cpu"), torch.float32)
ARCHITECTURE = Architecture(
    family="llama",
    vocab_size=16,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=32,
)


def model(bitnet: BitNetSpec | None = None) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(ARCHITECTURE, bitnet)


def held_out() -> HeldOut:
    ids = torch.arange(12).reshape(2, 6) % 16
    labels = torch.tensor([[1, 2, 3, IGNORE, 5, 6], [7, 8, IGNORE, IGNORE, IGNORE, IGNORE]])
    documents = torch.tensor([[0, 0, 0, -1, 1, 1], [2, 2, -1, -1, -1, -1]])
    shape = (2, 6)
    document_ids = torch.tensor([[1, 1, 1, 1, 2, 2], [1, 1, 0, 0, 0, 0]])
    batch = Batch(ids, labels, torch.arange(6).expand(shape), document_ids)
    return HeldOut([batch], [documents], [10, 5, 4], "test")


def test_a_uniform_model_needs_log2_of_the_vocabulary_for_each_token() -> None:
    uniform = model()
    with torch.no_grad():
        for parameter in uniform.parameters():
            parameter.zero_()
    score = score_language(uniform, held_out(), CPU)
    assert score.tokens == 7
    assert score.document_bits == pytest.approx((3 * 4, 2 * 4, 2 * 4))
    assert score.bits_per_byte == pytest.approx(28 / 19)
    assert score.perplexity == pytest.approx(16)


def test_bits_per_byte_equals_dense_cross_entropy() -> None:
    trained = model()
    rows = held_out()
    with torch.no_grad():
        logits = trained(rows.batches[0]).logits()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.batches[0].labels.flatten(), reduction="sum")
    score = score_language(trained, rows, CPU)
    assert score.bits_per_byte == pytest.approx(float(nats) / math.log(2) / 19, rel=1e-5)
    assert score.interval.low <= score.bits_per_byte <= score.interval.high


def test_an_empty_held_out_set_is_an_error() -> None:
    with pytest.raises(DataError, match="held-out set is empty"):
        score_language(model(), HeldOut([], [], [], "none"), CPU)


def test_evaluation_is_fully_quantized_and_restores_what_it_found() -> None:
    ternary = model(BitNetSpec(placement="output", gain="ones"))
    ternary.train()
    set_quantization(ternary, 0.25)
    set_subln_strength(ternary, 0.5)
    with fully_quantized(ternary):
        assert quantization_of(ternary) == subln_strength_of(ternary) == 1.0
        assert not ternary.training
        assert not torch.is_grad_enabled()
    assert (quantization_of(ternary), subln_strength_of(ternary)) == (0.25, 0.5)
    assert ternary.training
    at_quarter = score_language(ternary, held_out(), CPU)
    set_quantization(ternary, 1.0)
    set_subln_strength(ternary, 1.0)
    assert score_language(ternary, held_out(), CPU).document_bits == at_quarter.document_bits


def test_choices_are_scored_by_the_log_probability_of_their_tokens() -> None:
    trained = model()
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    choices = [[[1], [2]], [[3, 4], [5]], [[7], [8]]]
    scores = choice_scores(trained, prompts, choices, pad_token_id=0, compute=CPU, rows_per_batch=2)
    for prompt, options, row in zip(prompts, choices, scores, strict=True):
        for option, score in zip(options, row, strict=True):
            ids = torch.tensor([[*prompt, *option]])
            ones = torch.ones_like(ids)
            with torch.no_grad():
                logits = trained(Batch(ids, ids, torch.arange(ids.shape[1])[None], ones)).logits()[0]
            log_probabilities = logits.log_softmax(-1)
            expected = sum(
                float(log_probabilities[len(prompt) - 1 + place, token]) for place, token in enumerate(option)
            )
            assert score == pytest.approx(expected, abs=1e-4)


def test_macro_f1() -> None:
    # Class 0: precision 1/2, recall 1; class 1: precision 1, recall 1/2: both F1 2/3. Class 2 perfect.
    assert macro_f1([0, 1, 1, 2], [0, 0, 1, 2]) == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_interval_of_macro_f1_holds_the_score_and_shrinks_with_examples() -> None:
    labels, predictions = [0, 1] * 50, [0, 1, 0, 0] * 25
    few = macro_f1_interval(labels, predictions)
    many = macro_f1_interval(labels * 16, predictions * 16)
    score = macro_f1(labels, predictions)
    assert few.low < score < few.high
    assert many.high - many.low == pytest.approx((few.high - few.low) / 4, rel=0.2)


def test_macro_f1_interval_of_perfect_predictions_is_one() -> None:
    interval = macro_f1_interval([0, 1, 2] * 10, [0, 1, 2] * 10)
    assert interval.low == interval.high == 1.0


def test_responses_are_scored_from_the_prompt_on_in_bits_of_their_bytes() -> None:
    from wrinklefree.data.finetune_dataset import encode_examples
    from wrinklefree.data.tasks import Example, Task
    from wrinklefree.utils.tokenizer import train_tokenizer

    words = ["the ship sails home", "the lamp is lit", "a river keeps its bed"]
    tokenizer = train_tokenizer(words * 5, 280)
    task = Task("short", "generation", "rouge_l", (), lambda _: [], lambda: "v1")
    examples = [Example("Say: ", word, "\nSo:", f" {word.split()[-1]}") for word in words]
    architecture = ARCHITECTURE.model_copy(update={"vocab_size": 280})
    torch.manual_seed(1)
    trained = CausalLM(architecture)
    score = score_responses(trained, tokenizer, task, examples, max_seq_length=32, compute=CPU, rows_per_batch=2)
    for piece, bits, size, word in zip(
        encode_examples(task, examples, tokenizer, 32), score.document_bits, score.document_bytes, words, strict=True
    ):
        ids = torch.from_numpy(piece.tokens).long()[None]
        with torch.no_grad():
            logits = trained(Batch(ids, ids, torch.arange(ids.shape[1])[None], torch.ones_like(ids))).logits()[0]
        labels = torch.from_numpy(piece.labels).long()
        expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        assert bits * math.log(2) == pytest.approx(float(expected), rel=1e-4)
        assert size == len(f" {word.split()[-1]}".encode())
