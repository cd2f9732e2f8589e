"""Two processes train what one does: gradients, whole runs, every optimizer, every setting that only moves data."""

from dataclasses import replace

import pytest
import torch

from benchmark.sharded_equality import STAGES, Bed, BedStage, Ranks, relative_difference, train, train_all
from wrinklefree.models.llama import Checkpointing
from wrinklefree.training.config import DistributedConfig
from wrinklefree.training.optimizers import OptimizerType

DOUBLE = Bed(steps=4, double=True)


def settings(**keys: object) -> DistributedConfig:
    return DistributedConfig.model_validate({"name": "test", "strategy": "fsdp", **keys})


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_the_first_step_are_those_of_one_process(stage: BedStage, ranks: Ranks) -> None:
    beds = [Bed(stage=stage, warmup=warmup) for warmup in ((True, False) if stage != "fp_pretrain" else (False,))]
    alone = ranks.run(1, train_all, beds, True)[0]
    both = ranks.run(2, train_all, beds, True)
    for one, first, second in zip(alone, *both, strict=True):
        assert relative_difference(first.gradients, one.gradients) < 1e-6
        assert relative_difference(second.gradients, first.gradients) == 0
        assert first.losses == second.losses == pytest.approx(one.losses, rel=1e-6)
        assert first.norms == pytest.approx(one.norms, rel=1e-6)


@pytest.mark.parametrize("stage", ["stage1_9", "stage3"])
def test_a_run_in_float64_is_that_of_one_process(stage: BedStage, ranks: Ranks) -> None:
    bed = replace(DOUBLE, stage=stage)
    one, both = ranks.run(1, train, bed)[0], ranks.run(2, train, bed)
    assert both[0].losses == pytest.approx(one.losses, abs=1e-9)
    assert relative_difference(both[0].weights, one.weights) < 1e-9


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "apollo", "apollo_mini"])
def test_every_optimizer_updates_shards_as_it_updates_whole_matrices(optimizer: OptimizerType, ranks: Ranks) -> None:
    bed = replace(DOUBLE, optimizer=optimizer)
    one, both = ranks.run(1, train, bed)[0], ranks.run(2, train, bed)
    assert relative_difference(both[0].weights, one.weights) < 1e-9
    # It did train: no weight is where it was.
    start = ranks.run(1, train, replace(bed, steps=0, total_steps=4))[0]
    assert all(not torch.equal(one.weights[name], start.weights[name]) for name in one.weights)


def test_eight_batches_of_one_row_are_one_batch_of_eight(ranks: Ranks) -> None:
    beds = [replace(DOUBLE, warmup=False, accumulation=parts) for parts in (1, 2, 8)]
    one, *others = ranks.run(2, train_all, beds)[0]
    for other in others:
        assert relative_difference(other.weights, one.weights) < 1e-9


@pytest.mark.parametrize(
    "distributed",
    [
        {"gather": "full"},
        {"prefetch": True, "prefetch_blocks": 2},
        {"reshard_after_forward": False},
        {"optimizer_offload": True},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_settings_that_move_data_change_no_result(distributed: dict[str, object], ranks: Ranks) -> None:
    plain, changed = (replace(DOUBLE, distributed=settings(**keys)) for keys in ({}, distributed))
    outcomes = ranks.run(2, train_all, [plain, changed])[0]
    assert relative_difference(outcomes[1].weights, outcomes[0].weights) < 1e-9


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputing_blocks_changes_no_bit(mode: Checkpointing, ranks: Ranks) -> None:
    beds = [Bed(steps=2, warmup=False, checkpointing=one) for one in ("off", mode)]
    off, recomputed = ranks.run(2, train_all, beds)[0]
    assert relative_difference(recomputed.weights, off.weights) == 0


@pytest.mark.parametrize("stage", ["stage2", "fp_pretrain"])
def test_bfloat16_is_rounded_in_the_same_places(stage: BedStage, ranks: Ranks) -> None:
    """The rounding of a product depends on which rows it sums: one process takes the same halves one after the other."""
    bed = Bed(stage=stage, warmup=False, bfloat16=True)
    one = ranks.run(1, train, replace(bed, accumulation=2), True)[0]
    both = ranks.run(2, train, bed, True)[0]
    assert relative_difference(both.gradients, one.gradients) < 1e-6


def test_three_processes_train_on_a_batch_that_they_cannot_share_evenly() -> None:
    from wrinklefree.training.rank_share import RankShare

    shares = [_rows(RankShare, number) for number in range(3)]
    assert sorted(row for share in shares for row in share) == list(range(8))
    assert [len(share) for share in shares] == [2, 3, 3]


def _rows(share: type, number: int) -> list[int]:
    from benchmark.sharded_equality import SeededRows

    stream = SeededRows(8, 96)
    everything = SeededRows(8, 96).next_batch().input_ids.tolist()
    mine = share(stream, accumulation_steps=1, rows=8, rank=number, world_size=3)
    return [everything.index(row) for row in mine.next_batch().input_ids.tolist()]
