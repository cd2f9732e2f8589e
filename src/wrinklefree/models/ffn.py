"""Gated feed-forward network: down(activation(gate(x)) * up(x))."""

from torch import Tensor, nn
from torch.nn import functional

from wrinklefree.models.bitlinear import make_linear, project
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.subln import subln_or_identity


class FeedForward(nn.Module):
    """SiLU or squared-ReLU gate, with SubLN where the placement puts it.

    SubLN names: `ffn_sub_norm` before down_proj (placement output); `<projection>_norm` (placement per_projection).
    """

    def __init__(self, architecture: Architecture, bitnet: BitNetSpec | None) -> None:
        super().__init__()
        hidden, inner, eps = architecture.hidden_size, architecture.intermediate_size, architecture.rms_norm_eps
        bias = architecture.mlp_bias
        self.gate_proj = make_linear(hidden, inner, bias, bitnet)
        self.up_proj = make_linear(hidden, inner, bias, bitnet)
        self.down_proj = make_linear(inner, hidden, bias, bitnet)
        self.norm_per_projection = bitnet is not None and bitnet.placement == "per_projection"
        self.gate_proj_norm = subln_or_identity(self.norm_per_projection, hidden, eps)
        self.up_proj_norm = subln_or_identity(self.norm_per_projection, hidden, eps)
        self.down_proj_norm = subln_or_identity(self.norm_per_projection, inner, eps)
        self.ffn_sub_norm = subln_or_identity(bitnet is not None and bitnet.placement == "output", inner, eps)
        self.squared_relu = architecture.hidden_act == "relu2"

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        if self.norm_per_projection:
            gate, up = self.gate_proj(self.gate_proj_norm(x)), self.up_proj(self.up_proj_norm(x))
        else:
            gate, up = project(x, (self.gate_proj, self.up_proj))
        activated = functional.relu(gate).square() if self.squared_relu else functional.silu(gate)
        return self.down_proj(self.down_proj_norm(self.ffn_sub_norm(activated * up)))
