"""Configuration of a WrinkleFree ternary language model for `transformers`.

Travels with an export, beside `modeling_wrinklefree.py`; needs torch and transformers only.
"""

from typing import Any, Literal

from transformers import PretrainedConfig


class WrinkleFreeConfig(PretrainedConfig):
    """Dimensions and switches of a ternary decoder. The names are those of Llama's configuration where it has them."""

    model_type = "wrinklefree"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - the base class fixes the form

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 128
    hidden_act: Literal["silu", "relu2"] = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    """`rope_theta` and `rope_type`: default, or llama3 with its four numbers."""
    attention_bias: bool = False
    """Biases on q, k and v."""
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm on each head of q and k before the rotation."""
    attention_dropout: float = 0.0
    subln_placement: Literal["none", "output", "per_projection"] = "output"
    """SubLN norms: nowhere; before o_proj and down_proj; before all seven projections."""
    activation_bits: Literal[4, 8] | None = 8
    """Bits of the per-token activation codes; None leaves activations as they are."""
    weight_format: Literal["master", "packed"] = "master"
    """master: floating-point weights, rounded to three values in the forward pass, trainable. packed: 2-bit codes, four
    in a byte, with one scale a matrix, frozen."""
    keep_codes: bool = True
    """Keep ternary codes in the compute dtype after their first use: fast. False unpacks or rounds them in every pass."""
