"""Programs and layers on NVIDIA GPUs, through ``libadalayer_cuda.so``, which is loaded on demand.

Nothing here is needed, or loaded, by a process that has no tensor on a GPU.
"""

from adalayer_native.cuda.engine import CudaEngine
from adalayer_native.cuda.layers import linear_float, on_grid, run_layer
from adalayer_native.cuda.library import available, device_index, why_unavailable

__all__ = [
    "CudaEngine",
    "available",
    "device_index",
    "linear_float",
    "on_grid",
    "run_layer",
    "why_unavailable",
]
