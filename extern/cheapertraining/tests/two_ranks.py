"""One rank of a two-process gloo job: `python two_ranks.py RANK RENDEZVOUS OUTPUT`; run by test_distributed.py."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from cheapertraining import (
    CheaperTrainingError,
    DataInfCalculator,
    InfluenceAwareOptimizer,
    MixtureWeightCalculator,
    Probe,
)
from conftest import TinyLM, language, row_loss

SOURCES = {"one": (1, 0.1), "two": (2, 0.1), "noise": (1, 1.0)}


def draw(successor, noise, salt, part):
    """Rows of one rank: the first or second half of 16; both without a rank."""

    def rows(update):
        batch = language(successor, rows=16, seed=100 * update + salt, noise=noise)
        return [batch] if part is None else [batch[8 * part : 8 * part + 8]]

    return rows


def build(model, part, groups):
    return InfluenceAwareOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05),
        DataInfCalculator(model, row_loss, groups=groups, projection_size=8),
        MixtureWeightCalculator(dict.fromkeys(SOURCES, 1 / 3), threshold=1.0, evidence_limit=50.0, temperature=10.0),
        sources={name: draw(*args, 10 * i, part) for i, (name, args) in enumerate(SOURCES.items())},
        probes={"p": Probe(draw(1, 0.1, 77, part))},
        on_weights=lambda weights: None,
        update_interval=2,
    )


def train(model, optimizer, steps=4):
    for step in range(steps):
        sums, counts = row_loss(model, language(1, rows=4, seed=step, noise=0.3))
        (sums.sum() / counts.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def result(optimizer):
    return {"weights": optimizer.weights, "scores": optimizer.last_report.scores.combined}


def plain(rank):
    torch.manual_seed(0)
    model = TinyLM()
    optimizer = build(model, rank, groups=4)
    train(model, optimizer)
    return result(optimizer)


def data_parallel(rank):
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(TinyLM())
    optimizer = build(model, rank, groups=4)
    train(model, optimizer)
    return result(optimizer)


def sharded(rank):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = TinyLM()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = build(model, rank, groups=4)
    optimizer.zero_grad()
    optimizer.update_weights()
    clean = all(p.grad is None for p in model.parameters())
    optimizer = build(model, rank, groups=4)
    train(model, optimizer)
    return {**result(optimizer), "clean": clean, "dtensor": type(model.blocks[0].up.weight).__name__}


def one_rank_fails(rank):
    torch.manual_seed(0)
    model = TinyLM()
    optimizer = build(model, rank, groups=4)
    if rank == 1:
        optimizer._sources["two"] = lambda update: (_ for _ in ()).throw(OSError("disk gone"))
    try:
        optimizer.update_weights()
    except CheaperTrainingError as error:
        return {"error": str(error)}
    return {"error": None}


def unequal_batches(rank):
    torch.manual_seed(0)
    optimizer = build(TinyLM(), rank, groups=4)
    if rank == 1:
        rows = optimizer._sources["two"](0)
        optimizer._sources["two"] = lambda update: rows + rows
    try:
        optimizer.update_weights()
    except CheaperTrainingError as error:
        return {"error": str(error)}
    return {"error": None}


CASES = (plain, data_parallel, sharded, one_rank_fails, unequal_batches)

if __name__ == "__main__":
    rank, rendezvous, output = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    # Before there is a process group: this process alone, with the rows of both ranks.
    torch.manual_seed(0)
    single = TinyLM()
    alone = build(single, None, groups=8)
    train(single, alone)
    report = {"alone": result(alone)}
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for case in CASES:
        report[case.__name__] = case(rank)
    Path(output).write_text(json.dumps(report), encoding="utf-8")
    dist.barrier()
    os._exit(0)  # taking gloo's threads down can abort the process, and is not what is tested
