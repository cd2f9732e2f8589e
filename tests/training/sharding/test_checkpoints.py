"""A checkpoint that two processes wrote: whole, verified, read by any number of processes, saved beside the training."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmark.sharded_equality import Bed, Ranks, open_store, relative_difference, train
from wrinklefree.training.optimizers import OptimizerType
from wrinklefree.utils.checkpoint import CheckpointStore
from wrinklefree.utils.distributed import rank
from wrinklefree.utils.errors import StorageError
from wrinklefree.utils.sharded_checkpoint import Part


def interrupted(bed: Bed, folder: Path, ranks: Ranks, first: int, then: int) -> dict[str, torch.Tensor]:
    """Weights after `bed`, begun on `first` processes, saved half-way, ended on `then`."""
    bed = replace(bed, folder=str(folder), save_interval=bed.steps // 2, total_steps=bed.steps)
    ranks.run(first, train, replace(bed, steps=bed.steps // 2))
    outcome = ranks.run(then, train, bed)[0]
    assert outcome.facts["resumed"] == bed.steps // 2
    return outcome.weights


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(asynchronous: bool, tmp_path: Path, ranks: Ranks) -> None:
    bed = Bed(steps=4, asynchronous=asynchronous)
    whole = ranks.run(2, train, bed)[0].weights
    assert relative_difference(interrupted(bed, tmp_path, ranks, 2, 2), whole) == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "apollo"])
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(
    first: int, then: int, optimizer: OptimizerType, tmp_path: Path, ranks: Ranks
) -> None:
    bed = Bed(steps=4, double=True, optimizer=optimizer)
    whole = ranks.run(first, train, bed)[0].weights
    assert relative_difference(interrupted(bed, tmp_path, ranks, first, then), whole) < 1e-9


def test_eight_bit_state_says_that_it_needs_the_same_number(tmp_path: Path, ranks: Ranks) -> None:
    bed = Bed(steps=2, optimizer="adamw_8bit")
    with pytest.raises(
        RuntimeError, match="was not written by 1 processes, and the state of 8-bit AdamW can be read by as"
    ):
        interrupted(bed, tmp_path, ranks, 2, 1)


def test_a_flipped_bit_in_any_ranks_file_is_found_and_the_older_checkpoint_taken(tmp_path: Path, ranks: Ranks) -> None:
    bed = Bed(steps=2, folder=str(tmp_path), save_interval=1)
    ranks.run(2, train, bed)
    newest = tmp_path / "step_00000002"
    assert sorted(path.name for path in newest.iterdir()) == [
        "manifest.json",
        "parts.json",
        "state.json",
        "tensors_00000_of_00002.safetensors",
        "tensors_00001_of_00002.safetensors",
    ]
    file = newest / "tensors_00001_of_00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = CheckpointStore(tmp_path, 5).latest()
    assert found is not None
    assert found.step == 1
    assert [outcome.facts["resumed"] for outcome in ranks.run(2, train, bed)] == [1, 1]


def test_parts_are_read_as_stretches_of_whole_tensors(tmp_path: Path, ranks: Ranks) -> None:
    ranks.run(2, save_parts, str(tmp_path))
    found = CheckpointStore(tmp_path, 5).latest()
    assert found is not None
    whole = torch.arange(35).reshape(7, 5).float()
    assert torch.equal(found.tensors["rows"], whole)
    assert torch.equal(found.tensors["columns"], whole.T)
    assert torch.equal(found.tensors["same"], torch.tensor(3.0))
    for start, stop in ((0, 7), (0, 4), (3, 5), (5, 7), (6, 6), (7, 7)):
        assert torch.equal(found.tensors.part("rows", 0, start, stop), whole[start:stop])
        assert torch.equal(found.tensors.part("columns", 1, start, stop), whole.T[:, start:stop])
    assert torch.equal(found.tensors.part("rows", 1, 1, 3), whole[:, 1:3])
    assert found.tensors.shape("columns") == (5, 7)


def save_parts(folder: str) -> None:
    whole = torch.arange(35).reshape(7, 5).float()
    mine = whole[:4] if rank() == 0 else whole[4:]
    tensors = {
        "rows": Part(mine, 0, 4 * rank(), (7, 5)),
        "columns": Part(mine.T, 1, 4 * rank(), (5, 7)),
        "same": torch.tensor(3.0),
    }
    open_store(Path(folder)).save(1, tensors, {"by": rank()})
    assert json.loads((Path(folder) / "step_00000001" / "state.json").read_text()) == {"by": 0}


@pytest.mark.parametrize("later", [False, True])
def test_a_rank_that_cannot_write_fails_all_and_leaves_the_older_checkpoint(
    later: bool, tmp_path: Path, ranks: Ranks
) -> None:
    replies = ranks.run(2, fail_to_write, str(tmp_path), later)
    assert replies[0] == replies[1]
    assert replies[0].startswith("rank 1 could not write its part of the checkpoint: no space to write")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def fail_to_write(folder: str, later: bool) -> str:
    from wrinklefree.utils import sharded_checkpoint

    store = open_store(Path(folder))
    tensors = {"rows": Part(torch.zeros(2, 3), 0, 2 * rank(), (4, 3))}
    store.save(1, tensors, {})
    write = sharded_checkpoint.write_tensors
    if rank() == 1:

        def full(path: Path, tensors: object) -> str:
            raise OSError(28, "No space left on device")

        sharded_checkpoint.write_tensors = full
    try:
        if later:
            store.save_later(2, tensors, {})
            store.wait()
        else:
            store.save(2, tensors, {})
    except StorageError as error:
        return str(error)
    finally:
        sharded_checkpoint.write_tensors = write
    return "saved"
