"""Time, traffic and price against closed forms; every model, stage and way of sharding without a network."""

import socket
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from wrinklefree.composition import compose, compose_tree, groups
from wrinklefree.training.config import PipelineConfig, RunConfig
from wrinklefree.training.device_kinds import DEVICE_KINDS
from wrinklefree.training.estimator import (
    Estimate,
    estimate_pipeline,
    estimate_stage,
    share_of_device,
    step_flops,
    step_traffic,
)
from wrinklefree.training.memory_model import count_parameters
from wrinklefree.training.rank_share import RankShare
from wrinklefree.utils.config import decode
from wrinklefree.utils.errors import ConfigError

STAGES = [name for name in groups()["training"] if name != "bitdistill"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("an estimate opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def config_of(*overrides: str) -> RunConfig:
    return compose(list(overrides)).config


def estimate_of(*overrides: str) -> Estimate:
    return estimate_stage(config_of(*overrides))


@pytest.fixture(scope="module")
def shardings() -> list[Any]:
    """Every option of the group `distributed`, each composed once: it changes no key of another group."""
    trees = [compose_tree([f"distributed={name}"]) for name in groups()["distributed"]]
    options = [tree.pop("distributed") for tree in trees]
    assert trees[1:] == trees[:-1]
    return options


@pytest.mark.parametrize("model", groups()["model"])
def test_every_stage_of_every_model_has_an_estimate(model: str, shardings: list[Any]) -> None:
    trees = {name: compose_tree([f"model={model}", f"training={name}", "training.batch_size=8"]) for name in STAGES}
    for (training, tree), distributed in product(trees.items(), shardings):
        estimate = estimate_stage(decode(RunConfig, tree | {"distributed": distributed}))
        assert estimate.memory.total > 0
        trains = training != "stage1_subln"
        assert (estimate.workload is not None) == trains
        assert (estimate.hours > 0) == (estimate.price > 0) == trains


def test_arithmetic_is_six_operations_a_weight_and_token() -> None:
    estimate = estimate_of("model=llama_7b", "training=stage2_pretrain", "optimizer.type=adamw")
    work = estimate.workload
    assert work is not None
    a, parameters = work.architecture, count_parameters(work.architecture, None)
    attention = 3 * 4 * a.num_attention_heads * a.head_dim * a.num_hidden_layers * work.length / 2
    expected = work.tokens * work.accumulation * (6 * (parameters.hidden + parameters.head) + attention)
    assert step_flops(work) == pytest.approx(expected, rel=1e-12)
    # 6 N D: the embedding is read, not multiplied.
    assert step_flops(work) == pytest.approx(6 * 6.6e9 * work.tokens * work.accumulation, rel=0.06)


def test_recomputing_repeats_the_forward_pass_of_the_blocks_and_a_teacher_adds_one() -> None:
    plain = estimate_of("model=llama_7b", "training=stage1_9_layerwise").workload
    assert plain is not None
    body = step_flops(replace(plain, teacher="none")) / 3
    assert step_flops(plain) == pytest.approx(4 * body)
    assert step_flops(replace(plain, checkpointing="full")) == pytest.approx(5 * body)


def test_time_and_price_follow_from_the_rates_that_are_given() -> None:
    common = ("model=qwen3_4b", "training=stage2_pretrain", "training.max_steps=1000", "estimation.device=a100_80gb")
    estimate = estimate_of(*common, "estimation.efficiency=0.5", "estimation.price_per_hour=2")
    assert estimate.workload is not None
    seconds = step_flops(estimate.workload) / (0.5 * 312e12)
    assert estimate.step_seconds == pytest.approx(seconds)
    assert estimate.hours == pytest.approx(1000 * seconds / 3600)
    assert estimate.price == pytest.approx(2 * estimate.hours)
    assert estimate_of(*common, "estimation.efficiency=0.25").hours == pytest.approx(2 * estimate.hours)


def test_ternary_weights_travel_as_an_eighth_of_bfloat16() -> None:
    work = estimate_of("model=llama_7b", "training=stage2_pretrain", "distributed=fsdp_multi").workload
    assert work is not None
    parameters = count_parameters(work.architecture, work.placement)
    coded, full = step_traffic(work), step_traffic(replace(work, codes_gathered=False))
    share = work.accumulation * 7 / 8
    saved = full.gathered - coded.gathered
    assert saved == pytest.approx(share * 2 * (4 - 0.25) * parameters.hidden)
    assert coded.reduced == full.reduced == pytest.approx(share * 4 * parameters.total)


def test_one_device_sends_nothing() -> None:
    traffic = step_traffic(estimate_of("model=tiny", "training=stage2_pretrain").workload)  # type: ignore[arg-type]
    assert traffic.gathered == traffic.reduced == traffic.host == 0


@pytest.mark.parametrize(("rows", "accumulation", "devices"), [(4, 8, 1), (4, 8, 4), (8, 4, 8), (4, 8, 32), (5, 3, 4)])
def test_devices_share_rows_as_ranks_do(rows: int, accumulation: int, devices: int) -> None:
    class Rows:
        padding_share, batches_per_epoch = 0.0, None

    share = RankShare(
        Rows(),
        accumulation_steps=accumulation,
        rows=rows,
        rank=0,
        world_size=devices,  # type: ignore[arg-type]
    )
    micro_rows, micro_batches = share_of_device(rows, accumulation, devices)
    assert micro_batches == share.micro_batches
    assert micro_rows * micro_batches * devices >= rows * accumulation


def test_a_run_is_as_long_on_many_devices_and_more_of_them_than_rows_are_refused() -> None:
    common = ("model=qwen3_4b", "training=stage2_pretrain", "distributed=fsdp_multi")
    few, many = (estimate_of(*common, f"estimation.devices={n}") for n in (4, 32))
    assert (few.steps, few.tokens) == (many.steps, many.tokens)
    assert many.memory.parts["masters"] == pytest.approx(few.memory.parts["masters"] / 8, rel=1e-6)
    with pytest.raises(ConfigError, match="a step has 32 rows .* and there are 512 devices: raise one of the two"):
        estimate_of(*common, "estimation.devices=512")


def test_512_devices_are_64_nodes_and_use_the_network_between_them() -> None:
    common = ("model=llama_7b", "training=stage3_distill", "distributed=fsdp_large", "training.batch_size=512")
    estimate = estimate_of(*common, "estimation.devices=512", "data.task=mnli")
    assert (estimate.devices, estimate.nodes) == (512, 64)
    inside = estimate_of(*common, "estimation.devices=512", "data.task=mnli", "estimation.devices_per_node=512")
    kind = DEVICE_KINDS["h100_80gb"]
    assert estimate.traffic_seconds / inside.traffic_seconds == pytest.approx(
        kind.link_bandwidth / kind.network_bandwidth
    )


def test_several_devices_need_sharding() -> None:
    with pytest.raises(ConfigError, match="estimation.devices=4, and distributed=single_gpu trains on one"):
        estimate_of("model=tiny", "training=stage2_pretrain", "estimation.devices=4")


def test_the_length_of_an_unknown_task_must_be_given() -> None:
    config = config_of("model=tiny", "training=fp_sft", "data.task=nobody")
    with pytest.raises(ConfigError, match="does not know the size of task 'nobody'"):
        estimate_stage(config)
    known = config_of(
        "model=tiny", "training=fp_sft", "data.task=nobody", "training.max_steps=7", "estimation.target_share=0.1"
    )
    assert estimate_stage(known).steps == 7


def test_a_pipeline_is_the_sum_of_its_steps_and_its_control_has_the_tokens_of_both() -> None:
    config = config_of("model=qwen3_4b")
    assert isinstance(config.training, PipelineConfig)
    estimates = dict(estimate_pipeline(config, ["model=qwen3_4b"]))
    assert list(estimates) == [
        "teacher", "stage1", "bitnet_sft", "stage1_9", "stage2", "stage3", "control_pretrain", "control",
    ]  # fmt: skip
    pretraining = estimates["stage1_9"].tokens + estimates["stage2"].tokens
    assert 0 <= estimates["control_pretrain"].tokens - pretraining < 100_000  # whole steps


def test_stage3_from_a_cache_holds_and_runs_no_teacher() -> None:
    common = ("model=llama_7b", "training=stage3_distill", "distillation.gamma_attention=0")
    online, cached = estimate_of(*common), estimate_of(*common, "training.teacher.cache=somewhere")
    assert cached.memory.parts["teacher"] == 0 < online.memory.parts["teacher"]
    assert cached.arithmetic_seconds < online.arithmetic_seconds
    assert cached.traffic.host == 0 < online.traffic.host


def test_the_optimizer_is_the_one_that_a_run_would_take() -> None:
    on_gpu = estimate_of("model=tiny", "training=stage2_pretrain").workload
    on_cpu = estimate_of("model=tiny", "training=stage2_pretrain", "estimation.device=cpu_2_cores").workload
    assert on_gpu is not None
    assert on_cpu is not None
    assert (on_gpu.optimizer, on_cpu.optimizer) == ("muon", "adamw")
    assert not torch.cuda.is_initialized()
