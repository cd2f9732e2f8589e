"""Two gloo processes: weights are those of one process with all rows, identical on both, also under FSDP2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

SCRIPT = Path(__file__).with_name("two_ranks.py")
LIBRARY = Path(__file__).parents[1] / "src"


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each rank found, by case; one job for all cases, because starting processes is most of its time."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(LIBRARY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    outputs = [folder / f"rank{rank}.json" for rank in (0, 1)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(folder / "rendezvous"), str(output)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, output in enumerate(outputs)
    ]  # fmt: skip
    try:
        for process in processes:
            text, _ = process.communicate(timeout=200)
            assert process.returncode == 0, text
    finally:
        for process in processes:
            process.kill()
    return [json.loads(output.read_text(encoding="utf-8")) for output in outputs]


@pytest.mark.parametrize("case", ["plain", "data_parallel", "sharded"])
def test_two_ranks_score_like_one_with_all_rows(reports, case):
    first, second = (report[case] for report in reports)
    alone = reports[0]["alone"]
    assert first == second
    assert len(set(alone["weights"].values())) == 3, "the weights must have moved for this to show anything"
    for name, scores in alone["scores"].items():
        assert first["scores"][name] == pytest.approx(scores, rel=1e-3, abs=1e-4)
        assert first["weights"][name] == pytest.approx(alone["weights"][name], rel=1e-3)
    if case == "sharded":
        assert first["dtensor"] == "DTensor"
        assert first["clean"], "scoring must not leave gradients in sharded parameters"


def test_an_error_of_one_rank_is_raised_on_all(reports):
    assert [report["one_rank_fails"] for report in reports] == [{"error": "rank 1: OSError: disk gone"}] * 2


def test_unequal_draws_are_refused_on_all(reports):
    first, second = (report["unequal_batches"] for report in reports)
    assert first == second
    assert "every rank must draw equally many batches" in first["error"]
