"""What a native layer computes, in float."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from adalayer_native import ops
from adalayer_native.rounding import per_channel

__all__ = ["FloatLayer"]


class FloatLayer(nn.Module):
    """A native layer in float: the same dequantized weights and the same fake-quant activations.

    Its sums are torch's, so results may differ in their last bits.

    Args:
        operator: "conv2d", "conv_transpose2d" or "linear".
        a: arguments of that operator of ``adalayer``, by name.
        on_grid: the input has the fake-quantized values already.
    """

    def __init__(self, operator: str, a: dict[str, Any], on_grid: bool) -> None:
        super().__init__()
        self.name = operator
        weight = ops.unpack_weight(a["weight_packed"]).float()
        scale = per_channel(a["weight_scale"], weight.shape[:2])[:, :, None, None]
        self.register_buffer("weight", weight * scale)
        self.register_buffer("bias", a["bias"])
        self.input_grid = (
            None if on_grid else (a["input_scale"], a["input_zero_point"], a["input_bits"])
        )
        self.bounds = a["lo"], a["hi"]
        self.output_grid = None
        if a.get("output_bits"):
            self.output_grid = a["output_scale"], a["output_zero_point"], a["output_bits"]
        self.geometry: dict[str, Any] = {}
        self.pad: list[int] | None = None
        if self.name == "linear":
            self.weight = self.weight.flatten(1)
            return
        padding = list(a["padding"])
        if len(padding) == 4:
            top, left, bottom, right = padding
            if (top, left) != (bottom, right):
                self.pad, top, left = [left, right, top, bottom], 0, 0
            padding = [top, left]
        for key in ("stride", "dilation", "output_padding"):
            if key in a:
                self.geometry[key] = list(a[key])
        self.geometry |= {"padding": padding, "groups": int(a["groups"])}
        if self.name == "conv_transpose2d":
            # Packed weights are [O, I/groups, ...]; torch wants [I, O/groups, ...].
            groups = int(a["groups"])
            o, i, kh, kw = self.weight.shape
            split = self.weight.reshape(groups, o // groups, i, kh, kw).transpose(1, 2)
            self.weight = split.reshape(groups * i, o // groups, kh, kw)

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.input_grid is not None:
            x = ops.fake_quantize(x, *self.input_grid)
        if self.name == "linear":
            y = F.linear(x, self.weight, self.bias)
        else:
            if self.pad is not None:
                x = F.pad(x, self.pad)
            run = F.conv2d if self.name == "conv2d" else F.conv_transpose2d
            y = run(x, self.weight, self.bias, **self.geometry)
        if residual is not None:
            y = y + residual
        if self.bounds != (None, None):
            y = y.clamp(*self.bounds)
        return y if self.output_grid is None else ops.fake_quantize(y, *self.output_grid)
