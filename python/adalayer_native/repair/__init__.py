"""Repair without training: rounding and pruning by the error that a layer's output will have."""

from adalayer_native.repair.hessian import LayerHessian, LayerSolution
from adalayer_native.repair.repair import LayerReport, Repair, repair

__all__ = ["LayerHessian", "LayerReport", "LayerSolution", "Repair", "repair"]
