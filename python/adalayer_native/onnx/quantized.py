"""Quantized networks: their integers are kept.

A value that the file has as integers, from a ``QuantizeLinear`` to the ``DequantizeLinear`` that
undoes it, is a float tensor on that grid here (:class:`~.values.Value`): nothing is lost, moves
and layers read it as any other, and only what computes with the integers themselves gets them. A
layer whose operand lies on a u8 grid and whose weight is integers that fit becomes native.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from adalayer_native.nn import FakeQuantize
from adalayer_native.onnx import functions
from adalayer_native.onnx.building import Builder, NodeView, Refused, operator_of
from adalayer_native.onnx.layers import convolution, product, window
from adalayer_native.onnx.native_layers import width_of
from adalayer_native.onnx.package import onnx_package
from adalayer_native.onnx.values import Constant, Grid, Integers, Value
from adalayer_native.plan import MAX_BITS, MIN_BITS
from adalayer_native.quantization.chains import ACT_ROOT

__all__ = ["along", "dequantize", "kind_of", "quantize", "real"]

# ONNX types of integers: bits, and the lowest of them.
_KINDS = {
    "UINT8": (8, 0), "INT8": (8, -128), "UINT4": (4, 0), "INT4": (4, -8), "UINT2": (2, 0),
    "INT2": (2, -2), "UINT16": (16, 0), "INT16": (16, -(1 << 15)), "INT32": (32, -(1 << 31)),
}  # fmt: skip
_OF_DTYPE = {
    torch.uint8: "UINT8", torch.int8: "INT8", torch.uint16: "UINT16", torch.int16: "INT16",
    torch.int32: "INT32",
}  # fmt: skip


def kind_of(value: Any) -> str:
    """ONNX type of a value's integers."""
    if isinstance(value, Value) and value.quantized and value.grid is not None:
        return value.grid.kind
    if value.kind:
        return str(value.kind)
    dtype = value.fake.dtype if isinstance(value, Value) else value.tensor.dtype
    found = _OF_DTYPE.get(dtype)
    if found is None:
        raise Refused(f"integers of type {str(dtype)[6:]} are not supported")
    return found


def _grid(scale: Tensor, zero_point: Tensor, kind: str) -> Grid | None:
    """The u8 grid of values quantized like this; None where there is none."""
    bits, lowest = _KINDS[kind]
    if scale.numel() != 1 or zero_point.numel() != 1 or bits > MAX_BITS:
        return None
    step, zero = float(scale.float()), int(zero_point) - lowest
    if not (step > 0 and math.isfinite(step) and 0 <= zero < 1 << bits):
        return None
    return Grid(step, zero, bits, lowest, kind)


# -- QuantizeLinear and DequantizeLinear -----------------------------------------------------------


@operator_of("QuantizeLinear", "com.microsoft.QuantizeLinear")
def _quantize_linear(g: Builder, node: NodeView, x: Any, scale: Any, zero_point: Any = None) -> Any:
    steps = g.known(scale, "scale")
    kind = _output_kind(node, zero_point)
    zero = torch.zeros(1, dtype=torch.int32)
    if zero_point is not None:
        zero = g.known(zero_point, "zero point")
    return quantize(g, node, x, steps, zero, kind)


def _output_kind(node: NodeView, zero_point: Any) -> str:
    if zero_point is None:
        number = node.get("output_dtype", 0)
        kind = onnx_package().TensorProto.DataType.Name(number) if number else "UINT8"
    else:
        kind = kind_of(zero_point)
    if kind not in _KINDS:
        raise Refused(f"integers of type {kind} are not supported")
    return kind


def quantize(g: Builder, node: NodeView, x: Any, steps: Tensor, zero: Tensor, kind: str) -> Any:
    """A value as integers of some kind."""
    bits, lowest = _KINDS[kind]
    grid = _grid(steps, zero, kind)
    if isinstance(x, Value) and grid is not None and x.fake.is_floating_point():
        # (What is joined is on the grid that all parts have; the engine wants to be told.)
        if x.grid == grid and x.node.target is not torch.cat:
            return x.on(grid, quantized=True)
        if g.integers:
            name = g.unused(f"{ACT_ROOT}.{g.layer_name(node).replace('.', '_')}")
            put = g.module(name, FakeQuantize(grid.scale, grid.zero_point, grid.bits), x)
        else:  # what is left of it in float: its ends
            low, high = -grid.zero_point, (1 << grid.bits) - 1 - grid.zero_point
            put = g.call(torch.clamp, x, low * grid.scale, high * grid.scale)
        return put.on(grid, quantized=True)
    dtype = {8: torch.int8, 16: torch.int16, 32: torch.int32}[max(8, bits)]
    if lowest == 0:
        dtype = {8: torch.uint8, 16: torch.uint16}[max(8, bits)]
    wide, offset = (_spread(item, x.shape, node) for item in (steps, zero))
    high = lowest + (1 << bits) - 1
    found = g.call(
        functions.quantize, x, Constant(wide), Constant(offset.to(torch.int32)), lowest, high, dtype
    )
    found.kind = kind
    if isinstance(found, Constant):
        found.name = getattr(x, "name", "")
    return found


