"""What sharding does on one process, and on GPUs where there are some. `sharding/` compares several processes."""

from dataclasses import replace

import pytest
import torch

from benchmark.sharded_equality import Bed, Ranks, build, train
from wrinklefree.training.local_shards import clip_gradients, local_parameter, rows_of_local


def test_whole_parameters_are_their_own_local_part() -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(3, 2))
    assert local_parameter(parameter) is parameter
    rows = rows_of_local(parameter)
    assert (rows.start, rows.stop, rows.shape, rows.is_whole) == (0, 3, (3, 2), True)


def test_whole_gradients_are_clipped_as_torch_clips() -> None:
    ours, theirs = ([torch.nn.Parameter(torch.zeros(4, 3)), torch.nn.Parameter(torch.zeros(5))] for _ in range(2))
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a.grad = torch.full_like(a, 2.0 + number)
        b.grad = a.grad.clone()
    assert torch.equal(clip_gradients(ours, 1.0), torch.nn.utils.clip_grad_norm_(theirs, 1.0))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


def train_on_gpu(bed: Bed) -> list[float]:
    """Losses of a bed on this rank's GPU, in a group of NCCL and gloo."""
    torch.cuda.set_device(torch.distributed.get_rank())
    trainer, _ = build(bed, torch.device("cuda", torch.cuda.current_device()))
    return [trainer.train_step().loss for _ in range(bed.steps)]


@pytest.mark.multi_gpu
@pytest.mark.parametrize("offload", [False, True])
def test_two_gpus_train_what_one_process_on_a_cpu_does(offload: bool) -> None:
    bed = Bed(steps=3, warmup=False)
    distributed = bed.distributed.model_copy(update={"optimizer_offload": offload, "prefetch": True})
    ranks = Ranks(2, backend="cpu:gloo,cuda:nccl")
    try:
        one = ranks.run(1, train, bed)[0]
        both = ranks.run(2, train_on_gpu, replace(bed, distributed=distributed))
    finally:
        ranks.close()
    assert both[0] == both[1] == pytest.approx(one.losses, rel=1e-3)
