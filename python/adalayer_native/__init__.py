"""adalayer_native: layer-wise compression of PyTorch CNNs, run on native low-bit kernels.

The main job in one call is :func:`compress`; its steps are :func:`analyze`, :func:`allocate`,
:func:`prepare`, :func:`calibrate`, :func:`repair` or :func:`finetune`, :func:`convert` and
:func:`save`.
"""

from importlib.metadata import PackageNotFoundError, version

from adalayer_native import energy, nn, ops, plot
from adalayer_native._library import get_cmake_dir, get_include, get_library_dir
from adalayer_native.allocation import (
    Budget,
    Frontier,
    allocate,
    estimate_bytes,
    pareto,
    plan_energy,
)
from adalayer_native.capture import capture
from adalayer_native.compress import Compressed, compress
from adalayer_native.engine import Engine, compile, load
from adalayer_native.errors import (
    AdaError,
    BudgetError,
    CalibrationError,
    DataError,
    DeviceError,
    EnergyError,
    FileFormatError,
    InputError,
    MissingExtraError,
    PlanError,
    UnsupportedModelError,
)
from adalayer_native.files import save
from adalayer_native.importance import LayerScores, analyze
from adalayer_native.ops import get_num_threads, set_num_threads
from adalayer_native.plan import LayerPlan, Plan
from adalayer_native.quantization import calibrate, convert, prepare, restore, simulate
from adalayer_native.repair import LayerHessian, Repair, layer_hessians, repair
from adalayer_native.training import finetune

try:
    __version__ = version("adalayer_native")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = [
    "AdaError",
    "Budget",
    "BudgetError",
    "CalibrationError",
    "Compressed",
    "DataError",
    "DeviceError",
    "EnergyError",
    "Engine",
    "FileFormatError",
    "Frontier",
    "InputError",
    "LayerHessian",
    "LayerPlan",
    "LayerScores",
    "MissingExtraError",
    "Plan",
    "PlanError",
    "Repair",
    "UnsupportedModelError",
    "allocate",
    "analyze",
    "calibrate",
    "capture",
    "compile",
    "compress",
    "convert",
    "energy",
    "estimate_bytes",
    "finetune",
    "get_cmake_dir",
    "get_include",
    "get_library_dir",
    "get_num_threads",
    "layer_hessians",
    "load",
    "nn",
    "ops",
    "pareto",
    "plan_energy",
    "plot",
    "prepare",
    "repair",
    "restore",
    "save",
    "set_num_threads",
    "simulate",
]
