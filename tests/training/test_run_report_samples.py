"""Samples of a run: prompts out of its held-out data, continued as the trained model serves, never at the run's cost."""

import json
from pathlib import Path

import pytest
import torch

from wrinklefree.data.pretrain_dataset import HeldOut
from wrinklefree.data.tasks import get_task
from wrinklefree.models.bitlinear import quantization_of, set_quantization
from wrinklefree.models.config import Architecture
from wrinklefree.models.convert import to_bitnet
from wrinklefree.models.generate import generate
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.training.callbacks import RunInfo
from wrinklefree.training.device import Compute
from wrinklefree.training.evaluation import fully_quantized
from wrinklefree.training.run_report_samples import (
    NEW_TOKENS,
    Prompt,
    Samples,
    Validation,
    read_samples,
    task_prompt,
    text_prompt,
)
from wrinklefree.utils.tokenizer import TextTokenizer, train_tokenizer

ARCHITECTURE = Architecture(
    family="llama", vocab_size=270, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
)  # fmt: skip
CPU = Compute(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(["the old ship sails over the red sea " * 3] * 4, ARCHITECTURE.vocab_size)


@pytest.fixture
def model() -> CausalLM:
    torch.manual_seed(0)
    made = to_bitnet(
        CausalLM(ARCHITECTURE), placement="none", gain="ones", activation_bits=8, strength=1.0, calibration=[]
    )
    set_quantization(made, 0.25)
    return made.train()


def run_to_its_end(samples: Samples, folder: Path) -> None:
    samples.on_start(RunInfo("stage2", folder, 1, 0))
    samples.on_end(None)


def test_samples_are_the_greedy_tokens_of_the_served_model(
    model: CausalLM, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    ids = [tokenizer.eos_token_id, *tokenizer.encode("the old ship")]
    generator = torch.get_rng_state()
    run_to_its_end(Samples(model, tokenizer, CPU, [Prompt("text", tuple(ids))]), tmp_path)
    with fully_quantized(model):
        [expected] = generate(model, [ids], max_new_tokens=NEW_TOKENS, eos_token_id=tokenizer.eos_token_id)
    [sample] = read_samples(tmp_path)
    assert (sample.source, sample.prompt) == ("text", "the old ship")
    assert sample.continuation == tokenizer.decode(expected)
    assert quantization_of(model) == 0.25
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_prompt_near_the_end_of_the_context_is_continued_as_far_as_there_is_room(
    model: CausalLM, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    prompts = [Prompt("text", (tokenizer.eos_token_id,) + (7,) * length) for length in (60, 63, 80)]
    run_to_its_end(Samples(model, tokenizer, CPU, prompts), tmp_path)
    assert [sample.continuation == "" for sample in read_samples(tmp_path)] == [False, True, True]


def test_a_failure_costs_the_samples_alone(
    model: CausalLM, tokenizer: TextTokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "samples.json").write_text('[{"source": "old", "prompt": "", "continuation": ""}]')
    run_to_its_end(Samples(model, tokenizer, CPU, [Prompt("text", (10**9,))]), tmp_path)
    assert "no samples of this run (IndexError" in caplog.text
    assert read_samples(tmp_path) == []
    assert quantization_of(model) == 0.25


@pytest.mark.parametrize("content", ["", "[{", '[{"prompt": 1}]', "[1]", "{}"])
def test_a_damaged_file_holds_no_samples(content: str, tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text(content)
    assert read_samples(tmp_path) == []


def test_the_prompt_of_a_text_is_half_of_its_first_document() -> None:
    ids = torch.arange(100).reshape(2, 50)
    documents = torch.ones(2, 50, dtype=torch.int64)
    documents[0, 10:] = 2
    batch = Batch(ids, ids, ids, documents)
    assert text_prompt(HeldOut([batch], [documents], [10], "")).ids == (0, 1, 2, 3, 4)
    documents[0] = 1
    assert text_prompt(HeldOut([batch], [documents], [10], "")).ids == tuple(range(24))


def test_the_prompt_of_a_task_is_its_question(tokenizer: TextTokenizer) -> None:
    task = get_task("recall")
    example = task.load("validation")[0]
    prompt = task_prompt(task, example, tokenizer, 512)
    assert prompt.source == "recall, validation"
    assert tokenizer.decode(prompt.ids[1:]) == example.prompt


def test_a_validation_is_all_its_scores() -> None:
    validation = Validation([lambda: {"a": 1.0}, lambda: {"b": 2.0, "c": 3.0}], [])
    assert json.dumps(validation()) == '{"a": 1.0, "b": 2.0, "c": 3.0}'
