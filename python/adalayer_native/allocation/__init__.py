"""From importance to bits and sparsity per layer, under a budget."""

from .allocate import METHODS, allocate
from .budget import Budget
from .energy import plan_energy
from .pareto import Frontier, pareto
from .rl import RLSettings
from .settings import Settings
from .size import estimate_bytes, float_bytes, packed_bytes, safetensors_bytes
from .tables import LayerTable

__all__ = [
    "METHODS",
    "Budget",
    "Frontier",
    "LayerTable",
    "RLSettings",
    "Settings",
    "allocate",
    "estimate_bytes",
    "float_bytes",
    "packed_bytes",
    "pareto",
    "plan_energy",
    "safetensors_bytes",
]
