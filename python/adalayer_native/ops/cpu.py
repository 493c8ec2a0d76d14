"""The operators on CPU tensors that are no layers; layers are in ``layer.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from adalayer_native import _C
from adalayer_native.ops.checks import (
    FLOATS,
    check_input,
    check_parameters,
    dense,
    weight_only_shape,
)
from adalayer_native.ops.machine import get_num_threads
from adalayer_native.ops.packing import unpack_weight

__all__ = ["fake_quantize_cpu", "linear_weight_only_cpu", "quantize_cpu"]


def quantize_cpu(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    check_input("quantize", x, FLOATS, None)
    x = dense(x.float())
    out = torch.empty_like(x, dtype=torch.uint8)
    _C.quantize(x.data_ptr(), x.numel(), scale, zero_point, bits, out.data_ptr(), get_num_threads())
    return out


def fake_quantize_cpu(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    check_input("fake_quantize", x, FLOATS, None)
    dtype = x.dtype
    x = dense(x.float())
    out = torch.empty_like(x)
    _C.fake_quantize(
        x.data_ptr(), x.numel(), scale, zero_point, bits, out.data_ptr(), get_num_threads()
    )
    return out if dtype == torch.float32 else out.to(dtype)


def linear_weight_only_cpu(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    """The same function by torch, for comparison; slow."""
    shape = weight_only_shape(x, weight_scale)
    check_parameters("linear_weight_only", weight_packed, weight_scale, bias)
    weight = unpack_weight(weight_packed).flatten(1).float()
    y = (x.float().reshape(-1, x.shape[-1]) @ weight.T) * weight_scale + bias
    return y.to(x.dtype).reshape(shape)
