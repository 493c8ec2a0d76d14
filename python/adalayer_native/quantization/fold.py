"""What a native layer stores, computed from a prepared one: its batch norm folded in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adalayer_native.errors import CalibrationError
from adalayer_native.quantization.fake_quant import (
    ActivationQuantizer,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLinear,
)
from adalayer_native.quantization.graph import metadata, quantizers_of

__all__ = ["FoldedLayer", "check_calibrated", "fold"]


@dataclass
class FoldedLayer:
    """Everything a native layer stores, computed from a prepared layer.

    Attributes:
        weight: int8, output channels first: ``[O, I/groups, KH, KW]`` or ``[O, I]``.
        weight_scale: float32 ``[O]`` or ``[O, groups]``, batch norm included; may be negative.
        bias: float32 ``[O]``, batch norm included.
        quantizer: the calibrated quantizer of the layer's input.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    quantizer: ActivationQuantizer


@torch.no_grad()
def fold(prepared: nn.Module, name: str) -> FoldedLayer:
    """Integers, scales and bias of one layer, batch norm folded: ``k = gamma / sqrt(var + eps)``,
    ``weight_scale = s * k``, ``bias = (b - mean) * k + beta``, computed in float64.

    Raises:
        CalibrationError: the layer's input was never calibrated, or a result is not finite.
    """
    entry = metadata(prepared, "layers")[name]
    layer = prepared.get_submodule(name)
    assert isinstance(layer, (QuantConv2d, QuantConvTranspose2d, QuantLinear))
    quantizer = prepared.get_submodule(entry["input"])
    assert isinstance(quantizer, ActivationQuantizer)
    if not quantizer.calibrated:
        raise CalibrationError(
            f"layer {name!r}: its input {quantizer.name!r} has no range; "
            "run calibrate(prepared, loader) first"
        )
    scale = layer.weight_scale.double()
    bias = scale.new_zeros(len(scale)) if layer.bias is None else layer.bias.double()
    if entry["batch_norm"] is not None:
        norm = prepared.get_submodule(entry["batch_norm"])
        assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
        assert norm.running_mean is not None
        assert norm.running_var is not None
        factor = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            factor = factor * norm.weight.double()
        bias = (bias - norm.running_mean.double()) * factor
        if norm.bias is not None:
            bias = bias + norm.bias.double()
        scale = scale * (factor if scale.dim() == 1 else factor[:, None])
    scale, bias = scale.float(), bias.float()
    if not bool(torch.isfinite(scale).all() and torch.isfinite(bias).all()):
        raise CalibrationError(
            f"layer {name!r}: scale or bias is NaN or infinite after folding batch norm "
            f"{entry['batch_norm']!r}; expected finite parameters and statistics"
        )
    return FoldedLayer(layer.integers(), scale, bias, quantizer)


def check_calibrated(prepared: nn.Module) -> None:
    """Raise :class:`CalibrationError` unless every activation quantizer has a range."""
    missing = [name for name, item in quantizers_of(prepared).items() if not item.calibrated]
    if missing:
        shown = ", ".join(map(repr, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise CalibrationError(
            f"{len(missing)} activation quantizers have no range ({shown}); "
            "run calibrate(prepared, loader) first"
        )
