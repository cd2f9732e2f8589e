"""Choices of quantization by name. Imports no torch: configurations are read without it."""

from typing import Literal

WeightScale = Literal["absmean", "median", "learned"]
"""What multiplies codes to weights: the mean of |W|; its median; its mean times a factor that is trained."""

ForwardProducts = Literal["auto", "float", "int8"]
"""In what a ternary layer multiplies codes with codes: the compute dtype; int8, whose sums are exact; whichever is faster."""

BackwardProducts = Literal["exact", "int8", "fp8"]
"""In what the two products of a ternary layer's backward pass are made: the compute dtype; int8; float8."""
