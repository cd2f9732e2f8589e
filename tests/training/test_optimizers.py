"""Optimizers: which one, over which parameters, at which rate, and resumed bit by bit."""

import copy
import json
import sys

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from wrinklefree.training import optimizers
from wrinklefree.training.config import OptimizerConfig
from wrinklefree.training.muon import ShardedMuon
from wrinklefree.training.optimizers import (
    CompositeOptimizer,
    build_optimizer,
    hidden_matrices,
    resolve_optimizer,
    set_learning_rate,
    set_weight_decay,
    state_bytes_per_parameter,
)
from wrinklefree.utils.errors import ConfigError
from wrinklefree.utils.training_state import pack_optimizer_state, unpack_optimizer_state

TYPES = ["adamw", "adamw_8bit", "muon", "apollo", "apollo_mini"]
CONFIG = OptimizerConfig(rank=4, update_projection_every=2, weight_decay=0.1)


class TinyModel(nn.Module):
    """Every kind of parameter; matrices are large enough (4096) for 8-bit state."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(80, 64)
        self.up = nn.Linear(64, 96)
        self.norm = nn.RMSNorm(96)
        self.down = nn.Linear(96, 64, bias=False)
        self.lm_head = nn.Linear(64, 80, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        return self.lm_head(x + self.down(torch.tanh(self.norm(self.up(x)))))


def make(type: str, *, seed: int = 0, tied: bool = False) -> tuple[TinyModel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = TinyModel(tied)
    return model, build_optimizer(model, type, CONFIG, 1e-3, seed=seed)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids, targets = torch.randint(0, 80, (2, 48), generator=generator)
        set_learning_rate(optimizer, 1e-2 / (step + 1))
        set_weight_decay(optimizer, 0.1 if step < 4 else 0.0)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids), targets).backward()
        optimizer.step()


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("stop", range(1, 6))
def test_a_resumed_run_equals_the_uninterrupted_one_bit_by_bit(type, stop):
    whole_model, whole = make(type, seed=7)
    train(whole_model, whole, range(6))

    model, optimizer = make(type, seed=7)
    train(model, optimizer, range(stop))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model, optimizer = make(type, seed=7)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, range(stop, 6))

    for expected, actual in zip(whole_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("type", TYPES)
def test_without_the_saved_state_the_resumed_run_differs(type):
    """The test above could not fail if the state did not matter."""
    whole_model, whole = make(type)
    train(whole_model, whole, range(6))
    model, optimizer = make(type)
    train(model, optimizer, range(3))
    train(model, build_optimizer(model, type, CONFIG, 1e-3), range(3, 6))
    assert not torch.equal(whole_model.up.weight, model.up.weight)


@pytest.mark.parametrize("type", TYPES)
def test_state_survives_a_checkpoints_tensors_and_json(type):
    model, optimizer = make(type)
    train(model, optimizer, range(2))
    tensors, state = pack_optimizer_state(optimizer)
    tensors, state = load(save(tensors)), json.loads(json.dumps(state))
    fresh_model, fresh = make(type)
    fresh_model.load_state_dict(model.state_dict())
    unpack_optimizer_state(fresh, tensors, state)
    train(model, optimizer, range(2, 4))
    train(fresh_model, fresh, range(2, 4))
    for expected, actual in zip(model.parameters(), fresh_model.parameters(), strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("type", TYPES)
def test_solves_a_least_squares_problem(type):
    torch.manual_seed(0)
    truth, inputs = torch.randn(64, 64) / 8, torch.randn(256, 64)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    optimizer = build_optimizer(model, type, OptimizerConfig(rank=16, weight_decay=0.0), 1e-2)
    losses = []
    for step in range(300):
        set_learning_rate(optimizer, 1e-2 * (1 - step / 300))
        loss = (model(inputs) - inputs @ truth.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


def test_muon_and_apollo_take_the_hidden_matrices_and_adamw_the_rest():
    for type in ("muon", "apollo"):
        model, optimizer = make(type)
        assert isinstance(optimizer, CompositeOptimizer)
        assert [p is q for p, q in zip(hidden_matrices(model), [model.up.weight, model.down.weight], strict=True)]
        train(model, optimizer, range(1))
        kind = {id(p): set(optimizer.state[p]) for p in model.parameters()}
        special = {"momentum_buffer"} if type == "muon" else {"step", "exp_avg", "exp_avg_sq", "update_norm"}
        assert kind[id(model.up.weight)] == kind[id(model.down.weight)] == special
        for other in (model.embed_tokens.weight, model.lm_head.weight, model.norm.weight, model.up.bias):
            assert kind[id(other)] == {"step", "exp_avg", "exp_avg_sq"}


def test_tied_embeddings_are_trained_once_and_by_adamw():
    model, optimizer = make("muon", tied=True)
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted({id(p) for p in model.parameters()})
    assert id(model.lm_head.weight) not in {id(p) for p in hidden_matrices(model)}


def test_frozen_parameters_are_left_out():
    model = TinyModel()
    model.up.weight.requires_grad_(False)
    for type in ("adamw", "muon"):
        optimizer = build_optimizer(model, type, CONFIG, 1e-3)
        assert all(p is not model.up.weight for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("type", TYPES)
def test_weight_decay_acts_on_matrices_only(type):
    model, optimizer = make(type)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in model.named_parameters()} == {
        "embed_tokens.weight": 0.1,
        "up.weight": 0.1,
        "up.bias": 0.0,
        "norm.weight": 0.0,
        "down.weight": 0.1,
        "lm_head.weight": 0.1,
    }
    set_weight_decay(optimizer, 0.3)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3, 0.0}
    set_weight_decay(optimizer, 0.0)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


@pytest.mark.parametrize("type", TYPES)
def test_decay_alone_shrinks_a_matrix_by_rate_times_decay(type):
    model, optimizer = make(type)
    before = copy.deepcopy(model.state_dict())
    set_learning_rate(optimizer, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.down.weight.detach(), before["down.weight"] * 0.95)
    torch.testing.assert_close(model.embed_tokens.weight.detach(), before["embed_tokens.weight"] * 0.95)
    assert torch.equal(model.norm.weight.detach(), before["norm.weight"])


@pytest.mark.parametrize("type", TYPES)
def test_a_rate_of_zero_changes_nothing(type):
    model, optimizer = make(type)
    before = copy.deepcopy(model.state_dict())
    set_learning_rate(optimizer, 0.0)
    nn.functional.cross_entropy(model(torch.arange(80)), torch.arange(80)).backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("type", TYPES)
def test_one_rate_means_about_one_step_length_for_all_types(type):
    """AdamW's first step is +-lr in every entry. Muon's match is 0.2 of that by design (a typical AdamW step's RMS)."""
    model, optimizer = make(type)
    before = model.up.weight.detach().clone()
    set_learning_rate(optimizer, 1e-2)
    set_weight_decay(optimizer, 0.0)
    ids = torch.arange(80)
    nn.functional.cross_entropy(model(ids), ids.flip(0)).backward()
    optimizer.step()
    step = (model.up.weight.detach() - before).square().mean().sqrt().item() / 1e-2
    low, high = {"muon": (0.1, 0.3)}.get(type, (0.5, 2.5))
    assert low < step < high


def test_muon_step_is_an_orthogonal_matrix_times_its_scale():
    model, optimizer = make("muon")
    before = model.down.weight.detach().clone()
    set_learning_rate(optimizer, 1.0)
    set_weight_decay(optimizer, 0.0)
    model.down.weight.grad = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    optimizer.step()
    singular = torch.linalg.svdvals(before - model.down.weight.detach()) / (0.2 * 96**0.5)
    # Five Newton-Schulz steps bring singular values to about 0.7 to 1.2, not to 1.
    assert 0.5 < singular.min() <= singular.max() < 1.4


@pytest.mark.parametrize("multiplies", [True, False])
def test_muon_iterates_in_bfloat16_where_the_device_multiplies_it(multiplies, monkeypatch):
    monkeypatch.setattr(optimizers, "multiplies_bfloat16", lambda device: multiplies)
    model, optimizer = make("muon")
    gradient = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    model.down.weight.grad = gradient.clone()
    optimizer.step()
    for dtype in (torch.bfloat16, torch.float32):
        copied = nn.Parameter(make("muon")[0].down.weight.detach().clone())
        copied.grad = gradient.clone()
        reference = ShardedMuon(
            [{"params": [copied]}],
            lr=1e-3, weight_decay=CONFIG.weight_decay, momentum=CONFIG.momentum, iteration_dtype=dtype,
        )  # fmt: skip
        reference.step()
        assert torch.equal(model.down.weight, copied) == (multiplies == (dtype == torch.bfloat16))


def test_adamw_is_torchs_adamw():
    model, optimizer = make("adamw")
    reference_model = copy.deepcopy(model)
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in reference_model.parameters() if p.ndim == 2]},
            {"params": [p for p in reference_model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        foreach=False,
    )
    for _ in range(3):
        for each, stepper in ((model, optimizer), (reference_model, reference)):
            stepper.zero_grad()
            nn.functional.cross_entropy(each(torch.arange(80)), torch.arange(80)).backward()
            stepper.step()
    for actual, expected in zip(model.parameters(), reference_model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("type", "low", "high"),
    [
        ("adamw", 8.0, 8.1),
        ("adamw_8bit", 2.0, 2.6),
        ("muon", 5.0, 6.1),
        ("apollo", 3.0, 5.0),
        ("apollo_mini", 3.0, 4.5),
    ],
)
def test_state_size(type, low, high):
    """A third of this model is hidden matrices: 4 bytes (Muon), or next to nothing (APOLLO), beside AdamW's 8."""
    model, optimizer = make(type)
    train(model, optimizer, range(1))
    assert low <= state_bytes_per_parameter(optimizer) <= high


def test_state_size_of_apollo_counted_by_hand():
    model = nn.Sequential(nn.Linear(32, 64, bias=False))
    optimizer = build_optimizer(model, "apollo", OptimizerConfig(rank=4), 1e-3)
    model(torch.randn(3, 32)).square().sum().backward()
    optimizer.step()
    moments, projection, numbers = 2 * 4 * 64, 4 * 32, 2
    assert state_bytes_per_parameter(optimizer) == 4 * (moments + projection + numbers) / (32 * 64)


@pytest.mark.parametrize(
    ("stage", "device", "expected"),
    [
        ("stage2", "cuda", "muon"),
        ("stage3", "cuda", "adamw"),
        ("fp_sft", "cuda", "adamw"),
        ("stage2", "cpu", "adamw"),
        ("stage1_9", "cpu", "adamw"),
    ],
)
def test_auto_is_decided_by_stage_and_device(stage, device, expected):
    assert resolve_optimizer(OptimizerConfig(), stage, device).type == expected


def test_the_cpus_choice_names_what_it_stands_in_for():
    reason = resolve_optimizer(OptimizerConfig(), "stage2", "cpu").reason
    assert reason == "adamw on cpu; on a GPU stage2 uses muon (optimizer.type=muon asks for it here too)"


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_explicit_type_is_obeyed_everywhere(type, device):
    assert resolve_optimizer(OptimizerConfig(type=type), "stage3", device).type == type


def test_missing_bitsandbytes_is_an_error_and_not_another_optimizer(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(ConfigError, match=r"optimizer\.type=adamw_8bit needs bitsandbytes.*optimizer\.type=adamw"):
        make("adamw_8bit")


@pytest.mark.parametrize("type", ["muon", "apollo", "apollo_mini"])
def test_a_model_without_hidden_matrices_is_refused(type):
    with pytest.raises(ConfigError, match=f"optimizer.type={type} needs linear layers"):
        build_optimizer(nn.Embedding(4, 8), type, CONFIG, 1e-3)


def test_a_composite_takes_no_closure():
    _, optimizer = make("muon")
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: 0.0)
