"""Every command that the project was asked to answer composes and decodes, or says what is not there yet."""

from pathlib import Path

import pytest

from benchmark.config.settings import read_settings
from wrinklefree import cli
from wrinklefree.composition import compose

TRAIN: list[tuple[str, dict[str, object]]] = [
    ("", {"model": "tiny", "stage": "bitdistill"}),
    ("model=qwen3_4b training=stage1_subln distributed=single_gpu", {"model": "qwen3_4b", "stage": "stage1"}),
    (
        "model=qwen3_4b training=stage1_9_layerwise data=fineweb distributed=single_gpu",
        {"stage": "stage1_9", "data": "fineweb"},
    ),
    (
        "model=qwen3_4b training=stage2_pretrain data=fineweb distributed=fsdp_multi",
        {"stage": "stage2", "distributed": "fsdp_multi", "total_tokens": 10_000_000_000},
    ),
    (
        "model=qwen3_4b training=stage3_distill data=downstream distillation=classification distributed=fsdp_multi",
        {"stage": "stage3", "data": "downstream", "offload": True},
    ),
    ("model=smollm2_135m training=stage1_subln distributed=single_gpu", {"stage": "stage1"}),
    ("model=smollm2_135m training=stage2_pretrain data=fineweb distributed=single_gpu", {"stage": "stage2"}),
    (
        "model=smollm2_135m training=stage3_distill_smollm2 data=downstream distillation=classification "
        "distributed=single_gpu",
        {"stage": "stage3", "batch_size": 8, "offload": False},
    ),
    (
        "model=smollm2_135m training=stage3_distill_smollm2 training.batch_size=4 training.max_seq_length=512 "
        "distributed=single_gpu",
        {"batch_size": 4, "max_seq_length": 512, "data": "downstream"},
    ),
    ("training=stage1_subln model=smollm2_135m", {"stage": "stage1", "model": "smollm2_135m"}),
    ("training=stage1_9_layerwise model=smollm2_135m data=fineweb", {"stage": "stage1_9", "total_tokens": 100_000_000}),
    (
        "training=stage2_pretrain model=smollm2_135m data=fineweb training.total_tokens=10000000000",
        {"total_tokens": 10_000_000_000},
    ),
    ("training=stage3_distill model=smollm2_135m data=downstream", {"stage": "stage3"}),
    (
        "training=stage3_distill model=smollm2_135m distillation.lambda_logits=5.0 distillation.gamma_attention=1e-4",
        {"lambda_logits": 5.0, "gamma_attention": 1e-4},
    ),
    # with torchrun --nproc_per_node=4 and 8 before the script
    ("model=llama_7b training=stage3_distill distributed=fsdp_multi", {"distributed": "fsdp_multi"}),
    ("model=llama_7b training=stage3_distill distributed=fsdp_large", {"distributed": "fsdp_large"}),
    *((f"model={name}", {"model": name}) for name in ("qwen3_4b", "smollm2_135m", "llama_3b", "llama_7b", "qwen_7b")),
    (
        "model=smollm2_135m training.lr=5e-5 training.batch_size=16 model.quantization.activation_bits=8",
        {"lr": 5e-5, "batch_size": 16, "stage": "bitdistill"},
    ),
    ("model=smollm2_135m training=stage2_pretrain", {"stage": "stage2"}),
    ("model=smollm2_135m training=stage2_pretrain +skip_recovery=true", {"skip_recovery": True}),
    ("model=qwen3_4b optimizer.type=adamw_8bit", {"type": "adamw_8bit"}),
]

BENCHMARK: list[tuple[str, dict[str, object]]] = [
    ("", {"num_trials": 50, "output_dir": "benchmark_results"}),
    ("benchmark.num_trials=10", {"num_trials": 10}),
    ("benchmark.measurement_steps=200", {"measurement_steps": 200}),
    ("benchmark.sequence_length=1024", {"sequence_length": 1024}),
    ("benchmark.use_synthetic_data=false", {"use_synthetic_data": False}),
]


@pytest.mark.parametrize(("command", "expected"), TRAIN, ids=[command or "no argument" for command, _ in TRAIN])
def test_training_commands_decode_to_what_they_say(command: str, expected: dict[str, object]) -> None:
    config, tree = compose(command.split())
    training = tree["training"]
    found = {
        **{name: tree[name]["name"] for name in ("model", "data", "distributed")},
        **{name: training.get(name) for name in ("stage", "lr", "batch_size", "max_seq_length", "total_tokens")},
        "offload": training.get("teacher", {}).get("offload"),
        "type": config.optimizer.type,
        "lambda_logits": config.distillation.lambda_logits,
        "gamma_attention": config.distillation.gamma_attention,
        "skip_recovery": config.skip_recovery,
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(("command", "expected"), BENCHMARK)
def test_benchmark_commands_decode_to_what_they_say(command: str, expected: dict[str, object]) -> None:
    told = read_settings(command.split()).benchmark.model_dump()
    assert {name: told[name] for name in expected} == expected


@pytest.mark.parametrize("flag", ["--resume", "--analyze-only"])
def test_a_benchmark_that_is_not_there_is_said_so(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.benchmark_main([flag, "benchmark_results/experiment.json"]) == 2
    assert "error: benchmark_results/experiment.json does not exist; give the" in capsys.readouterr().err


def test_the_conversion_command_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.convert_main(["--input", "outputs/checkpoint-final", "--output", "outputs/model.gguf"]) == 78
    message = "error: outputs/checkpoint-final does not exist; pass an artifact or a stage's output folder\n"
    assert capsys.readouterr().err == message


def test_the_serving_command_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.serve_main(["--model", "outputs/model.gguf", "--port", "8080"]) == 2
    message = "error: outputs/model.gguf does not exist; give a GGUF file or a checkpoint folder\n"
    assert capsys.readouterr().err == message