@operator_of("DequantizeLinear", "com.microsoft.DequantizeLinear", quantized=True)
def _dequantize_linear(
    g: Builder, node: NodeView, x: Any, scale: Any, zero_point: Any = None
) -> Any:
    return real(g, node, x, scale, zero_point)


def dequantize(g: Builder, node: NodeView, x: Any, steps: Tensor, zero: Tensor, kind: str) -> Any:
    """Integers of some kind as real numbers; what is known of them is kept."""
    grid = _grid(steps, zero, kind) if kind in _KINDS else None
    if isinstance(x, Value) and x.quantized:
        if x.grid == grid and x.fake.dtype == steps.dtype:
            return x.on(grid)
        x = g.integers_of(x)
    wide, offset = (_spread(item, x.shape, node) for item in (steps, zero))
    found = g.call(functions.dequantize, x, Constant(wide), Constant(offset))
    if isinstance(found, Value):
        return found.on(grid)
    assert isinstance(x, Constant)
    found.name = x.name
    levels = x.tensor.to(torch.int32) - offset.to(torch.int32)
    if _KINDS.get(kind, (32, 0))[0] <= MAX_BITS:
        axis = None if steps.numel() == 1 else node.get("axis", 1) % max(1, x.rank)
        why_not = ""
        if steps.dim() > 1 or node.get("block_size"):
            why_not = "it has a scale for every block of inputs; expected one per output channel"
        found.integers = Integers(levels.to(torch.int16), steps.float(), axis, kind, why_not)
    elif kind in ("UINT16", "INT16"):
        why_not = f"its weights have {_KINDS[kind][0]} bits; expected {MIN_BITS} to {MAX_BITS}"
        found.integers = Integers(torch.zeros(1), steps.float(), None, kind, why_not)
    return found


