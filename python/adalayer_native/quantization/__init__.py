"""Quantization: observers, fake quantization, graph analysis, calibration and conversion."""

from adalayer_native.quantization.calibrate import calibrate, reestimate_batch_norms
from adalayer_native.quantization.convert import convert
from adalayer_native.quantization.exact import simulate
from adalayer_native.quantization.fake_quant import (
    ActivationQuantizer,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
)
from adalayer_native.quantization.graph import prepare
from adalayer_native.quantization.layout import NativeLayout, native_layout
from adalayer_native.quantization.restore import restore
from adalayer_native.rounding import quantize_weight

__all__ = [
    "ActivationQuantizer",
    "NativeLayout",
    "QuantConv2d",
    "QuantConvTranspose2d",
    "QuantLinear",
    "calibrate",
    "convert",
    "native_layout",
    "prepare",
    "quantize_weight",
    "reestimate_batch_norms",
    "restore",
    "simulate",
]
