"""Repair without training: rounding and pruning by the error that a layer's output will have."""

from adalayer_native.repair.hessian import LayerHessian, LayerSolution

__all__ = ["LayerHessian", "LayerSolution"]