def _spread(item: Tensor, shape: tuple[int, ...], node: NodeView) -> Tensor:
    """Scales or zero points so that they broadcast: one, one per slice, or one per block."""
    if item.numel() == 1:
        return item.reshape(())
    axis = node.get("axis", 1) % len(shape)
    if item.dim() == 1:
        if item.shape[0] != shape[axis]:
            raise Refused(f"{item.shape[0]} scales for axis {axis} of {shape[axis]} elements")
        return item.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    block = node.get("block_size") or -(-shape[axis] // item.shape[axis])
    return item.repeat_interleave(block, axis).narrow(axis, 0, shape[axis])


@operator_of("DynamicQuantizeLinear")
def _dynamic(g: Builder, node: NodeView, x: Value) -> Any:
    return g.call(functions.dynamic_quantize, x)


# -- operators on integers -------------------------------------------------------------------------


def real(g: Builder, node: NodeView, x: Any, scale: Any, zero_point: Any) -> Any:
    """An operand of a QLinear operator as real numbers."""
    zero = torch.zeros(1, dtype=torch.int32)
    if zero_point is not None:
        zero = g.known(zero_point, "zero point").to(torch.int32)
    return dequantize(g, node, x, g.known(scale, "scale"), zero, kind_of(x))


def along(node: NodeView, axis: int) -> NodeView:
    """A node whose scales lie along an axis."""
    return NodeView(node.kind, node.name, node.opset, {**node.attributes, "axis": axis}, [])


@operator_of("QLinearConv", quantized=True)
def _qlinear_conv(
    g: Builder, node: NodeView, x: Any, x_scale: Any, x_zero: Any, w: Any, w_scale: Any,
    w_zero: Any, *result: Any,
) -> Any:  # fmt: skip
    y_scale, y_zero, bias = (*result, None)[:3]
    operand = real(g, node, x, x_scale, x_zero)
    weight = real(g, along(node, 0), w, w_scale, w_zero)
    offset = None
    if bias is not None:
        step = g.known(x_scale, "scale").double() * g.known(w_scale, "scale").double()
        offset = Constant((g.known(bias, "bias").double() * step).float())
    out = convolution(g, node, operand, weight, offset)
    zero = g.known(y_zero, "zero point")
    return quantize(g, node, out, g.known(y_scale, "scale"), zero, kind_of(y_zero))


@operator_of("QLinearMatMul", quantized=True)
def _qlinear_matmul(
    g: Builder, node: NodeView, a: Any, a_scale: Any, a_zero: Any, b: Any, b_scale: Any,
    b_zero: Any, y_scale: Any, y_zero: Any,
) -> Any:  # fmt: skip
    left = real(g, along(node, a.rank - 2), a, a_scale, a_zero)
    right = real(g, along(node, b.rank - 1), b, b_scale, b_zero)
    out = product(g, node, left, right, None)
    zero = g.known(y_zero, "zero point")
    return quantize(g, node, out, g.known(y_scale, "scale"), zero, kind_of(y_zero))


def _zero(g: Builder, zero: Any, like: Any, axis: int | None) -> Any:
    """A zero point beside integers: as it is, or along an axis."""
    if zero is None:
        return Constant(torch.zeros((), dtype=torch.int32))
    if isinstance(zero, Value) or zero.tensor.numel() == 1:
        return zero
    shape = [1] * like.rank
    if axis is not None:
        shape[axis] = -1
    return Constant(zero.tensor.reshape(shape))


@operator_of("ConvInteger", quantized=True)
def _conv_integer(
    g: Builder, node: NodeView, x: Any, w: Any, x_zero: Any = None, w_zero: Any = None
) -> Any:
    kernel = list(w.shape[2:])
    if isinstance(w, Constant) and not isinstance(x_zero, Value):
        found = _by_integers(
            g, node, x, w, x_zero, w_zero, 0, lambda a, b: convolution(g, node, a, b, None)
        )
        if found is not None:
            return found
    x = g.integers_of(x) if x.quantized else x
    stride, dilation, pads = window(node, x, kernel)
    axes = len(kernel)
    around = [n for axis in reversed(range(axes)) for n in (pads[axis], pads[axes + axis])]
    return g.call(
        functions.integer_convolution, x, w, _zero(g, x_zero, x, None), _zero(g, w_zero, w, 0),
        stride, around, dilation, node.get("group", 1),
    )  # fmt: skip


@operator_of("MatMulInteger", quantized=True)
def _matmul_integer(
    g: Builder, node: NodeView, a: Any, b: Any, a_zero: Any = None, b_zero: Any = None
) -> Any:
    if isinstance(b, Constant) and b.rank == 2 and not isinstance(a_zero, Value):
        found = _by_integers(
            g, node, a, b, a_zero, b_zero, 1, lambda x, w: product(g, node, x, w, None)
        )
        if found is not None:
            return found
    a = g.integers_of(a) if a.quantized else a
    left = _zero(g, a_zero, a, a.rank - 2 if a.rank > 1 else None)
    right = _zero(g, b_zero, b, b.rank - 1)
    return g.call(functions.integer_product, a, b, left, right)


def _by_integers(
    g: Builder, node: NodeView, x: Any, w: Constant, x_zero: Any, w_zero: Any, axis: int, run: Any
) -> Any:
    """int32 sums by a native layer of steps of 1; None where float32 may not hold them."""
    if not g.integers or not isinstance(x, Value):
        return None
    x = g.integers_of(x) if x.quantized else x
    one = torch.ones(1)
    zeros = [
        torch.zeros(1, dtype=torch.int32) if item is None else g.known(item, "zero point")
        for item in (x_zero, w_zero)
    ]
    grid = _grid(one, zeros[0], kind_of(x))
    if grid is None or (zeros[1].numel() > 1 and zeros[1].numel() != w.shape[axis]):
        return None
    steps = one if zeros[1].numel() == 1 else torch.ones(w.shape[axis])
    weight = dequantize(g, along(node, axis), w, steps, zeros[1], kind_of(w))
    most = max(grid.zero_point, (1 << grid.bits) - 1 - grid.zero_point)
    others = [i for i in range(weight.rank) if i != axis]
    if float(weight.tensor.abs().double().sum(others).max()) * most >= 1 << 24:
        return None
    if width_of(weight.integers.levels) > MAX_BITS:
        return None
    operand = dequantize(g, node, x, one, zeros[0], kind_of(x))
    return g.call(torch.Tensor.to, run(operand, weight), torch.int32)
