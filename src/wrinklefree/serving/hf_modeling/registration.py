"""Makes `transformers` know our classes, so that an export loads without running the code that travels with it."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from wrinklefree.serving.hf_modeling.configuration_wrinklefree import WrinkleFreeConfig
from wrinklefree.serving.hf_modeling.modeling_wrinklefree import WrinkleFreeForCausalLM, WrinkleFreeModel


def register() -> None:
    """Register configuration and models with the Auto classes; may be called again.

    A model saved with `save_pretrained` then takes the two files along, as an export does.
    """
    AutoConfig.register(WrinkleFreeConfig.model_type, WrinkleFreeConfig, exist_ok=True)
    AutoModel.register(WrinkleFreeConfig, WrinkleFreeModel, exist_ok=True)
    AutoModelForCausalLM.register(WrinkleFreeConfig, WrinkleFreeForCausalLM, exist_ok=True)
    WrinkleFreeConfig.register_for_auto_class()
    WrinkleFreeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
