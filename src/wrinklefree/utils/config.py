"""Typed, frozen configuration: the base class of every config, and `decode`."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all configs: frozen, unknown keys refused, field docstrings kept for the configuration guide."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, strict=False)
