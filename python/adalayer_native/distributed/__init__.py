"""Training on several machines: gradients with few bits on the wire, and an optimizer for them."""

from adalayer_native.distributed.dual_averaging import OptimisticDualAveraging
from adalayer_native.distributed.hook import QuantizedGradients

__all__ = ["OptimisticDualAveraging", "QuantizedGradients"]
