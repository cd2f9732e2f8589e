"""A WrinkleFree ternary language model for `transformers`.

A decoder of the Llama kind: grouped heads, rotary positions, gated feed-forward; with optional biases, norms on the heads of
q and k, and SubLN norms in front of projections. Linear layers inside the blocks multiply ternary weight codes by
integer activation codes (arXiv:2402.17764, arXiv:2510.13998).

This file travels with an export and needs torch and transformers only. It says again what `wrinklefree.quantization`
says of rounding, because it must stand alone; tests hold the two equal bit for bit.

Shapes: B rows, T new positions, S all positions, D hidden size, n heads, d head dimension.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from .configuration_wrinklefree import WrinkleFreeConfig

CODES_PER_BYTE = 4
_SMALLEST_SCALE = 1e-5


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -1, 0, 1 (float32) and the scale that multiplies them: the mean magnitude, at least 1e-5, in float32."""
    values = weight.float()
    scale = values.abs().mean().clamp(min=_SMALLEST_SCALE)
    return (values / scale).round_().clamp_(-1, 1), scale


def quantize_activation(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integer codes (float32) of each token and the scale [..., 1] that multiplies them, in float32."""
    largest = 2 ** (bits - 1) - 1
    values = x.float()
    magnitude = values.abs().amax(dim=-1, keepdim=True).clamp(min=_SMALLEST_SCALE)
    return (values * largest).div_(magnitude).round_().clamp_(-largest - 1, largest), magnitude / largest


def unpack_codes(packed: Tensor, rows: int) -> Tensor:
    """Codes int8 [rows, in] of bytes [ceil(rows / 4), in]: bits 2i of byte row j hold row i * ceil(rows / 4) + j, plus 1."""
    parts = [(packed >> (2 * part)) & 3 for part in range(CODES_PER_BYTE)]
    return torch.cat(parts)[:rows].to(torch.int8) - 1


class TernaryLinear(nn.Module):
    """`x @ W.T + b` with ternary W and integer x.

    With `weight_format` master the weight is a trainable parameter and gradients pass both roundings unchanged. With
    packed it is bytes, and gradients flow to the input only.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, config: WrinkleFreeConfig, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.activation_bits = config.activation_bits
        self.keep_codes = config.keep_codes
        self.is_packed = config.weight_format == "packed"
        if self.is_packed:
            rows = -(-out_features // CODES_PER_BYTE)
            self.register_buffer("weight", torch.full((rows, in_features), 0b01010101, dtype=torch.uint8))
            self.register_buffer("weight_scale", torch.ones(1, dtype=torch.float32))
        else:
            self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self._kept: tuple[tuple[Any, ...], Tensor, Tensor] | None = None

    def train(self, mode: bool = True) -> "TernaryLinear":
        """Change the mode, and forget kept codes: some optimizers write weights in ways that cannot be seen."""
        self._kept = None
        return super().train(mode)

    def codes(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight codes [out, in] in `dtype`, and their scale in float32."""
        may_keep = self.keep_codes and not self.training and not torch.compiler.is_compiling()
        weight = self.weight
        version = 0 if weight.is_inference() else weight._version
        key = (dtype, weight.device, weight.data_ptr() if may_keep else 0, version)
        if may_keep and self._kept is not None and self._kept[0] == key:
            return self._kept[1], self._kept[2]
        with torch.no_grad():
            if self.is_packed:
                codes, scale = unpack_codes(weight, self.out_features), self.weight_scale.float()
            else:
                codes, scale = ternarize(weight)
            codes = codes.to(dtype)
        self._kept = (key, codes, scale) if may_keep else None
        return codes, scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out] in the dtype of x."""
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return self._trainable_forward(x, dtype)
        codes, scale = self.codes(dtype)
        if self.activation_bits is None:
            output = functional.linear(x.to(dtype), codes) * scale
        else:
            x_codes, x_scale = quantize_activation(x, self.activation_bits)
            output = functional.linear(x_codes.to(dtype), codes) * (x_scale * scale)
        if self.bias is not None:
            output = output + self.bias
        return output.to(dtype)

    def _trainable_forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The same function, equal up to rounding, with straight-through gradients."""
        codes, scale = self.codes(torch.float32)
        weight = codes * scale
        if not self.is_packed:
            master = self.weight.float()
            weight = master + (weight - master).detach()
        if self.activation_bits is not None:
            values = x.float()
            x_codes, x_scale = quantize_activation(values.detach(), self.activation_bits)
            x = values + (x_codes * x_scale - values).detach()
        bias = None if self.bias is None else self.bias.to(dtype)
        return functional.linear(x.to(dtype), weight.to(dtype), bias)

    def extra_repr(self) -> str:
        """Sizes and format, for printing."""
        kind = "packed" if self.is_packed else "master"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}"


class WrinkleFreeRMSNorm(nn.Module):
    """gain * x / rms(x) over the last dimension, in float32, returned in the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., size]."""
        return functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def norm_if(present: bool, size: int, eps: float) -> nn.Module:
    """A norm where there is one, else a module without parameters that does nothing."""
    return WrinkleFreeRMSNorm(size, eps) if present else nn.Identity()


def rotary_table(config: WrinkleFreeConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions [B, T], float32 [B, 1, T, d].

    Computed from the configuration in every pass: a stored table would have to survive loading without initialisation.
    """
    rope = config.rope_parameters or {}
    exponents = torch.arange(0, config.head_dim, 2, device=position_ids.device, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / rope.get("rope_theta", 10000.0) ** exponents
    if rope.get("rope_type", "default") == "llama3":
        periods = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        share = (periods - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        share = share.clamp(0.0, 1.0)
        frequencies = share * frequencies + (1 - share) * frequencies / rope["factor"]
    angles = position_ids[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(states: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate [B, n, T, d] by its positions, in float32, returned in the input's dtype."""
    cosine, sine = table
    values = states.float()
    first, second = values.chunk(2, dim=-1)
    return (values * cosine + torch.cat((-second, first), dim=-1) * sine).to(states.dtype)


def eager_attention(
    module: "WrinkleFreeAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention that also returns its weights: ([B, T, n, d], [B, n, T, S])."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = (query @ key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    mixed = functional.dropout(weights, dropout, module.training) @ value
    return mixed.transpose(1, 2).contiguous(), weights


class WrinkleFreeAttention(nn.Module):
    """Grouped-query attention with optional biases, norms of q and k, and SubLN."""

    def __init__(self, config: WrinkleFreeConfig, layer_idx: int) -> None:
        super().__init__()
        hidden, eps, self.head_dim = config.hidden_size, config.rms_norm_eps, config.head_dim
        query_size, key_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        # These five names are read by the attention functions of transformers.
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.q_proj = TernaryLinear(config, hidden, query_size, config.attention_bias)
        self.k_proj = TernaryLinear(config, hidden, key_size, config.attention_bias)
        self.v_proj = TernaryLinear(config, hidden, key_size, config.attention_bias)
        self.o_proj = TernaryLinear(config, query_size, hidden, config.attention_output_bias)
        self.q_norm = norm_if(config.qk_norm, self.head_dim, eps)
        self.k_norm = norm_if(config.qk_norm, self.head_dim, eps)
        per_projection = config.subln_placement == "per_projection"
        self.q_proj_norm = norm_if(per_projection, hidden, eps)
        self.k_proj_norm = norm_if(per_projection, hidden, eps)
        self.v_proj_norm = norm_if(per_projection, hidden, eps)
        self.o_proj_norm = norm_if(per_projection, query_size, eps)
        self.attn_sub_norm = norm_if(config.subln_placement == "output", query_size, eps)

    def forward(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] to [B, T, D], and the attention weights where the chosen function gives them."""
        query = rotate(self.q_norm(self._split(self.q_proj(self.q_proj_norm(x)))), table)
        key = rotate(self.k_norm(self._split(self.k_proj(self.k_proj_norm(x)))), table)
        value = self._split(self.v_proj(self.v_proj_norm(x)))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        name = self.config._attn_implementation
        attend = eager_attention if name in (None, "eager") else ALL_ATTENTION_FUNCTIONS[name]
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        mixed = mixed.reshape(*x.shape[:-1], -1)
        return self.o_proj(self.o_proj_norm(self.attn_sub_norm(mixed))), weights

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class WrinkleFreeMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), with SubLN where the placement puts it."""

    def __init__(self, config: WrinkleFreeConfig) -> None:
        super().__init__()
        hidden, inner, eps, bias = config.hidden_size, config.intermediate_size, config.rms_norm_eps, config.mlp_bias
        per_projection = config.subln_placement == "per_projection"
        self.gate_proj = TernaryLinear(config, hidden, inner, bias)
        self.up_proj = TernaryLinear(config, hidden, inner, bias)
        self.down_proj = TernaryLinear(config, inner, hidden, bias)
        self.gate_proj_norm = norm_if(per_projection, hidden, eps)
        self.up_proj_norm = norm_if(per_projection, hidden, eps)
        self.down_proj_norm = norm_if(per_projection, inner, eps)
        self.ffn_sub_norm = norm_if(config.subln_placement == "output", inner, eps)
        self.squared_relu = config.hidden_act == "relu2"

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        gate, up = self.gate_proj(self.gate_proj_norm(x)), self.up_proj(self.up_proj_norm(x))
        activated = functional.relu(gate).square() if self.squared_relu else functional.silu(gate)
        return self.down_proj(self.down_proj_norm(self.ffn_sub_norm(activated * up)))


class WrinkleFreeDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward network, each added to the residual stream."""

    def __init__(self, config: WrinkleFreeConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = WrinkleFreeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = WrinkleFreeAttention(config, layer_idx)
        self.post_attention_layernorm = WrinkleFreeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = WrinkleFreeMLP(config)

    def forward(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] to [B, T, D], and the attention weights where there are any."""
        mixed, weights = self.self_attn(self.input_layernorm(x), table, attention_mask, past_key_values, **kwargs)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), weights


class WrinkleFreePreTrainedModel(PreTrainedModel):
    """What `transformers` must know of the family."""

    config: WrinkleFreeConfig
    config_class = WrinkleFreeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["WrinkleFreeDecoderLayer"]  # noqa: RUF012 - the base class fixes the form
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["weight_scale"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, TernaryLinear):
            super()._init_weights(module)
            return
        if not module.is_packed:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class WrinkleFreeModel(WrinkleFreePreTrainedModel):
    """Embedding, blocks, final norm."""

    def __init__(self, config: WrinkleFreeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(WrinkleFreeDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = WrinkleFreeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm, [B, T, D].

        `hidden_states`, where asked for, are the embedding, the outputs of all blocks but the last, and the result.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        table = rotary_table(self.config, position_ids)
        wants_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_weights = self.config.output_attentions if output_attentions is None else output_attentions
        hidden: list[Tensor] = []
        weights: list[Tensor | None] = []
        for layer in self.layers:
            hidden.append(x)
            x, layer_weights = layer(x, table, mask, past_key_values, **kwargs)
            weights.append(layer_weights)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden, x) if wants_hidden else None,
            attentions=tuple(weights) if wants_weights else None,  # pyright: ignore[reportArgumentType]
        )


class WrinkleFreeForCausalLM(WrinkleFreePreTrainedModel, GenerationMixin):
    """The decoder with its language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - the base class fixes the form

    def __init__(self, config: WrinkleFreeConfig) -> None:
        super().__init__(config)
        self.model = WrinkleFreeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], and the mean cross-entropy of `labels` [B, T] (shifted here; -100 is no target)."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["WrinkleFreeForCausalLM", "WrinkleFreeModel", "WrinkleFreePreTrainedModel"]
