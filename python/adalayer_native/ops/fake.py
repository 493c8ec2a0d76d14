"""What the operators return, without values: for tracing, exporting and compiling."""

from __future__ import annotations

import torch
from torch import Tensor

from adalayer_native.ops.checks import (
    FLOATS,
    channels_last,
    check_input,
    dense,
    weight_only_shape,
)
from adalayer_native.ops.geometry import LayerCall

__all__ = [
    "fake_quantize_fake",
    "linear_weight_only_fake",
    "quantize_fake",
    "run_fake",
]


def run_fake(call: LayerCall) -> Tensor:
    """Result of a layer: the input's dtype, device and memory format."""
    x, layer = call.x, call.layer
    if layer.operator == "linear":
        return x.new_empty((*x.shape[:-1], layer.out_channels))
    layout = torch.channels_last if channels_last(x) else torch.contiguous_format
    return x.new_empty(layer.out_shape(x.shape)).contiguous(memory_format=layout)


def quantize_fake(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    check_input("quantize", x, FLOATS, None)
    return torch.empty_like(dense(x), dtype=torch.uint8)


def fake_quantize_fake(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    check_input("fake_quantize", x, FLOATS, None)
    return torch.empty_like(dense(x))


def linear_weight_only_fake(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    return x.new_empty(weight_only_shape(x, weight_scale))
