"""The evaluation command: every kind of checkpoint, the table, the JSON, and paired differences."""

import json
import logging
import random
from pathlib import Path

import pytest
import torch

from wrinklefree.cli import evaluate_main
from wrinklefree.models.artifact import write_artifact
from wrinklefree.models.bitlinear import set_quantization
from wrinklefree.models.config import Architecture
from wrinklefree.models.convert import to_bitnet
from wrinklefree.models.hf import save_hf
from wrinklefree.models.llama import CausalLM
from wrinklefree.serving.converter import ConversionOptions, convert
from wrinklefree.training.comparison import Interval
from wrinklefree.training.evaluation import LanguageScore, TaskScore
from wrinklefree.training.evaluation_command import Scores, compare_scores, render_scores
from wrinklefree.training.evaluation_config import parse_evaluation
from wrinklefree.utils.errors import ConfigError, DataError
from wrinklefree.utils.tokenizer import TextTokenizer, train_tokenizer

ARCHITECTURE = Architecture(
    family="llama",
    vocab_size=300,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
WORDS = ["the", "old", "ship", "sails", "over", "a", "wide", "river", "and", "keeps", "its", "lamp", "by", "night"]


def sentence(seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=60)) + "."


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer((sentence(number) for number in range(50)), ARCHITECTURE.vocab_size)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: TextTokenizer) -> Path:
    """`full`, `ternary` (saved with SubLN strength and lambda below 1) and `hf`, all from the same random weights."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = CausalLM(ARCHITECTURE)
    write_artifact(folder / "full", model, tokenizer, {"stage": "fp_sft", "tokens": 0})
    save_hf(model, folder / "hf", tokenizer)
    ternary = to_bitnet(model, placement="output", gain="ones", activation_bits=8, strength=0.0, calibration=[])
    write_artifact(folder / "ternary", ternary, tokenizer, {"stage": "stage1", "tokens": 0})
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    for number in range(120):
        (folder / f"{number}.txt").write_text(sentence(1000 + number))
    return ["data=local", f"data.sources=[{{kind: local, path: '{folder}'}}]", "data.held_out_percent=10.0"]


def test_text_and_task_of_a_ternary_and_a_full_precision_checkpoint(
    models: Path, text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "scores.json"
    arguments = [f"checkpoint={models / 'ternary'}", f"compare={models / 'full'}", "tasks=[text,recall]"]
    assert evaluate_main([*arguments, *text, f"output={output}", "max_examples=20", "dtype=float32"]) == 0
    table = capsys.readouterr().out
    assert f"{models / 'ternary'} (ternary)" in table
    assert f"{models / 'full'} (full precision)" in table
    record = json.loads(output.read_text())
    ternary, full = record["scores"]
    assert ternary["language"]["perplexity"] == pytest.approx(300, rel=0.2), "random weights know nothing"
    low, high = (ternary["language"]["perplexity_interval"][end] for end in ("low", "high"))
    assert low < ternary["language"]["perplexity"] < high
    assert len(ternary["tasks"][0]["per_example"]) == 20
    by_metric = {difference["metric"]: difference for difference in record["differences"]}
    expected = ternary["language"]["bits_per_byte"] - full["language"]["bits_per_byte"]
    assert by_metric["bits_per_byte"]["value"] == pytest.approx(expected)
    assert by_metric["accuracy"]["mcnemar"] is not None


def test_a_hugging_face_folder_scores_as_its_artifact(models: Path, text: list[str], tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    arguments = [f"checkpoint={models / 'hf'}", f"compare={models / 'full'}", *text, f"output={output}"]
    assert evaluate_main([*arguments, "dtype=float32"]) == 0
    [difference] = json.loads(output.read_text())["differences"]
    assert difference["value"] == 0
    assert difference["interval"] == {"low": 0, "high": 0}


def test_a_checkpoint_at_lambda_zero_is_scored_at_one(models: Path, text: list[str], tmp_path: Path) -> None:
    """Stage 1 with a warm-up saves the full-precision function; what is scored is the rounded one."""
    output = tmp_path / "scores.json"
    arguments = [f"checkpoint={models / 'ternary'}", f"compare={models / 'full'}", *text, f"output={output}"]
    assert evaluate_main([*arguments, "dtype=float32"]) == 0
    [difference] = json.loads(output.read_text())["differences"]
    assert difference["value"] != 0


def test_a_packed_file_scores_as_the_checkpoint_that_it_was_made_from(
    tokenizer: TextTokenizer, text: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = to_bitnet(
        CausalLM(ARCHITECTURE), placement="output", gain="ones", activation_bits=8, strength=1.0, calibration=[]
    )
    set_quantization(model, 1.0)
    write_artifact(tmp_path / "ternary", model, tokenizer, {"stage": "stage2", "tokens": 0})
    convert(ConversionOptions(tmp_path / "ternary", tmp_path / "model.gguf"))
    output = tmp_path / "scores.json"
    arguments = [f"checkpoint={tmp_path / 'model.gguf'}", f"compare={tmp_path / 'ternary'}", *text]
    assert evaluate_main([*arguments, f"output={output}", "dtype=float32"]) == 0
    record = json.loads(output.read_text())
    assert [score["kind"] for score in record["scores"]] == ["packed", "ternary"]
    # The file keeps embeddings and norms in 16 bits.
    assert record["differences"][0]["value"] == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cpu_engines_kernels_give_the_same_scores(
    tokenizer: TextTokenizer, text: list[str], tmp_path: Path, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = to_bitnet(
        CausalLM(ARCHITECTURE), placement="output", gain="ones", activation_bits=8, strength=1.0, calibration=[]
    )
    set_quantization(model, 1.0)
    write_artifact(tmp_path / "ternary", model, tokenizer, {"stage": "stage2", "tokens": 0})
    caplog.set_level(logging.INFO)
    losses = []
    for kernels in ("packed", "torch"):
        output = tmp_path / f"{kernels}.json"
        arguments = [f"checkpoint={tmp_path / 'ternary'}", *text, f"output={output}", f"dtype={dtype}"]
        assert evaluate_main([*arguments, f"kernels={kernels}"]) == 0
        assert ("layers run on the CPU engine's kernels" in caplog.text) == (kernels == "packed")
        caplog.clear()
        losses.append(json.loads(output.read_text())["scores"][0]["language"]["bits_per_byte"])
    # The integers are the same; what rounds differently before them moves single codes.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if dtype == "float32" else 2e-3)


def test_kernels_that_cannot_run_a_model_are_refused(
    models: Path, text: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_main([f"checkpoint={models / 'full'}", *text, "kernels=packed"]) == 2
    assert "is not a plain ternary model; use kernels=auto" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "checkpoint: missing; give checkpoint=<folder>"),
        (["checkpoint=nowhere"], 78, "checkpoint nowhere does not exist"),
        (["checkpoint=base", "tasks=[recal]"], 2, "there is no task 'recal' for data.task"),
        (["checkpoint=base", "tasks=[text,text]"], 2, "text stands there twice"),
        (["checkpoint=base", "task=[text]"], 2, "task: unknown key; run_evaluation.py --help lists its own; did you mean tas"),
        (["checkpoint=base", "max_seq_length=99999"], 2, "max_seq_length=99999 is longer than the model's context of 2048"),
        (["checkpoint=base", "data=recall", "data.replay=null", "data.replay_share=0.0"], 2, "data=recall is a task; choose"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert evaluate_main([*arguments, f"output={tmp_path / 'x.json'}"]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate_main([f"checkpoint={tmp_path}"]) == 78
    assert "neither an artifact nor a Hugging Face folder" in capsys.readouterr().err
    (tmp_path / "weights.bin").touch()
    assert evaluate_main([f"checkpoint={tmp_path / 'weights.bin'}"]) == 78
    assert "is a file and no GGUF" in capsys.readouterr().err


def language(bits: tuple[float, ...], sizes: tuple[int, ...]) -> LanguageScore:
    return LanguageScore(sum(bits) / sum(sizes), Interval(0, 9), 1.0, 2.7, 10, bits, sizes)


def test_text_scored_with_another_tokenizer_is_compared_where_both_read() -> None:
    first = Scores("a", "ternary", language((30.0, 20.0, 50.0), (10, 10, 10)), (), None)
    second = Scores("b", "ternary", language((10.0, 10.0), (10, 10)), (), None)
    [(task, metric, difference)] = compare_scores(first, second)
    assert (task, metric) == ("text", "bits_per_byte")
    assert difference.value == pytest.approx(30 / 20)
    other = Scores("b", "ternary", language((10.0, 10.0), (10, 11)), (), None)
    with pytest.raises(DataError, match="different documents"):
        compare_scores(first, other)


def test_the_table_shows_all_rouge_scores() -> None:
    rouge = {name: (value, Interval(0.0, 1.0)) for name, value in (("rouge1", 0.3), ("rouge2", 0.1), ("rougeL", 0.25))}
    task = TaskScore("xsum", "rouge_l", 0.25, Interval(0, 1), (0.25,), rouge=rouge)
    table = render_scores([Scores("a", "ternary", None, (task,), None)], [])
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:]] == ["rouge1", "rouge2", "rougeL"]


def test_a_single_task_needs_no_brackets_and_text_defaults_to_packages() -> None:
    command, config = parse_evaluation(["checkpoint=base", "tasks=recall", "model=smollm2_135m"])
    assert command.tasks == ("recall",)
    assert (config.model.name, config.data.name) == ("smollm2_135m", "packaged")


def test_the_harness_is_asked_for_by_name_of_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from wrinklefree.training import lm_eval_bridge

    monkeypatch.setattr(lm_eval_bridge, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"need the extra eval \(uv sync --extra eval\)"):
        lm_eval_bridge.require_lm_eval()
