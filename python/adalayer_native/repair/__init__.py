"""Repair without training: rounding and pruning by the error that a layer's output will have."""

from adalayer_native.repair.collect import layer_hessians
from adalayer_native.repair.hessian import LayerHessian, LayerSolution
from adalayer_native.repair.learning import Distance
from adalayer_native.repair.model import HELD_BACK, LayerReport, Repair, repair

__all__ = [
    "HELD_BACK",
    "Distance",
    "LayerHessian",
    "LayerReport",
    "LayerSolution",
    "Repair",
    "layer_hessians",
    "repair",
]
