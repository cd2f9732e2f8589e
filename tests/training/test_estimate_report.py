"""What `estimate=true` prints: through the command line, without a network, a GPU or a run."""

import re
from pathlib import Path

import pytest

from wrinklefree import cli
from wrinklefree.composition import compose
from wrinklefree.training import run
from wrinklefree.training.estimate_report import markdown_row, run_estimate, stage_lines
from wrinklefree.training.estimator import Estimate, estimate_stage, gib

LLAMA = ("model=llama_7b", "training=stage3_distill", "distributed=fsdp_multi")


def estimate_of(*overrides: str) -> Estimate:
    return estimate_stage(compose(list(overrides)).config)


def test_the_command_prints_every_part_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "run", lambda *arguments: pytest.fail("a run began"))
    monkeypatch.chdir(tmp_path)
    assert cli.train_main([*LLAMA, "estimate=true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "stage 3: distillation fine-tuning of llama_7b on 8 x h100_80gb, distributed=fsdp_multi, bfloat16, adamw, "
        "checkpointing selective: estimated"
    )
    keys = [re.split(r"  +", line.strip())[0] for line in lines if line.startswith("  ")]
    for key in (
        "float32 masters", "compute copies of weights", "gradients", "optimizer state", "activations",
        "logits chunk and head", "relations and layer losses", "teacher", "total", "weights gathered",
        "gradients reduced", "to and from the host", "a step", "the run", "price",
    ):  # fmt: skip
        assert key in keys, key
    assert list(tmp_path.iterdir()) == []


def test_shown_parts_add_up_to_the_shown_total() -> None:
    estimate = estimate_of(*LLAMA)
    lines = stage_lines(estimate)
    total = next(line for line in lines if line.strip().startswith("total"))
    assert gib(sum(estimate.memory.parts.values())) in total
    assert "of 79.6 GiB: fits" in total


def test_assumptions_are_called_so_and_given_values_given() -> None:
    assumed = "\n".join(stage_lines(estimate_of(*LLAMA)))
    assert "30% of 989 TFLOP/s (assumed, not measured)" in assumed
    assert "$2.95 a device and hour (assumed, mid-2026)" in assumed
    given = "\n".join(stage_lines(estimate_of(*LLAMA, "estimation.efficiency=0.4", "estimation.price_per_hour=2")))
    assert "40% of 989 TFLOP/s (given)" in given
    assert "$2.00 a device and hour (given)" in given


def test_what_does_not_fit_is_told_what_would() -> None:
    text = "\n".join(
        stage_lines(estimate_of("model=qwen3_4b", "training=stage2_pretrain", "estimation.device=a100_80gb"))
    )
    assert "DOES NOT FIT" in text
    offers = re.findall(r"would fit +(\S+=\S+)", text)
    assert offers[0] == "training.activation_checkpointing=true"
    assert len(offers) == 3


def test_a_pipeline_ends_with_the_sum_over_its_seeds() -> None:
    overrides = ["model=smollm2_135m", "seeds=3"]
    text = run_estimate(compose(overrides).config, overrides)
    assert [line[3:] for line in text.splitlines() if line.startswith("== ")] == [
        "teacher", "stage1", "bitnet_sft", "stage1_9", "stage2", "stage3", "control_pretrain", "control",
    ]  # fmt: skip
    assert "the whole job of smollm2_135m, for 3 seeds: estimated" in text
    steps = [int(n.replace(",", "")) for n in re.findall(r"the run +[\d,]+ steps, ([\d,]+) tokens", text)]
    total = re.search(r"  tokens +([\d,]+)", text)
    assert total is not None
    assert int(total[1].replace(",", "")) == 3 * sum(steps)


def test_a_markdown_row_names_what_does_not_fit() -> None:
    row = markdown_row("Stage 2", estimate_of("model=llama_7b", "training=stage2_pretrain"))
    assert row.startswith("| Stage 2 | ")
    assert "(does not fit) | 8 | 1024 | 1 x h100_80gb |" in row
    stage1 = markdown_row("Stage 1", estimate_of("model=llama_7b", "training=stage1_subln"))
    assert stage1 == "| Stage 1 | none; 50.2 GiB of the host | 8 | 1024 | CPU | conversion |"
