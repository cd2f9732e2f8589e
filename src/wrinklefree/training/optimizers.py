"""Which optimizer a stage gets, and how it is built. `training.lr` is AdamW's rate for every type.

Two kinds of parameters are told apart. *Hidden matrices*, the weights of the linear layers inside the blocks, are what
Muon and APOLLO are made for; embeddings, the output head, norms and biases get AdamW beside them, in one optimizer
object with one state. Weight decay acts on every matrix, embeddings and head included (the usual choice for language
models), and on no norm gain or bias.

Every group carries `lr_scale` and `decay_scale`, ratios to the run's rate and weight decay, so that the schedule sets
all types through `set_learning_rate` and `set_weight_decay`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from wrinklefree.training.apollo import Apollo
from wrinklefree.training.config import OptimizerConfig
from wrinklefree.training.device import multiplies_bfloat16
from wrinklefree.training.local_shards import local_parameter
from wrinklefree.training.muon import ShardedMuon
from wrinklefree.utils.errors import ConfigError

OptimizerType = Literal["adamw", "adamw_8bit", "muon", "apollo", "apollo_mini"]
"""A decided type; `OptimizerConfig.type` may still be `auto`."""

FUSED_DEVICES = ("cpu", "cuda")
"""Devices whose fused AdamW is one kernel for all parameters."""


@dataclass(frozen=True)
class ResolvedOptimizer:
    """The optimizer of a run, and one line that says why."""

    type: OptimizerType
    reason: str


def resolve_optimizer(config: OptimizerConfig, stage: str, device_type: str) -> ResolvedOptimizer:
    """Decide `auto`; obey anything else.

    Args:
        config: The root key `optimizer`.
        stage: `training.stage`, such as `stage2`.
        device_type: `cpu`, `cuda`, ...
    """
    if config.type != "auto":
        return ResolvedOptimizer(config.type, f"optimizer.type={config.type}, as asked")
    if stage != "stage2":
        # 8-bit AdamW becomes the default once its sharded form is proven equal to the unsharded one.
        return ResolvedOptimizer(
            "adamw", "adamw (optimizer.type=adamw_8bit holds its state in a quarter of the memory)"
        )
    if device_type == "cuda":
        return ResolvedOptimizer("muon", "muon is the default of stage2 on a GPU")
    return ResolvedOptimizer(
        "adamw", f"adamw on {device_type}; on a GPU stage2 uses muon (optimizer.type=muon asks for it here too)"
    )


def build_optimizer(
    model: nn.Module, type: OptimizerType, config: OptimizerConfig, lr: float, *, seed: int = 0
) -> Optimizer:
    """Optimizer over the trainable parameters of a model.

    Args:
        model: Its parameters are float32 masters, already on their device.
        type: From `resolve_optimizer`.
        config: Betas, weight decay and the settings of each type.
        lr: Rate of the first step; `set_learning_rate` changes it.
        seed: Of APOLLO's random projections.

    Raises:
        ConfigError: bitsandbytes is missing, or the model has no hidden matrix for Muon or APOLLO.
    """
    match type:
        case "adamw":
            return _adamw(_adamw_groups(model.parameters()), config, lr)
        case "adamw_8bit":
            return _adamw_8bit(_adamw_groups(model.parameters()), config, lr)
        case "muon":
            hidden, others = _split(model, type)
            matrices: Optimizer = ShardedMuon(
                [_group(hidden, decays=True)],
                lr=lr,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                iteration_dtype=torch.bfloat16 if multiplies_bfloat16(hidden[0].device) else torch.float32,
            )
        case "apollo" | "apollo_mini":
            hidden, others = _split(model, type)
            matrices = Apollo(
                [_group(hidden, decays=True)],
                lr=lr,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                weight_decay=config.weight_decay,
                rank=1 if type == "apollo_mini" else config.rank,
                scaling="tensor" if type == "apollo_mini" else "channel",
                update_projection_every=config.update_projection_every,
                seed=seed,
            )
    return CompositeOptimizer([matrices, _adamw(_adamw_groups(others), config, lr)] if others else [matrices])


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the rate of the next step, in AdamW's scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def set_weight_decay(optimizer: Optimizer, weight_decay: float) -> None:
    """Set the weight decay of the next step; groups that never decay stay at 0."""
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay * group["decay_scale"]


def state_bytes_per_parameter(optimizer: Optimizer) -> float:
    """Bytes of optimizer state for each trained parameter, as held now (so after at least one step).

    A tensor that several parameters share, as the 8-bit code tables, counts once; APOLLO's projections count.
    """
    tensors = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, Tensor)
    }
    parts = optimizer.parts if isinstance(optimizer, CompositeOptimizer) else [optimizer]
    projections = sum(part.projection_bytes() for part in parts if isinstance(part, Apollo))
    parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return (sum(tensors.values()) + projections) / parameters


class CompositeOptimizer(Optimizer):
    """Several optimizers over disjoint parameters behind one `param_groups`, one `state` and one `state_dict`.

    The parts work on the composite's own group and state objects, so whoever changes a group's rate or loads a state
    sees one ordinary optimizer.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        """Take over freshly built optimizers."""
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], defaults={})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Adopt a loaded state; torch's `load_state_dict` ends here."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every part's parameters. Closures are refused: parts would each evaluate them."""
        if closure is not None:
            raise ValueError("CompositeOptimizer.step takes no closure")
        for part in self.parts:
            part.step()

    def _share(self) -> None:
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.param_groups = self.param_groups[start:end]
            part.state = self.state
            start = end


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Trainable weights of the linear layers inside the blocks: no embedding, tied or not, and no output head."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = {
        id(module.weight): module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] != "lm_head"
    }
    return [w for key, w in weights.items() if key not in embeddings and w.requires_grad]


def _split(model: nn.Module, type: OptimizerType) -> tuple[list[Tensor], list[Tensor]]:
    hidden = hidden_matrices(model)
    if not hidden:
        raise ConfigError(f"optimizer.type={type} needs linear layers inside the model's blocks; use adamw")
    chosen = {id(p) for p in hidden}
    return hidden, [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]


def _group(parameters: list[Tensor], *, decays: bool) -> dict[str, Any]:
    local = [local_parameter(parameter) for parameter in parameters]
    group: dict[str, Any] = {"params": local, "lr_scale": 1.0, "decay_scale": 1.0 if decays else 0.0}
    return group if decays else group | {"weight_decay": 0.0}


def _adamw_groups(parameters: Iterable[Tensor]) -> list[dict[str, Any]]:
    trainable = [p for p in parameters if p.requires_grad]
    matrices = [p for p in trainable if p.ndim >= 2]
    vectors = [p for p in trainable if p.ndim < 2]
    return [_group(ps, decays=decays) for ps, decays in ((matrices, True), (vectors, False)) if ps]


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig, lr: float) -> Optimizer:
    devices = {p.device.type for group in groups for p in group["params"]}
    return AdamW(
        groups,
        lr=lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True if devices <= set(FUSED_DEVICES) else None,
    )


def _adamw_8bit(groups: list[dict[str, Any]], config: OptimizerConfig, lr: float) -> Optimizer:
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"optimizer.type=adamw_8bit needs bitsandbytes, which does not import here ({error}); install it, or "
            "choose optimizer.type=adamw"
        ) from error
    return AdamW8bit(
        groups, lr=lr, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay
    )
