"""Another weight scale and the dead-zone bias, from the command to the file; what cannot have them says so in one line."""

from pathlib import Path

import pytest
import torch

from wrinklefree.cli import convert_main, train_main
from wrinklefree.models.artifact import read_artifact
from wrinklefree.models.bitlinear import BitLinear
from wrinklefree.models.gguf_weights import load_gguf_model

SHORT = ["training.batch_size=4", "training.max_seq_length=64"]
STEPS = ["training.max_steps=3", "training.evaluation.max_tokens=0", "training.lr=1e-3"]
LEARNED = ["model.quantization.weight_scale=learned", "model.quantization.dead_zone_bias=1e-3"]


def test_a_learned_scale_is_trained_and_exported(
    overrides: list[str], text: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = tmp_path / "outputs"
    assert train_main([*overrides, "training=stage1_subln", *text, *SHORT, *LEARNED, "subln.placement=none"]) == 0
    # Stage 1 has decided: the next stages need not say it again.
    assert train_main([*overrides, "training=stage2_pretrain", *text, *SHORT, *STEPS]) == 0
    folder = outputs / "bitdistill_tiny_continue_pretrain"
    artifact = read_artifact(folder)
    assert artifact.bitnet is not None
    assert (artifact.bitnet.weight_scale, artifact.bitnet.dead_zone_bias) == ("learned", 1e-3)
    model = artifact.load_model()
    gains = [layer.scale_gain for layer in model.modules() if isinstance(layer, BitLinear)]
    moved = [abs(gain.item() - 1) for gain in gains if gain is not None]
    assert len(moved) == len(gains) > 0
    assert min(moved) > 0
    assert max(moved) < 4e-3, "three steps of Adam at 1e-3"

    output = tmp_path / "model.gguf"
    assert convert_main(["--input", str(folder), "--output", str(output), "--type", "F32", "--no-verify"]) == 0
    plain, _ = load_gguf_model(output)
    for mine, theirs in zip(model.modules(), plain.modules(), strict=True):
        if isinstance(mine, BitLinear):
            assert isinstance(theirs, BitLinear)
            assert torch.equal(mine.ternary().codes, theirs.ternary().codes)
            assert mine.ternary().scale == theirs.ternary().scale
    capsys.readouterr()

    median = ["model.quantization.weight_scale=median"]
    assert train_main([*overrides, "training=stage2_pretrain", *text, *SHORT, *STEPS, *median]) != 0
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "model.quantization.weight_scale=median, but" in line
    assert "was made with learned: stage 1 decides this" in line

    shards = ["distributed=fsdp_multi", "training.dtype=float32", "training.max_steps=2"]
    assert train_main([*overrides, "training=stage2_pretrain", *text, *SHORT, *STEPS, *shards]) != 0
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "distributed=fsdp_multi shards weights by rows" in line
