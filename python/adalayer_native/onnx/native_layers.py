"""A layer of the file with integer weights as a native one, where its numbers fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native.errors import UnsupportedModelError
from adalayer_native.nn import Conv2d, ConvTranspose2d, Linear
from adalayer_native.onnx.building import Builder
from adalayer_native.onnx.values import Constant, Integers, Value
from adalayer_native.plan import MAX_BITS, MIN_BITS
from adalayer_native.rounding import conv_form

__all__ = ["native_layer", "width_of"]

_CLASSES: dict[str, Any] = {
    "Conv2d": Conv2d,
    "ConvTranspose2d": ConvTranspose2d,
    "Linear": Linear,
}


def native_layer(
    g: Builder,
    kind: str,
    name: str,
    x: Value,
    weight: Constant,
    axis: int,
    bias: Tensor | None,
    **geometry: Any,
) -> Value | None:
    """A native layer with the weight's integers; None where it has none, or they do not fit.

    Args:
        kind: its class: ``"Conv2d"``, ``"ConvTranspose2d"`` or ``"Linear"``.
        weight: ``[O, I/groups, KH, KW]``, ``[I, O/groups, KH, KW]`` or ``[I, O]``.
        axis: of the weight, along which output channels lie.
        bias: float ``[O]``.
        geometry: arguments of the layer's ``from_quantized``.
    """
    integers = weight.integers
    if integers is None or not g.integers:
        return None
    reason = integers.why_not
    if not reason and x.grid is None:
        reason = "its input is not quantized to 8 or fewer bits, with one scale"
    if not reason and integers.axis not in (None, axis):
        reason = f"its scales lie along axis {integers.axis}; expected one per output channel"
    bits = width_of(integers.levels)
    if not reason and bits > MAX_BITS:
        low, high = int(integers.levels.min()), int(integers.levels.max())
        reason = (
            f"its integers less the zero point go from {low} to {high}; {MAX_BITS} bits hold "
            "-128 to 127"
        )
    # (A batch norm's negative factor is in the scale where the integers cannot be turned round.)
    if not reason and not bool((torch.isfinite(integers.scale) & (integers.scale != 0)).all()):
        reason = "one of its scales is 0 or no number"
    layer = None
    if not reason:
        assert x.grid is not None
        grid = {
            "input_scale": x.grid.scale,
            "input_zero_point": x.grid.zero_point,
            "input_bits": x.grid.bits,
        }
        groups = int(geometry.get("groups", 1))
        levels, scale = _by_channel(kind, integers, axis, groups)
        make = _CLASSES[kind]
        try:
            layer = make.from_quantized(levels, bits, scale, bias, **grid, **geometry)
        except UnsupportedModelError as error:  # sums that may leave int32
            reason = str(error)
    if layer is None:
        g.kept[name] = reason
        return None
    g.kept[name] = bits
    return g.module(name, layer, x)


def width_of(levels: Tensor) -> int:
    """The fewest bits that hold signed integers."""
    if levels.numel() == 0:
        return MIN_BITS
    low, high = int(levels.min()), int(levels.max())
    return max(MIN_BITS, 1 + max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0))


def _by_channel(kind: str, integers: Integers, axis: int, groups: int) -> tuple[Tensor, Tensor]:
    """Integers with output channels first, and a scale for each."""
    levels = integers.levels.to(torch.int8)
    scale = integers.scale.float().flatten()
    each = levels.shape[axis]
    scale = scale.expand(each) if scale.numel() == 1 else scale
    if kind == "Linear":
        return levels.t().contiguous(), scale
    if kind == "ConvTranspose2d":
        inputs, outputs = levels.shape[:2]
        shell = nn.ConvTranspose2d(
            inputs, outputs * groups, 1, groups=groups, bias=False, device="meta"
        )
        return conv_form(shell, levels).contiguous(), scale.repeat(groups)
    return levels.contiguous(), scale
