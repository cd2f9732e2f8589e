"""Choices of the weight quantizer by name. Imports no torch: configurations are read without it."""

from typing import Literal

WeightScale = Literal["absmean", "median", "learned"]
"""What multiplies codes to weights: the mean of |W|; its median; its mean times a factor that is trained."""
