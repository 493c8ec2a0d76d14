"""adalayer_native: layer-wise compression of PyTorch CNNs, run on native low-bit kernels.

The main job in one call is :func:`compress`; its steps are :func:`analyze`, :func:`allocate`,
:func:`prepare`, :func:`calibrate`, :func:`repair` or :func:`finetune`, :func:`convert` and
:func:`save`.
"""

from typing import TYPE_CHECKING

from adalayer_native._lazy import lazy
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

if TYPE_CHECKING:
    from adalayer_native import energy, nn, ops, plot
    from adalayer_native._library import get_cmake_dir, get_include, get_library_dir
    from adalayer_native._version import __version__ as __version__
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
    from adalayer_native.engine import Engine, Size, compile, load
    from adalayer_native.files import save
    from adalayer_native.importance.analyze import analyze
    from adalayer_native.importance.scores import LayerScores
    from adalayer_native.importance.task_loss import TaskLoss
    from adalayer_native.microscope import Comparison, compare
    from adalayer_native.onnx import from_onnx, to_onnx
    from adalayer_native.ops import get_num_threads, set_num_threads
    from adalayer_native.plan import LayerPlan, Plan
    from adalayer_native.quantization.calibrate import calibrate
    from adalayer_native.quantization.convert import convert
    from adalayer_native.quantization.exact import simulate
    from adalayer_native.quantization.graph import prepare
    from adalayer_native.quantization.restore import restore
    from adalayer_native.repair import LayerHessian, Repair, layer_hessians, repair
    from adalayer_native.tensor_train import Decomposed, tensor_train
    from adalayer_native.training.finetune import finetune

__all__ = [
    "AdaError",
    "Budget",
    "BudgetError",
    "CalibrationError",
    "Comparison",
    "Compressed",
    "DataError",
    "Decomposed",
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
    "Size",
    "TaskLoss",
    "UnsupportedModelError",
    "allocate",
    "analyze",
    "calibrate",
    "capture",
    "compare",
    "compile",
    "compress",
    "convert",
    "energy",
    "estimate_bytes",
    "finetune",
    "from_onnx",
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
    "tensor_train",
    "to_onnx",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "_library": ["get_cmake_dir", "get_include", "get_library_dir"],
        "_version": ["__version__"],
        "allocation": [
            "Budget",
            "Frontier",
            "allocate",
            "estimate_bytes",
            "pareto",
            "plan_energy",
        ],
        "capture": ["capture"],
        "compress": ["Compressed", "compress"],
        "engine": ["Engine", "Size", "compile", "load"],
        "files": ["save"],
        "importance.analyze": ["analyze"],
        "importance.scores": ["LayerScores"],
        "importance.task_loss": ["TaskLoss"],
        "microscope": ["Comparison", "compare"],
        "onnx": ["from_onnx", "to_onnx"],
        "ops": ["get_num_threads", "set_num_threads"],
        "plan": ["LayerPlan", "Plan"],
        "quantization.calibrate": ["calibrate"],
        "quantization.convert": ["convert"],
        "quantization.restore": ["restore"],
        "quantization.exact": ["simulate"],
        "quantization.graph": ["prepare"],
        "repair": ["LayerHessian", "Repair", "layer_hessians", "repair"],
        "tensor_train": ["Decomposed", "tensor_train"],
        "training": ["finetune"],
    },
    submodules=("energy", "nn", "ops", "plot"),
)
