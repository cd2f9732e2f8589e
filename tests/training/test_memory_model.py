"""Byte counts against the real modules: parameters, optimizer state, what autograd keeps, the peak of a step."""

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmark.estimator_accuracy import Case, _allocated_peak, build_trainer, case_workload
from wrinklefree.composition import compose
from wrinklefree.models.bitlinear import set_quantization
from wrinklefree.models.config import Architecture, BitNetSpec, Placement
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.training.config import OptimizerConfig
from wrinklefree.training.memory_model import (
    PARTS,
    Workload,
    block_bytes,
    checkpoint_bytes,
    count_parameters,
    memory_moments,
    optimizer_bytes,
    peak_memory,
    peak_of_run,
)
from wrinklefree.training.optimizers import build_optimizer, state_bytes_per_parameter

ARCHITECTURE = Architecture(
    family="llama",
    vocab_size=512,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=1024,
)
WORK = Workload(
    architecture=ARCHITECTURE,
    device_type="cpu",
    compute_bytes=2,
    rows=4,
    length=64,
    accumulation=1,
    target_share=1.0,
    ternary=True,
    placement="output",
    quantized_inputs=True,
    quantized=True,
    cross_entropy=True,
    logits_kl=False,
    relation_heads=0,
    layerwise=False,
    logit_lens=False,
    teacher="none",
    optimizer="adamw",
    optimizer_rank=16,
    optimizer_offload=False,
    checkpointing="off",
    shards=1,
)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"qk_norm": True, "tie_word_embeddings": True},
    {"attention_bias": True, "family": "qwen2"},
    {"attention_output_bias": True, "mlp_bias": True},
]


