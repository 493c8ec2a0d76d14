"""Exact integer simulation of a prepared model: bit for bit what the native layers compute.

A native layer computes ``y = fma((float)acc, m[c], bias[c])`` with the int32 sum
``acc = sum(w * (q - z))``, ``m[c] = float32(input_scale * weight_scale[c])`` and the batch norm
folded into ``weight_scale`` and ``bias``. (Where groups of input channels have scales of their own,
each group's sum is multiplied by its own and added to the groups before.) Two things make that
reproducible in torch:

* The integer sum is taken in float64, where whole numbers up to 2^53 and all sums of them in any
  order are exact. (float32 would only do below 2^24.)
* torch has no fused multiply-add; ``rounding.fma_float32`` gives its bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from adalayer_native.capture.recurrence import RecurrentCells, RecurrentStates
from adalayer_native.ops.recurrence import EXACT
from adalayer_native.quantization.exact_steps import exact_steps, undo_steps
from adalayer_native.quantization.fake_quant import (
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLayer,
    QuantLinear,
)
from adalayer_native.quantization.fold import FoldedLayer, check_calibrated, fold
from adalayer_native.quantization.graph import layers_of, metadata, set_submodule
from adalayer_native.rounding import fma_float32, group_size_of, layer_form


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
        if self.multiplier.dim() == 2:
            return self._in_groups(levels)
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

    def _in_groups(self, levels: Tensor) -> Tensor:
        """Of a layer with weight groups: their parts are added to the bias in their order."""
        size = group_size_of(levels.shape[-1], self.multiplier.shape[1])
        out = self.bias.expand(*levels.shape[:-1], -1)
        for group, multiplier in enumerate(self.multiplier.T):
            part = slice(group * size, (group + 1) * size)
            acc = F.linear(levels[..., part], self.weight[:, part])
            out = fma_float32(acc.float(), multiplier, out)
        return out


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
    steps = [m for m in prepared.modules() if isinstance(m, (RecurrentStates, RecurrentCells))]
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
            for step in steps:
                step.exact = EXACT
        yield prepared
    finally:
        undo_steps(prepared, replaced)
        for target, norm in norms.items():
            set_submodule(prepared, target, norm)
        for layer in layers.values():
            layer.exact = None
        for step in steps:
            step.exact = None
        for module, mode in training:
            module.training = mode
