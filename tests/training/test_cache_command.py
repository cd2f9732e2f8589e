"""`scripts/cache_teacher.py` on the tiny model: every example found, values those of the teacher."""

from pathlib import Path

import pytest
import torch

from wrinklefree import cli
from wrinklefree.composition import compose
from wrinklefree.data.finetune_dataset import finetune_stream
from wrinklefree.distillation.teacher_cache import TeacherCache
from wrinklefree.models.hf import load_pretrained

OVERRIDES = [
    "model=tiny", "training=stage3_distill", "data.task=recall", "data.max_examples=24", "training.teacher.source=base",
    "training.max_seq_length=64", "training.batch_size=4", "training.dtype=float32", "distillation.gamma_attention=0",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_batch_of_training_is_found_and_holds_the_teachers_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cache"
    overrides = [*OVERRIDES, f"output_dir={tmp_path}"]
    assert cli.cache_main(["--output", str(folder), "--top-k", "16", *overrides]) == 0
    printed = capsys.readouterr().out
    assert "24 documents" in printed
    assert f"use it with training.teacher.cache={folder} distillation.gamma_attention=0" in printed

    config = compose(overrides).config
    model, tokenizer = load_pretrained(config.model)
    stream = finetune_stream(
        config.data,
        tokenizer,
        batch_size=4,
        max_seq_length=64,
        packing=config.packing,
        seed=9,  # type: ignore[arg-type]
    )
    cache = TeacherCache(folder)
    for _ in range(3):
        batch = stream.next_batch()
        found = cache.look_up(batch)
        with torch.no_grad():
            logits = model.eval()(batch).logits().flatten(0, 1)[found.rows]
        assert len(found.rows) == batch.num_targets
        top = logits.topk(16)
        assert torch.equal(found.ids[:, 0].long(), top.indices[:, 0])
        torch.testing.assert_close(found.differences.float(), top.values - top.values[:, :1], rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--top-k", "5000", "data.task=recall"], "--top-k 5000: expected 1 to 4096, the vocabulary of model=tiny"),
        (["data=recall"], "the cache holds a task's examples, and replayed text never repeats: set data.replay=null"),
        (["training=stage2_pretrain", "data=packaged"], "a teacher is cached for stage 3 on a task"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--output", str(tmp_path / "cache"), "model=tiny", f"output_dir={tmp_path}"]
    assert cli.cache_main([*common, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1