@pytest.mark.parametrize("placement", [None, "none", "output", "per_projection"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_parameters_are_those_of_the_model(changes: dict[str, Any], placement: Placement | None) -> None:
    architecture = ARCHITECTURE.model_copy(update=changes)
    spec = None if placement is None else BitNetSpec(placement=placement, gain="ones")
    with torch.device("meta"):
        model = CausalLM(architecture, spec)
    assert count_parameters(architecture, placement).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon", "apollo", "apollo_mini"])
def test_optimizer_state_is_what_a_step_leaves(optimizer: Any) -> None:
    torch.manual_seed(0)
    model = CausalLM(ARCHITECTURE, BitNetSpec(placement="output", gain="ones"))
    built = build_optimizer(model, optimizer, OptimizerConfig(rank=WORK.optimizer_rank), 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    built.step()
    held = state_bytes_per_parameter(built) * sum(p.numel() for p in model.parameters())
    assert optimizer_bytes(replace(WORK, optimizer=optimizer)) == pytest.approx(held, rel=0.01)


def kept_by_autograd(work: Workload) -> int:
    """Bytes of distinct tensors, parameters and their copies left out, that a forward pass keeps for its blocks."""
    torch.manual_seed(0)
    spec = BitNetSpec(placement=work.placement, gain="ones", activation_bits=8 if work.quantized_inputs else None)
    model = CausalLM(work.architecture, spec if work.ternary else None)
    if work.ternary:
        set_quantization(model, 1.0 if work.quantized else 0.5)
    length = work.length
    documents = (torch.arange(length) * int(work.documents_a_row) // length + 1).expand(work.rows, length)
    ids = torch.randint(0, work.architecture.vocab_size, (work.rows, length))
    batch = Batch(ids, ids, torch.arange(length).expand(work.rows, length), documents.contiguous())
    parameters = {parameter.numel() for parameter in model.parameters() if parameter.ndim == 2}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim != 2 or tensor.numel() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=work.compute_bytes == 2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compute_bytes": 4},
        {"quantized": False},
        {"quantized": False, "compute_bytes": 4},
        {"placement": "per_projection"},
        {"placement": "none"},
        {"quantized_inputs": False},
        {"ternary": False},
        {"ternary": False, "compute_bytes": 4},
        {"documents_a_row": 3.0},
        {"rows": 1, "length": 600, "documents_a_row": 3.0},
        {"rows": 1, "length": 300},
        {"architecture": ARCHITECTURE.model_copy(update={"qk_norm": True, "family": "qwen3"})},
        {"architecture": ARCHITECTURE.model_copy(update={"hidden_act": "relu2"})},
    ],
    ids=str,
)
def test_blocks_keep_what_autograd_keeps(changes: dict[str, Any]) -> None:
    work = replace(WORK, **changes)
    deeper = work.architecture.model_copy(update={"num_hidden_layers": work.architecture.num_hidden_layers + 1})
    # The difference of two depths is one block, whatever else a forward pass keeps.
    block = kept_by_autograd(replace(work, architecture=deeper)) - kept_by_autograd(work)
    assert block_bytes(work) == pytest.approx(block, rel=0.03)


@pytest.mark.parametrize(
    ("overrides", "case"),
    [
        (["training=stage2_pretrain", "data=packaged"], {}),
        (["training=stage2_pretrain", "data=packaged", "training.gradient_accumulation_steps=2"], {}),
        (["training=stage2_pretrain", "data=packaged", "training.activation_checkpointing=true"], {}),
        (["training=stage2_pretrain", "data=packaged"], {"quantization_lambda": 0.5}),
        (["training=stage3_distill", "data=recall"], {"target_share": 0.2}),
        (["training=stage1_9_layerwise", "data=packaged"], {}),
    ],
    ids=str,
)
def test_the_peak_of_a_step_is_estimated_within_ten_percent(overrides: list[str], case: dict[str, Any]) -> None:
    """The full set of cases is `benchmark/estimator_accuracy.py`."""
    shape = ["training.batch_size=4", "training.max_seq_length=96", "training.dtype=bfloat16"]
    measured = Case(("model=tiny", "model.architecture.num_hidden_layers=2", *overrides, *shape), **case)
    config = compose(list(measured.overrides)).config
    trainer = build_trainer(measured, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own
        trainer.train_step()
        allocated = _allocated_peak(trainer)
    estimate = peak_of_run(case_workload(measured, config), warms_up=measured.quantization_lambda < 1)
    assert estimate.total == pytest.approx(allocated, rel=0.10)


def test_parts_add_up_and_none_is_negative() -> None:
    for changes in ({}, {"shards": 8, "accumulation": 4}, {"teacher": "offloaded", "logits_kl": True}):
        for moment in memory_moments(replace(WORK, **changes)):
            assert set(moment.parts) == set(PARTS)
            assert all(count >= 0 for count in moment.parts.values())
            assert moment.total == sum(moment.parts.values())


def test_recomputing_keeps_less_than_products_keep_less_than_all() -> None:
    off, selective, full = (
        checkpoint_bytes(replace(WORK, checkpointing=mode)) for mode in ("off", "selective", "full")
    )
    assert full == 4 * WORK.tokens * ARCHITECTURE.hidden_size
    assert full < selective < off


def test_shards_divide_what_lasts_and_nothing_else() -> None:
    whole, cut = peak_memory(WORK), peak_memory(replace(WORK, shards=8))
    assert cut.parts["masters"] == math.ceil(whole.parts["masters"] / 8)
    assert cut.parts["optimizer"] == math.ceil(whole.parts["optimizer"] / 8)
    assert peak_memory(replace(WORK, shards=8)).parts["activations"] == pytest.approx(
        peak_memory(replace(WORK, shards=64)).parts["activations"]
    )


def test_an_offloaded_optimizer_holds_nothing_on_the_device() -> None:
    for moment in memory_moments(replace(WORK, shards=8, optimizer_offload=True)):
        assert moment.parts["masters"] == moment.parts["optimizer"] == 0


def test_an_offloaded_teacher_is_whole_in_its_forward_pass_then_its_head_alone() -> None:
    on_gpu = replace(WORK, device_type="cuda", logits_kl=True)
    moments = memory_moments(replace(on_gpu, teacher="offloaded"))
    resident = memory_moments(replace(on_gpu, teacher="resident"))
    hidden = 4 * count_parameters(WORK.architecture, None).hidden
    assert moments[0] == resident[0]
    for moment, same in zip(moments[1:-1], resident[1:-1], strict=True):
        assert moment.parts == same.parts | {"teacher": same.parts["teacher"] - hidden}
        assert moment.parts["teacher"] >= 4 * count_parameters(WORK.architecture, None).table
    assert moments[-1].moment == "optimizer"
    assert moments[-1].parts["teacher"] == 0


def test_offloading_frees_nothing_on_a_cpu() -> None:
    moments = memory_moments(replace(WORK, teacher="offloaded", logits_kl=True))
    assert moments[:-1] == memory_moments(replace(WORK, teacher="resident", logits_kl=True))[:-1]


def test_a_cut_teacher_stays_until_the_step_is_done() -> None:
    cut = replace(WORK, shards=8, teacher="offloaded", logits_kl=True)
    assert len({moment.parts["teacher"] for moment in memory_moments(cut)[4:-1]}) == 1


def test_lambda_below_one_is_named_when_it_decides() -> None:
    long_run = replace(WORK, rows=64)
    assert peak_of_run(long_run, warms_up=True).moment.endswith("lambda below 1")
    assert peak_of_run(long_run, warms_up=True).total > peak_of_run(long_run, warms_up=False).total
    assert peak_of_run(replace(long_run, ternary=False), warms_up=True) == peak_memory(replace(long_run, ternary=False))
