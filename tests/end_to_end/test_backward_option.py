"""The key from the command to the layers: losses near exact's, another fingerprint, and one line for a wrong value."""

import json
import math
from pathlib import Path

import pytest

from wrinklefree.cli import train_main
from wrinklefree.composition import compose_tree
from wrinklefree.training.config import PipelineConfig, RunConfig
from wrinklefree.utils.config import decode
from wrinklefree.utils.run_fingerprint import fingerprint

SHORT = ["training.batch_size=4", "training.max_seq_length=64"]
STEPS = [
    "training.max_steps=6",
    "training.evaluation.max_tokens=0",
    "training.lr=1e-3",
    "training.logging.log_interval=1",
]
QUANTIZED = ["training.quantization_warmup.schedule=none"]


def test_losses_stay_near_those_of_exact_products(overrides: list[str], text: list[str], tmp_path: Path) -> None:
    assert train_main([*overrides, "training=stage1_subln", *text, *SHORT]) == 0
    losses: dict[str, list[float]] = {}
    runs = tmp_path / "outputs" / "bitdistill_tiny_continue_pretrain" / "runs"
    seen: set[Path] = set()
    for kind in ("exact", "int8", "fp8"):
        command = [*overrides, "training=stage2_pretrain", *text, *SHORT, *STEPS, *QUANTIZED]
        assert train_main([*command, f"training.backward_products={kind}"]) == 0
        [metrics] = set(runs.glob("*/metrics.jsonl")) - seen  # each kind is a run of its own
        seen.add(metrics)
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        losses[kind] = [line["loss"] for line in lines if line["event"] == "step"]
    exact = losses["exact"]
    assert len(exact) == 6
    for kind in ("int8", "fp8"):
        assert all(math.isfinite(loss) for loss in losses[kind])
        assert losses[kind][0] == exact[0], "the forward pass is the same"
        assert losses[kind] != exact
        assert max(abs(mine - theirs) for mine, theirs in zip(losses[kind], exact, strict=True)) < 0.02


def test_the_key_is_part_of_the_fingerprint() -> None:
    values = {
        fingerprint(
            compose_tree(["training=stage2_pretrain", "data=packaged", f"training.backward_products={kind}"]),
            sections=("model", "training", "data"), inputs={}, repository=None,
        ).config_hash
        for kind in ("exact", "int8", "fp8")
    }  # fmt: skip
    assert len(values) == 3


def test_a_wrong_value_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main(["training=stage2_pretrain", "data=packaged", "training.backward_products=int4"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "training.backward_products" in line
    assert "exact" in line
    assert "int8" in line
    assert "int4" in line


def test_a_pipeline_hands_it_to_its_steps() -> None:
    config = decode(RunConfig, compose_tree(["training=bitdistill", "training.backward_products=int8"]))
    assert isinstance(config.training, PipelineConfig)
    assert config.training.backward_products == "int8"
