"""The front end: a model as a graph of operators and layers, which all rooms above work on."""

from adalayer_native.capture.capture import capture, captured
from adalayer_native.capture.example import Inputs, batch_inputs, example_of, inputs_and_target
from adalayer_native.capture.model import GraphModel, Port, Signature, TensorInfo, info_of

__all__ = [
    "GraphModel",
    "Inputs",
    "Port",
    "Signature",
    "TensorInfo",
    "batch_inputs",
    "capture",
    "captured",
    "example_of",
    "info_of",
    "inputs_and_target",
]
