"""Exact integer simulation of a prepared model: bit for bit what the native layers compute.

A native layer computes ``y = fma((float)acc, m[c], bias[c])`` with the int32 sum
``acc = sum(w * (q - z))``, ``m[c] = float32(input_scale * weight_scale[c])`` and the batch norm
folded into ``weight_scale`` and ``bias``. Two things make that reproducible in torch:

* The integer sum is taken in float64, where whole numbers up to 2^53 and all sums of them in any
  order are exact. (float32 would only do below 2^24.)
* torch has no fused multiply-add; ``rounding.fma_float32`` gives its bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from adalayer_native.errors import CalibrationError
from adalayer_native.quantization.exact_steps import exact_steps, undo_steps
from adalayer_native.quantization.fake_quant import (
    ActivationQuantizer,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLayer,
    QuantLinear,
)
from adalayer_native.quantization.graph import (
    layers_of,
    metadata,
    quantizers_of,
    set_submodule,
)
from adalayer_native.rounding import fma_float32, layer_form


@dataclass
class FoldedLayer:
    """Everything a native layer stores, computed from a prepared layer.

    Attributes:
        weight: int8, output channels first: ``[O, I/groups, KH, KW]`` or ``[O, I]``.
        weight_scale: float32 ``[O]``, batch norm included; may be negative.
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
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.double()
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
        scale = scale * factor
    scale, bias = scale.float(), bias.float()
    if not bool(torch.isfinite(scale).all() and torch.isfinite(bias).all()):
        raise CalibrationError(
            f"layer {name!r}: scale or bias is NaN or infinite after folding batch norm "
            f"{entry['batch_norm']!r}; expected finite parameters and statistics"
        )
    return FoldedLayer(layer.integers(), scale, bias, quantizer)


class ExactLayer:
    """Integer computation of one layer, as installed by :func:`simulate`."""

    def __init__(self, layer: QuantLayer, folded: FoldedLayer) -> None:
        self.layer = layer
        self.quantizer = folded.quantizer
        self.weight = layer_form(layer, folded.weight).double()
        # A float32 product of two float32 numbers, rounded once, as the kernels take it.
        self.multiplier = folded.weight_scale * folded.quantizer.qparams[0]
        self.bias = folded.bias

    @torch.no_grad()
    def run(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Float32 input to float32 output, through the integers."""
        levels = self.quantizer.levels(x.float()).double()
        layer = self.layer
        if isinstance(layer, QuantConv2d):
            top, left, bottom, right = layer.sides
            acc = F.conv2d(
                F.pad(levels, (left, right, top, bottom)),
                self.weight,
                stride=layer.stride,
                dilation=layer.dilation,
                groups=layer.groups,
            )
        elif isinstance(layer, QuantConvTranspose2d):
            acc = layer.convolve(levels, self.weight, None, output_size)
        else:
            acc = F.linear(levels, self.weight)
        multiplier, bias = self.multiplier, self.bias
        if not isinstance(layer, QuantLinear):
            multiplier, bias = (t.view(1, -1, 1, 1) for t in (multiplier, bias))
        # int32 to float32 is one rounding, the first of the two that the kernels make.
        return fma_float32(acc.float(), multiplier, bias)


@contextmanager
def simulate(prepared: nn.Module, *, exact: bool = True) -> Iterator[nn.Module]:
    """Run a calibrated prepared model as the native kernels would.

    Inside the block the model is in evaluation mode and, with ``exact``, every quantized layer
    computes integers in float64, its batch norm folded, so that each layer's output has the very
    bits of the native layer on the same input. Slow; meant for verification. On leaving, the model
    is as it was. Not reentrant, and not for use from several threads at once.

    Args:
        prepared: from :func:`prepare`, calibrated.
        exact: false simulates in float32 (at most one level apart, rarely).

    Raises:
        CalibrationError: a range is missing or a folded value is not finite.
        UnsupportedModelError: the model did not come from :func:`prepare`.
    """
    entries = metadata(prepared, "layers")
    training = [(module, module.training) for module in prepared.modules()]
    layers = layers_of(prepared)
    norms: dict[str, nn.Module] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    check_calibrated(prepared)
    prepared.eval()
    try:
        if exact:
            for name, layer in layers.items():
                layer.exact = ExactLayer(layer, fold(prepared, name))
            for entry in entries.values():
                target = entry["batch_norm"]
                if target is not None:
                    norms[target] = prepared.get_submodule(target)
                    set_submodule(prepared, target, nn.Identity())
            exact_steps(prepared, norms, replaced)
        yield prepared
    finally:
        undo_steps(prepared, replaced)
        for target, norm in norms.items():
            set_submodule(prepared, target, norm)
        for layer in layers.values():
            layer.exact = None
        for module, mode in training:
            module.training = mode


def check_calibrated(prepared: nn.Module) -> None:
    """Raise :class:`CalibrationError` unless every activation quantizer has a range."""
    missing = [name for name, item in quantizers_of(prepared).items() if not item.calibrated]
    if missing:
        shown = ", ".join(map(repr, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise CalibrationError(
            f"{len(missing)} activation quantizers have no range ({shown}); "
            "run calibrate(prepared, loader) first"
        )
