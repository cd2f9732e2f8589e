"""The stages one after another as a user types them, and all of them as the pipeline."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from wrinklefree.cli import train_main
from wrinklefree.data.tokens import start_token_id
from wrinklefree.models.artifact import read_artifact
from wrinklefree.models.bitlinear import quantization_of
from wrinklefree.models.gguf_weights import load_gguf_model
from wrinklefree.models.records import Batch
from wrinklefree.quantization.weight_quant import ternarize
from wrinklefree.training import export
from wrinklefree.utils.errors import EngineError

SHORT = ["training.batch_size=4", "training.max_seq_length=64"]
STEPS = ["training.gradient_accumulation_steps=1", "training.max_steps=3", "training.evaluation.max_tokens=500"]
TASK = ["data=downstream", "data.task=recall", "data.max_examples=40"]


def run(*arguments: str) -> None:
    assert train_main(list(arguments)) == 0


def logits(artifact: Path) -> torch.Tensor:
    record = read_artifact(artifact)
    model, tokenizer = record.load_model(), record.load_tokenizer()
    ids = torch.tensor([[start_token_id(tokenizer), *tokenizer.encode("the old ship sails")]])
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        return model(Batch(ids, ids, positions, torch.ones_like(ids))).logits()


def test_stages_hand_over_and_find_each_other(
    overrides: list[str], text: list[str], tmp_path: Path, micro_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    outputs = tmp_path / "outputs"
    run(*overrides, "training=stage1_subln", *text, *SHORT, "subln.warmup=true")
    stage1 = outputs / "bitdistill_tiny_subln_insertion" / "stage1_checkpoint"
    # Strength 0 and lambda 0: stage 1 with a warm-up keeps the function exactly.
    assert torch.equal(logits(stage1), logits(micro_model))

    ramp = ["training.quantization_warmup.schedule=linear", "training.quantization_warmup.share=0.5"]
    run(*overrides, "training=stage1_9_layerwise", *text, *SHORT, *STEPS, *ramp)
    aligned = read_artifact(outputs / "bitdistill_tiny_layerwise_distillation")
    assert aligned.bitnet is not None
    assert (aligned.bitnet.quantization_lambda, aligned.bitnet.subln_strength) == (1.0, 1.0)

    run(*overrides, "training=stage2_pretrain", *text, *SHORT, *STEPS)
    stage2 = read_artifact(outputs / "bitdistill_tiny_continue_pretrain" / "stage2_checkpoint")
    assert [stage for stage, _ in stage2.lineage["ancestors"]] == ["stage1", "stage1_9", "stage2"]
    assert quantization_of(stage2.load_model()) == 1.0
    assert stage2.lineage["tokens"] == 3 * 4 * 64

    assert "the base model teaches" not in caplog.text
    run(*overrides, "training=stage3_distill", *TASK, *SHORT, *STEPS)
    assert "the base model teaches" in caplog.text
    run(*overrides, "training=fp_sft", *TASK, *SHORT, *STEPS)
    caplog.clear()
    run(*overrides, "training=stage3_distill", *TASK, *SHORT, *STEPS)
    assert "the base model teaches" not in caplog.text
    stage3 = read_artifact(outputs / "bitdistill_tiny_distillation")
    assert [(p["role"], p["stage"]) for p in stage3.lineage["parents"]] == [("init", "stage2"), ("teacher", "fp_sft")]
    runs = list((outputs / "bitdistill_tiny_distillation" / "runs").iterdir())
    assert len(runs) == 2, "another teacher is another run"

    caplog.clear()
    run(*overrides, "training=stage2_pretrain", *text, *SHORT, *STEPS)
    assert "already complete" in caplog.text
    run(*overrides, "training=stage1_subln", *text, *SHORT, "subln.gain=ones")
    caplog.clear()
    # The chain of 1.9 and 2 was made from the other stage 1.
    assert train_main([*overrides, "training=stage2_pretrain", *text, *SHORT, *STEPS]) == 78
    run(*overrides, "training=stage2_pretrain", *text, *SHORT, *STEPS, f"training.init_from={stage1.resolve()}")
    assert "already complete" not in caplog.text


def test_the_base_model_teaches_stage_2_where_its_logits_have_a_weight(
    overrides: list[str], text: list[str], tmp_path: Path
) -> None:
    run(*overrides, "training=stage1_subln", *text, *SHORT)
    run(*overrides, "training=stage2_pretrain", *text, *SHORT, *STEPS)
    run(*overrides, "training=stage2_pretrain", *text, *SHORT, *STEPS, "training.logits.weight=1")
    runs = (tmp_path / "outputs" / "bitdistill_tiny_continue_pretrain" / "runs").iterdir()
    metrics = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in runs]
    plain, taught = sorted(metrics, key=lambda lines: "logits" in lines[0]["terms"])
    assert "logits" not in plain[0]["terms"]
    assert taught[0]["terms"]["logits"] > 0
    assert taught[0]["terms"]["cross_entropy"] == plain[0]["terms"]["cross_entropy"]
    assert taught[0]["loss"] == pytest.approx(sum(taught[0]["terms"].values()))
    artifact = read_artifact(tmp_path / "outputs" / "bitdistill_tiny_continue_pretrain" / "stage2_checkpoint")
    assert [parent["role"] for parent in artifact.lineage["parents"]] == ["init", "teacher"]


def test_metrics_and_plot_of_a_run(overrides: list[str], text: list[str], tmp_path: Path) -> None:
    run(*overrides, "training=fp_pretrain", *text, *SHORT, *STEPS)
    [folder] = (tmp_path / "outputs" / "bitdistill_tiny_fp_pretrain" / "runs").iterdir()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3]
    assert lines[0]["loss"] == pytest.approx(math.log(320), rel=0.1)
    assert 2 < lines[-1]["evaluation"]["bits_per_byte"] < 9
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "completed" in page
    assert "Samples (greedy)" in page
    assert json.loads((folder / "metadata.json").read_text())["resolved"]["optimizer"] == "adamw"


def test_loss_after_load_is_loss_before_save(overrides: list[str], text: list[str], tmp_path: Path) -> None:
    """The artifact of a run scores what its last validation scored."""
    run(*overrides, "training=stage1_subln", *text, *SHORT)
    run(*overrides, "training=stage2_pretrain", *text, *SHORT, *STEPS)
    [folder] = (tmp_path / "outputs" / "bitdistill_tiny_continue_pretrain" / "runs").iterdir()
    before = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["evaluation"]

    from wrinklefree.composition import compose
    from wrinklefree.training.device import choose_compute
    from wrinklefree.training.run import make_validation

    config = compose([*overrides, "training=stage2_pretrain", *text, *SHORT, *STEPS]).config
    artifact = read_artifact(folder / "artifact")
    validate = make_validation(config, artifact.load_model(), artifact.load_tokenizer(), choose_compute("auto"))
    assert validate is not None
    assert validate() == before


def pipeline_steps(corpus: Path) -> list[str]:
    text = f"data=local,\"data.sources=[{{kind: local, path: '{corpus}'}}]\""
    task = "data=downstream,data.task=recall,data.max_examples=40"
    steps = {
        "teacher": f"training=fp_sft,{task}",
        "stage1": f"training=stage1_subln,{text}",
        "bitnet_sft": f"training=bitnet_sft,{task}",
        "stage1_9": f"training=stage1_9_layerwise,{text}",
        "stage2": f"training=stage2_pretrain,{text}",
        "stage3": f"training=stage3_distill,{task}",
        "control_pretrain": f"training=fp_pretrain,{text}",
        "control": f"training=fp_sft,{task}",
    }
    return [f"training.steps.{name}=[{quoted(arguments)}]" for name, arguments in steps.items()]


def quoted(arguments: str) -> str:
    """Each argument in quotes, as Hydra's lists need them where an argument holds an equals sign."""
    parts, inside = [""], False
    for character in arguments:
        inside ^= character == '"'
        if character == "," and not inside:
            parts.append("")
        elif character != '"':
            parts[-1] += character
    return ",".join('"' + part + '"' for part in parts)


