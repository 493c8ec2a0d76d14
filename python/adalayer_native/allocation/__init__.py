"""From importance to bits and sparsity per layer, under a budget."""

from .allocate import METHODS, allocate
from .budget import Budget
from .size import estimate_bytes, float_bytes, packed_bytes, safetensors_bytes

__all__ = [
    "METHODS",
    "Budget",
    "allocate",
    "estimate_bytes",
    "float_bytes",
    "packed_bytes",
    "safetensors_bytes",
]
