"""Tensor-train layers: many weights as a chain of small native layers (LTNN)."""

from adalayer_native.tensor_train.choose import Decomposed, Train, tensor_train

__all__ = ["Decomposed", "Train", "tensor_train"]