def test_the_pipeline_trains_every_arm_once(
    overrides: list[str],
    corpus: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    small = ["training.batch_size=4", "training.max_seq_length=64", "training.evaluation_tokens=500"]
    every = ["training.gradient_accumulation_steps=1"]
    command = [*overrides, *pipeline_steps(corpus), *small, *every, "training.lr=1e-3"]
    lengths = ["training.steps.stage2", "training.steps.stage1_9", "training.steps.control_pretrain"]
    command = [
        text[:-1] + ',"training.total_tokens=1024"]' if text.startswith(tuple(lengths)) else text for text in command
    ]
    run(*command)
    outputs = tmp_path / "outputs"
    report = json.loads((outputs / "pipeline_tiny" / "report" / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["full precision", "control", "naive ternary", "BitNet-SFT", "BitDistill"]
    extra = rows["BitDistill"]["tokens"] - rows["BitNet-SFT"]["tokens"]
    assert extra == rows["control"]["tokens"] - rows["full precision"]["tokens"] == 2048
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3)
    assert rows["full precision"]["size"]["linear"] == 2 * linear
    assert rows["BitDistill"]["size"]["linear"] == linear // 4
    final = read_artifact(outputs / "checkpoint-final")
    assert final.lineage["stage"] == "stage3"
    control = read_artifact(report["paths"]["control"])
    assert [stage for stage, _ in control.lineage["ancestors"]] == ["fp_pretrain", "fp_sft"]
    assert report["export"]["path"] == str(outputs / "pipeline_tiny" / "model.gguf")
    assert "serve.py --model" in (outputs / "pipeline_tiny" / "report" / "report.md").read_text()
    page = (outputs / "pipeline_tiny" / "report" / "report.html").read_text(encoding="utf-8")
    assert "8 of 8 steps done" in page
    assert "serve.py --model" in page
    assert page.count("stage3: loss") == 2  # a caption, and its label for screen readers
    loaded, _ = load_gguf_model(outputs / "pipeline_tiny" / "model.gguf")
    trained = final.load_model()
    for name, weight in loaded.named_parameters():
        if name.endswith("_proj.weight"):
            assert torch.equal(weight.sign(), ternarize(trained.get_parameter(name)).codes)

    caplog.clear()
    run(*command)
    assert "the whole job is already complete" in caplog.text
    assert "step 1/" not in caplog.text

    def no_engine(*_: object, **__: object) -> None:
        raise EngineError("llama.cpp refuses the file")

    # A report without its file is no complete job: what failed is tried again, and fails as loudly.
    (outputs / "pipeline_tiny" / "report" / "model.gguf").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(export, "open_engine", no_engine)
        for _ in range(2):
            assert train_main(list(command)) == EngineError.exit_code
            record = json.loads((outputs / "pipeline_tiny" / "report" / "report.json").read_text())
            assert record["export"] is None
    run(*command)
    assert json.loads((outputs / "pipeline_tiny" / "report" / "report.json").read_text())["export"] is not None


def test_the_plan_of_the_whole_default_job_needs_nothing_to_be_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    output = tmp_path / "outputs"
    offline = ["data.replay=null", "data.replay_share=0.0"]
    steps = [f'training.steps.{name}=["training={run}","data=recall",{",".join(map(json.dumps, offline))}]'
             for name, run in (("teacher", "fp_sft"), ("bitnet_sft", "bitnet_sft"), ("stage3", "stage3_distill"),
                               ("control", "fp_sft"))]  # fmt: skip
    run("dry_run=true", f"output_dir={output}", *steps)
    for step in ("teacher", "stage1", "bitnet_sft", "stage1_9", "stage2", "stage3", "control_pretrain", "control"):
        assert f"-- step {step}" in caplog.text
    assert "the pipeline's stage2" in caplog.text
    assert not (output / "pipeline_tiny").exists()


def test_text_too_small_to_hold_out_is_trained_on_all_the_same(
    overrides: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    single = tmp_path / "one.txt"
    single.write_text("the old ship sails to the new harbour. " * 40, encoding="utf-8")
    source = f"data.sources=[{{kind: local, path: '{single}'}}]"
    run(*overrides, "training=fp_pretrain", "data=local", source, "data.held_out_percent=0.0", *SHORT, *STEPS)
    assert "no validation on text" in caplog.text


def test_seeds_are_for_pipelines(overrides: list[str], text: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main([*overrides, "training=fp_pretrain", *text, *SHORT, *STEPS, "seeds=3"]) == 2
    assert "seeds=3 is for pipelines" in capsys.readouterr().err


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    overrides: list[str], text: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run(*overrides, "training=fp_pretrain", *text, *SHORT, *STEPS, "dry_run=true")
    for expected in ("fp_pretrain", "3 steps, 768 tokens", "bitdistill_tiny_fp_pretrain/runs/", "the pretrained model"):
        assert expected in caplog.text
    assert not (tmp_path / "outputs" / "bitdistill_tiny_fp_pretrain").exists()
