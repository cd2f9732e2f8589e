"""Lack of memory becomes one line with overrides that fit by estimate; other errors pass."""

import re
from pathlib import Path

import pytest
import torch
from tests.training.test_trainer import info, make_trainer

from wrinklefree.composition import compose
from wrinklefree.training import memory_advice
from wrinklefree.training.config import RunConfig
from wrinklefree.training.device_kinds import GIB
from wrinklefree.training.estimator import HEADROOM
from wrinklefree.training.memory_advice import advise, explain_out_of_memory, is_out_of_memory
from wrinklefree.utils.checkpoint import CheckpointStore
from wrinklefree.utils.errors import OutOfMemoryError

QWEN = ("model=qwen3_4b", "training=stage2_pretrain")


def config_of(*overrides: str) -> RunConfig:
    return compose(list(overrides)).config


def real_allocation_failure() -> Exception:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**52, dtype=torch.float32)
    return caught.value


def test_the_allocators_own_errors_are_recognised_and_others_are_not() -> None:
    assert is_out_of_memory(real_allocation_failure())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("not enough memory"))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA"), real_allocation_failure()], ids=str)
def test_it_becomes_one_line_with_peak_batch_and_three_overrides(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_advice, "_device_bytes", lambda device_type: 141 * GIB)
    monkeypatch.setattr(memory_advice, "_peak_bytes", lambda device_type: 79 * GIB)
    with pytest.raises(OutOfMemoryError) as caught, explain_out_of_memory(config_of(*QWEN)):
        raise error
    text = str(caught.value)
    assert caught.value.exit_code == 75
    assert "\n" not in text
    assert text.startswith(
        "out of memory at a peak of 79.0 GiB of 141.0 GiB of this machine, batch 4 x 1024 tokens, accumulation 8; "
        "the last checkpoint is intact. Estimated to fit: training.activation_checkpointing=true ("
    )
    assert len(re.findall(r"GiB, (?:resumes this run|a new run)", text)) == 3
    assert "training.batch_size=2 training.gradient_accumulation_steps=16" in text
    assert caught.value.__cause__ is None


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="^shapes$"), explain_out_of_memory(config_of(*QWEN)):
        raise RuntimeError("shapes")


@pytest.mark.parametrize("gibibytes", [24, 48, 60, 80, 141])
def test_what_is_offered_fits_and_changes_no_more_than_it_must(gibibytes: int) -> None:
    config = config_of(*QWEN)
    offers = advise(config, device_type="cuda", memory=gibibytes * GIB)
    assert len(offers) <= 3
    for offer in offers:
        changed = config_of(*QWEN, *offer.overrides)  # they compose
        assert offer.peak <= (1 - HEADROOM["cuda"]) * gibibytes * GIB
        rows = changed.training.batch_size * changed.training.gradient_accumulation_steps  # type: ignore[union-attr]
        assert rows == 32
    assert [offer.keeps_identity for offer in offers] == sorted((o.keeps_identity for o in offers), reverse=True)


def test_nothing_is_offered_where_nothing_fits() -> None:
    assert advise(config_of(*QWEN), device_type="cuda", memory=2 * GIB) == []


def test_the_checkpoint_before_it_is_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in the third step's optimizer; the run goes on from the second step, bit for bit."""
    folder = tmp_path / "checkpoints"
    whole = make_trainer()
    whole.fit(info(whole, tmp_path))

    broken = make_trainer(folder=folder)
    object.__setattr__(broken.settings, "save_interval", 2)
    step, taken = broken.optimizer.step, []

    def fail_at_third(closure: None = None) -> None:
        taken.append(1)
        if len(taken) == 3:
            raise MemoryError
        step(closure)

    monkeypatch.setattr(broken.optimizer, "step", fail_at_third)
    with pytest.raises(OutOfMemoryError, match="checkpoint is intact"), explain_out_of_memory(config_of(*QWEN)):
        broken.fit(info(broken, tmp_path))
    saved = CheckpointStore(folder, 2).latest()
    assert saved is not None
    assert saved.step == 2

    resumed = make_trainer(folder=folder)
    assert resumed.resume(allow_identity_change=False) == 2
    resumed.fit(info(resumed, tmp_path))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
