"""The `distillation` group (stage 3) and the root key `layerwise` (stage 1.9). Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from wrinklefree.utils.config import Config


class LogitsConfig(Config):
    """L_LD: KL between teacher and student logits."""

    temperature: float = Field(default=5.0, gt=0)
    t_squared: bool | None = None
    """Multiply by temperature squared (the authors' code; the paper's equation 8 does not). null: the preset's."""
    positions: Literal["response", "all"] | None = None
    """Response targets only (paper), or all positions that are not padding (authors' code). null: the preset's."""
    token_scaling: float | None = Field(default=None, gt=0)
    """Tokens that surprise the teacher count more: the temperature of TSLD (arXiv:2308.06744), where it is 10. null: alike."""


class AttentionConfig(Config):
    """L_AD: KL between relations of the Q, K and V states of one layer."""

    form: Literal["algorithm_1", "equation_12", "authors_code", "attention_map"] | None = None
    """Row-normalised states; raw states with c = sqrt(d_r); row-normalised, c = 1 and divided by R again; or the
    attention probabilities themselves (no relation of the paper's). null: the preset's."""
    layer: int | Literal["auto"] = "auto"
    """Block whose states are compared; negative counts from the end. auto: at 79% of the depth, never the last (the
    paper's block 22 of 28)."""
    relation_heads: int = Field(default=32, ge=1)
    """R: relation heads that the concatenated head states are split into; must divide n*d and n_kv*d."""
    mask: Literal["documents", "none"] | None = None
    """documents: relations within a document only, no padding; none: the authors' unmasked T x T rows. null: the
    preset's."""


class DistillationConfig(Config):
    """L = L_CE + lambda_logits * L_LD + gamma_attention * L_AD (arXiv:2510.13998, eq. 13)."""

    name: str
    preset: Literal["paper", "authors_code"] = "paper"
    """Published settings of every field below that is null: form, t_squared, positions, mask."""
    lambda_logits: float = Field(default=10.0, ge=0)
    gamma_attention: Annotated[float, Field(ge=0)] | Literal["auto", "published"] = "auto"
    """auto: the weighted term equals CE at step 0; published: `published_gamma`."""
    published_gamma: float = Field(default=1e5, gt=0)
    """The paper's value for this kind of task: 1e5 (classification), 1e3 (summarization)."""
    logits: LogitsConfig = LogitsConfig()
    attention: AttentionConfig = AttentionConfig()


class LayerwiseConfig(Config):
    """Hidden-state alignment of stage 1.9 (ours; the closest published loss is OneBit's, arXiv:2402.11295)."""

    loss_type: Literal["mse_normalized", "cosine", "mse", "kl", "inner_product"] = "mse_normalized"
    layer_weights: Literal["progressive", "uniform", "exponential"] | tuple[float, ...] | None = "progressive"
    """progressive: l / sum l; exponential: 2^l; null or uniform: equal; or one number a layer."""
    normalize: bool = True
    """Scale the layer weights to sum 1."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the logit-lens KL (`loss_type=kl`)."""
    lm_loss_weight: float = Field(default=0.0, ge=0)
    """Weight of next-token cross-entropy added to the alignment."""
