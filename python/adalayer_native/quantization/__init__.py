"""Quantization: observers, fake quantization, graph analysis, calibration and conversion."""

from adalayer_native._deprecated import renamed_names
from adalayer_native.quantization.calibrate import calibrate, reestimate_batch_norms
from adalayer_native.quantization.convert import convert
from adalayer_native.quantization.exact import simulate
from adalayer_native.quantization.fake_quant import (
    ActivationQuantizer,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
)
from adalayer_native.quantization.file_contents import StoredModel, stored_model
from adalayer_native.quantization.graph import prepare
from adalayer_native.quantization.restore import restore
from adalayer_native.rounding import quantize_weight

__all__ = [
    "ActivationQuantizer",
    "QuantConv2d",
    "QuantConvTranspose2d",
    "QuantLinear",
    "StoredModel",
    "calibrate",
    "convert",
    "prepare",
    "quantize_weight",
    "reestimate_batch_norms",
    "restore",
    "simulate",
    "stored_model",
]

__getattr__ = renamed_names(
    __name__, {"NativeLayout": "StoredModel", "native_layout": "stored_model"}
)
