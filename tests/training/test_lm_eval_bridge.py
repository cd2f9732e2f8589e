"""The harness's three questions, answered by one of our models and checked against its plain logits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from wrinklefree.data.tokens import start_token_id
from wrinklefree.models.config import Architecture
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.training.device import Compute
from wrinklefree.training.lm_eval_bridge import HarnessRequests, cut_at_stop, evaluate_harness, rolling_rows
from wrinklefree.utils.errors import ConfigError
from wrinklefree.utils.tokenizer import TextTokenizer, train_tokenizer

CPU = Compute(torch.device("cpu"), torch.float32)
TEXTS = ["the old ship sails home", "a lamp is lit by night", "the river keeps its bed"]


@dataclass(frozen=True)
class Request:
    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(TEXTS * 5, 280)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(3)
    architecture = Architecture(
        family="llama", vocab_size=280, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    return CausalLM(architecture)


@pytest.fixture
def harness(model: CausalLM, tokenizer: TextTokenizer) -> HarnessRequests:
    return HarnessRequests(model, tokenizer, compute=CPU, max_seq_length=64)


def log_probabilities(model: CausalLM, ids: list[int]) -> torch.Tensor:
    tensor = torch.tensor([ids])
    with torch.no_grad():
        output = model(Batch(tensor, tensor, torch.arange(len(ids))[None], torch.ones_like(tensor)))
        return output.logits()[0].log_softmax(-1)


def test_loglikelihood_is_the_sum_over_the_continuation(
    harness: HarnessRequests, model: CausalLM, tokenizer: TextTokenizer
) -> None:
    pairs = [("the old ship", " sails home"), ("", "a lamp"), ("the river keeps", " its bed")]
    found = harness.loglikelihood([Request(pair) for pair in pairs])
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        ids = [start_token_id(tokenizer), *tokenizer.encode(context + continuation)]
        targets = len(tokenizer.encode(context + continuation)) - len(tokenizer.encode(context))
        table = log_probabilities(model, ids)
        places = range(len(ids) - targets, len(ids))
        assert value == pytest.approx(sum(float(table[place - 1, ids[place]]) for place in places), abs=1e-4)
        assert greedy == all(int(table[place - 1].argmax()) == ids[place] for place in places)


def test_a_space_at_the_end_of_the_context_belongs_to_the_continuation(harness: HarnessRequests) -> None:
    [with_space, without] = harness.loglikelihood([Request(("the old ", "ship")), Request(("the old", " ship"))])
    assert with_space == without


def test_greedy_is_true_for_what_the_model_would_say(harness: HarnessRequests, tokenizer: TextTokenizer) -> None:
    [text] = harness.generate_until([Request(("the old", {"until": [], "max_gen_toks": 3}))])
    ids = tokenizer.encode("the old" + text)
    if ids[: len(tokenizer.encode("the old"))] != tokenizer.encode("the old"):
        pytest.skip("this text joins tokens across the border: pick other weights")
    [(_, greedy)] = harness.loglikelihood([Request(("the old", text))])
    assert greedy


@pytest.mark.parametrize(("count", "length"), [(1, 8), (7, 8), (8, 8), (20, 8), (21, 8)])
def test_rolling_rows_predict_every_token_once_with_full_rows(count: int, length: int) -> None:
    ids = list(range(100, 100 + count))
    rows = rolling_rows(ids, 0, length)
    predicted = [token for row, targets in rows for token in row[-targets:]]
    assert predicted == ids
    assert rows[0][0][0] == 0
    assert all(len(row) <= length for row, _ in rows)
    assert all(len(row) == length for row, _ in rows[1:]), "later rows see as much context as fits"


def test_rolling_loglikelihood_of_a_short_text_is_its_loglikelihood(harness: HarnessRequests) -> None:
    rolling = harness.loglikelihood_rolling([Request((text,)) for text in TEXTS])
    plain = harness.loglikelihood([Request(("", text)) for text in TEXTS])
    assert rolling == pytest.approx([value for value, _ in plain], abs=1e-4)


def test_an_empty_text_has_probability_one(harness: HarnessRequests) -> None:
    assert harness.loglikelihood_rolling([Request(("",))]) == [0.0]


def test_text_ends_before_the_first_stop() -> None:
    assert cut_at_stop("one. two\nthree", ["\n", "two"]) == "one. "
    assert cut_at_stop("one", ["", "x"]) == "one"


def test_sampling_is_refused(harness: HarnessRequests) -> None:
    with pytest.raises(ConfigError, match="do_sample"):
        harness.generate_until([Request(("a", {"do_sample": True, "temperature": 0.7}))])


def test_a_continuation_longer_than_a_row_is_refused(harness: HarnessRequests) -> None:
    with pytest.raises(ConfigError, match="raise max_seq_length=64"):
        harness.loglikelihood([Request(("a", " ship sails" * 60))])


def test_a_local_task_runs_in_the_harness(model: CausalLM, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval (uv sync --extra eval)")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "the old", "choices": [" ship", " lamp"], "answer": 0}\n' * 4)
    (tmp_path / "ours.yaml").write_text(
        f"""task: ours
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{rows}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""
    )
    found = evaluate_harness(
        model, tokenizer, ["ours"], compute=CPU, max_seq_length=64, max_examples=None, task_folder=tmp_path
    )
    assert found["ours"]["acc,none"] in (0.0, 1.0), "four equal questions have one answer"
    with pytest.raises(ConfigError, match="has no task theirs"):
        evaluate_harness(
            model, tokenizer, ["theirs"], compute=CPU, max_seq_length=64, max_examples=None, task_folder=tmp_path
        )
