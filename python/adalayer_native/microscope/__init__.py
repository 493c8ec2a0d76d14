"""The microscope: what quantization does to every layer of a network, and what would undo it."""

from adalayer_native.microscope.comparing import compare
from adalayer_native.microscope.result import Comparison, Row, Suggestion

__all__ = ["Comparison", "Row", "Suggestion", "compare"]
