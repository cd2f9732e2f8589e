"""The audit's own parts, on less than it counts when run by hand."""

import io
from itertools import islice
from pathlib import Path

import pytest
from rich.console import Console

from benchmark import stream_audit
from benchmark.stream_audit import NamingTokenizer, count, documents_of, kill_and_resume, write_corpus
from wrinklefree.data.config import LocalSource, PackingConfig, PretrainData
from wrinklefree.data.pretrain_dataset import pretrain_stream


@pytest.mark.slow
def test_every_document_once_over_processes_and_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_audit, "DOCUMENTS", 301)
    said = io.StringIO()
    assert count(tmp_path, Console(file=said, width=200))
    assert said.getvalue().count("[301, 301] once, [0, 0] never, [0, 0] more often") == 3 * 3 * 2 * 2


@pytest.mark.parametrize("packer", ["concat", "best_fit"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_document_once_over_processes(tmp_path: Path, world_size: int, packer: str) -> None:
    source = LocalSource(path=str(write_corpus(tmp_path, 0, 203)))
    data = PretrainData(name="audit", sources=(source,), held_out_percent=0.0)
    for_epoch: list[list[int]] = [[], []]
    for rank in range(world_size):
        stream = pretrain_stream(
            data, NamingTokenizer(), batch_size=1, max_seq_length=stream_audit.ROW,
            packing=PackingConfig.model_validate({"packer": packer}), seed=1, rank=rank, world_size=world_size,
        )  # fmt: skip
        met = documents_of(stream)
        for documents in for_epoch:
            documents += islice(met, len(range(rank, 203, world_size)))
    assert [sorted(documents) for documents in for_epoch] == [list(range(203))] * 2
    assert for_epoch[0] != for_epoch[1]


@pytest.mark.reliability
def test_a_killed_stream_goes_on_bit_for_bit(tmp_path: Path) -> None:
    said = io.StringIO()
    assert kill_and_resume(tmp_path, 2, Console(file=said, width=200))
    assert "killed 2 times: 180 batches" in said.getvalue()
    assert "0 of them different, none missing" in said.getvalue()
