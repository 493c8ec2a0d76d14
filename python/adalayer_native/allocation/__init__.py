"""From importance to bits and sparsity per layer, under a budget."""

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .allocate import allocate
    from .budget import Budget
    from .energy import plan_energy
    from .layer_table import LayerTable
    from .methods import METHODS
    from .optimal_settings import Settings
    from .pareto import Frontier, pareto
    from .request import check_method, check_request
    from .rl import RLSettings
    from .size import estimate_bytes, float_bytes, packed_bytes, safetensors_bytes
    from .uniform import everywhere

__all__ = [
    "METHODS",
    "Budget",
    "Frontier",
    "LayerTable",
    "RLSettings",
    "Settings",
    "allocate",
    "check_method",
    "check_request",
    "estimate_bytes",
    "everywhere",
    "float_bytes",
    "packed_bytes",
    "pareto",
    "plan_energy",
    "safetensors_bytes",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "allocate": ["allocate"],
        "budget": ["Budget"],
        "energy": ["plan_energy"],
        "methods": ["METHODS"],
        "pareto": ["Frontier", "pareto"],
        "request": ["check_method", "check_request"],
        "rl": ["RLSettings"],
        "optimal_settings": ["Settings"],
        "size": ["estimate_bytes", "float_bytes", "packed_bytes", "safetensors_bytes"],
        "layer_table": ["LayerTable"],
        "uniform": ["everywhere"],
    },
)
