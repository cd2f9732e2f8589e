"""What a model is (`Architecture`), how it is made ternary (`BitNetSpec`) and where its weights come from (`ModelConfig`).

Imports no torch: reading and checking a configuration must be instant.
"""

from typing import Literal

from pydantic import Field, model_validator

from wrinklefree.quantization.options import WeightScale
from wrinklefree.utils.config import Config

Placement = Literal["none", "output", "per_projection"]
"""Where SubLN norms stand: nowhere; before o_proj and down_proj (2 a block); inside all 7 projections of a block."""

Gain = Literal["ones", "median", "per_channel"]
"""How a SubLN gain starts: 1; the median of token RMS; per channel."""


class RopeScaling(Config):
    """Llama 3 rescaling of the rotary frequencies (the only kind that our models use)."""

    type: Literal["llama3"] = "llama3"
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(ge=1)


class Architecture(Config):
    """Dimensions and switches of one decoder; the names are Hugging Face's."""

    family: Literal["llama", "qwen2", "qwen3"]
    """Selects the Hugging Face class and names on import and export; the forward pass reads the fields below only."""
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2)
    max_position_embeddings: int = Field(ge=1)
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    hidden_act: Literal["silu", "relu2"] = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases on q, k and v (Qwen2, Qwen2.5)."""
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm on each head of q and k before RoPE (Qwen3)."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "Architecture":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        return self


class Quantization(Config):
    """Bits of the linear layers inside the blocks; embeddings, head and norms stay full precision."""

    weight_bits: float = Field(default=1.58, ge=1.58, le=1.58)
    """Always 1.58: three values, log2(3) bits."""
    activation_bits: Literal[4, 8] | None = 8
    """Bits of the per-token activation codes; null turns activation quantization off."""
    weight_scale: WeightScale = "absmean"
    """What multiplies codes to weights, and halved is their threshold: the mean of |W| (the paper), its median
    (arXiv:2407.09527), or its mean times a trained factor (as SEQ, arXiv:2502.02631). Read by stage 1; exports fold it."""
    dead_zone_bias: float = Field(default=0.0, ge=0)
    """Weights whose code is 0 are summed by output channel, times this, and added to the output, so that they get a
    gradient of their own (Tequila, arXiv:2509.23809, at 1e-3). 0: none. Read by stage 1; exports fold it into biases."""


class BitNetSpec(Config):
    """What stage 1 made of a model and how far its warm-ups have come; stored with every ternary artifact."""

    placement: Placement
    gain: Gain
    activation_bits: Literal[4, 8] | None = 8
    weight_scale: WeightScale = "absmean"
    dead_zone_bias: float = Field(default=0.0, ge=0)
    quantization_lambda: float = Field(default=0.0, ge=0, le=1)
    """0: full-precision function; 1: fully quantized. Never decreases along a chain of stages."""
    subln_strength: float = Field(default=1.0, ge=0, le=1)
    """0: SubLN is the identity; 1: true SubLN. Never decreases along a chain of stages."""

    @property
    def is_plain(self) -> bool:
        """Whether codes and scale follow from the weight alone, as files and engines take it; else `models.folding`."""
        return self.weight_scale == "absmean" and self.dead_zone_bias == 0


class ModelConfig(Config):
    """The `model` group: one pretrained model."""

    name: str
    """The config's name; part of the output paths."""
    source: Literal["hub", "package", "path"]
    """hub: Hugging Face; package: a hash-pinned asset (`package`); path: a local folder or artifact (`path`)."""
    pretrained: str | None = None
    """Hub id of the base model, read when `source=hub`."""
    package: str | None = None
    """Name in `wrinklefree.utils.assets` (or `tiny`, shipped in the wheel), read when `source=package`."""
    path: str | None = None
    """Folder with config.json, safetensors and tokenizer.json, read when `source=path`."""
    architecture: Architecture
    quantization: Quantization = Quantization()

    @model_validator(mode="after")
    def _source_has_its_key(self) -> "ModelConfig":
        key = {"hub": "pretrained", "package": "package", "path": "path"}[self.source]
        if getattr(self, key) is None:
            raise ValueError(f"model.source={self.source} needs model.{key}=...")
        return self
