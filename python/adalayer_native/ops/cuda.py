"""The operators on GPU tensors. The CUDA library is loaded by the first call."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from adalayer_native import _C, cuda
from adalayer_native.errors import InputError
from adalayer_native.operations import parameters
from adalayer_native.ops.checks import (
    FLOATS,
    channels_last,
    check_input,
    check_parameters,
    dense,
    weight_only_shape,
)
from adalayer_native.ops.geometry import LayerCall, LayerGeometry

__all__ = ["fake_quantize_cuda", "linear_weight_only_cuda", "quantize_cuda", "run_cuda"]

_INF = float("inf")


def _same_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise InputError(
                f"adalayer::{op}: the input is on {x.device}, but {name} is on {t.device}"
            )


def _ordered(x: Tensor) -> tuple[Tensor, bool]:
    """x in float32 and in memory order, and whether that is channels_last."""
    nhwc = channels_last(x)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    return x.float().contiguous(memory_format=layout), nhwc


def run_cuda(call: LayerCall) -> Tensor:
    """The result of a layer on GPU tensors."""
    if call.scale.dim() == 2:
        raise InputError(
            "adalayer::linear: linear layers with weight groups run on the CPU alone, got an input "
            f"on {call.x.device}"
        )
    if call.layer.operator == "linear":
        rows = call.x.contiguous().reshape(-1, call.layer.channels, 1, 1)
        out = _convolve(call._replace(x=rows))
        return out.reshape(*call.x.shape[:-1], call.layer.out_channels)
    if not call.layer.levels:
        return _convolve(call)
    # Levels as the numbers that they are on a grid of step 1, and back: whole numbers, exactly.
    out = _convolve(call._replace(x=call.x.float() - call.layer.input_zero_point))
    assert call.layer.grid is not None
    return (out + call.layer.grid[1]).to(torch.uint8)


def _convolve(call: LayerCall) -> Tensor:
    x, g, packed, scale, bias, residual = call
    op = g.operator
    check_parameters(op, packed, scale, bias)
    _same_device(op, x, weight_packed=packed, scale=scale, bias=bias, residual=residual)
    values, nhwc = _ordered(x)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    shape = g.out_shape(x.shape)
    out = torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=layout)
    if residual is not None:
        if tuple(residual.shape) != shape:
            raise ValueError(
                f"adalayer::{op}: expected a residual of shape {list(shape)}, "
                f"got {list(residual.shape)}"
            )
        residual = residual.float().contiguous(memory_format=layout)
    if out.numel() > 0:
        size = x.shape[2], x.shape[3]
        cuda.run_layer(
            (g, size),
            lambda: _program(g, size, shape[2:], packed, scale, bias),
            g.grid,
            (packed, scale, bias),
            values,
            residual,
            out,
            nhwc=nhwc,
        )
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def _program(
    g: LayerGeometry,
    size: tuple[int, int],
    out_size: tuple[int, int],
    packed: Tensor,
    scale: Tensor,
    bias: Tensor,
) -> _C.Program:
    """A network of one layer, from float images of a size to float ones."""
    program = _C.Program()
    top = 2**g.input_bits - 1
    x = program.add_value("x", "f32", g.channels, *size)
    levels = program.add_value(
        "levels", "u8", g.channels, *size, g.input_scale, g.input_zero_point, top
    )
    y = program.add_value("y", "f32", g.out_channels, *out_size)
    weights = packed.detach().cpu().contiguous()
    # One product in float32, as everywhere.
    steps = scale.detach().cpu().numpy() * np.float32(g.input_scale)
    steps = np.ascontiguousarray(steps, dtype=np.float32)
    offsets = np.ascontiguousarray(bias.detach().cpu().numpy(), dtype=np.float32)
    op = "conv" if g.output_padding is None else "conv_transpose"
    lists = parameters(
        op,
        **g.by_name(),
        clamp_lo=-_INF if g.lo is None else g.lo,
        clamp_hi=_INF if g.hi is None else g.hi,
        weights=program.add_constant_weights(weights.data_ptr(), weights.numel()),
        scale=program.add_constant_f32(steps.ctypes.data, steps.size),
        bias=program.add_constant_f32(offsets.ctypes.data, offsets.size),
    )
    program.add_node("quantize", "quantize", [x], levels)
    program.add_node(op, op, [levels], y, *lists)
    program.set_inputs([x])
    program.set_outputs([y])
    return program


def quantize_cuda(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    check_input("quantize", x, FLOATS, None)
    values = dense(x.float())
    out = torch.empty_like(values, dtype=torch.uint8)
    cuda.on_grid(values, scale, zero_point, bits, out, real=False)
    return out


def fake_quantize_cuda(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    check_input("fake_quantize", x, FLOATS, None)
    values = dense(x.float())
    out = torch.empty_like(values)
    cuda.on_grid(values, scale, zero_point, bits, out, real=True)
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def linear_weight_only_cuda(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor
) -> Tensor:
    shape = weight_only_shape(x, weight_scale)
    check_parameters("linear_weight_only", weight_packed, weight_scale, bias)
    _same_device(
        "linear_weight_only", x, weight_packed=weight_packed, scale=weight_scale, bias=bias
    )
    return cuda.linear_float(x.contiguous(), weight_packed, weight_scale, bias, shape)
