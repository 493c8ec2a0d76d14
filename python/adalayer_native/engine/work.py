"""Multiply-accumulates of the nodes of an exported graph, native layers among them.

What runs in torch counts like what runs natively: a share of the work is a share only if all of
it is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from adalayer_native import ops
from adalayer_native.capture.opaque import OPERATOR
from adalayer_native.capture.products import Shape, Shapes, count_of, inner
from adalayer_native.capture.vocabulary import arguments, op_name
from adalayer_native.engine.export import Exported

__all__ = ["multiply_accumulates"]


class _Shapes(Shapes):
    """Sizes of a node's operands, by name in the operator's schema, and of its result."""

    def __init__(self, exported: Exported, node: fx.Node) -> None:
        self.exported = exported
        self.arguments = arguments(node)
        value = node.meta.get("val")
        self.result = self._shape(value[0] if isinstance(value, (list, tuple)) else value)

    def of(self, operand: Any) -> Shape:
        """Sizes of an operand."""
        return self._shape(operand.meta.get("val") if isinstance(operand, fx.Node) else operand)

    def _shape(self, value: Any) -> Shape:
        if not isinstance(value, Tensor):
            raise TypeError(f"expected a tensor, got {value!r}")
        return tuple(self._size(size) for size in value.shape)

    def _size(self, size: int | torch.SymInt) -> int:
        """A size for one image; of a dimension that varies by itself, that of the example."""
        if isinstance(size, int):
            return size
        batch = self.exported.batch.node
        found = size.node.expr.subs({batch.expr: 1})
        if found.is_number:
            return int(found)
        hint = int(size.node.hint)
        varies = batch.expr in size.node.expr.free_symbols
        return max(1, hint // int(batch.hint)) if varies else hint


def multiply_accumulates(exported: Exported, node: fx.Node) -> int:
    """Products per image that an operator adds up: a call with a batch of one.

    Returns:
        0 for operators that multiply no matrices, and for those that are not known.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0
    name = op_name(node)
    if name == OPERATOR:
        return round(exported.calls[str(node.args[0])].macs)
    count = _NATIVE.get(name) or count_of(name)
    return 0 if count is None else count(_Shapes(exported, node))


def _positions(shape: Shape, weight: Shape) -> int:
    """Sizes of an image's positions; the weights say how many axes these are."""
    return math.prod(shape[len(shape) - (len(weight) - 2) :])


def _packed(shapes: _Shapes) -> Shape:
    tensor = shapes.exported.tensor(shapes.arguments["weight_packed"])
    found: Sequence[int] = ops.packed_info(tensor)["shape"]
    return tuple(found)


def _native_convolution(shapes: _Shapes) -> int:
    return math.prod(shapes.result) * math.prod(_packed(shapes)[1:])


def _native_transposed(shapes: _Shapes) -> int:
    # Packed weights are [O, I / groups, ...] in either direction, which is as many in all.
    weight = _packed(shapes)
    return _positions(shapes["x"], weight) * math.prod(weight)


def _float_convolution(shapes: _Shapes) -> int:
    return math.prod(shapes.result) * math.prod(shapes["weight"][1:])


def _recurrence(shapes: _Shapes) -> int:
    return math.prod(shapes["products"]) * _packed(shapes)[1]


_NATIVE: dict[str, Callable[[Any], int]] = {
    "adalayer.exact_conv2d.default": _float_convolution,
    "adalayer.exact_linear.default": inner("input"),
    "adalayer.conv2d.default": _native_convolution,
    "adalayer.conv_transpose2d.default": _native_transposed,
    "adalayer.linear.default": inner("x"),
    "adalayer.recurrence.default": _recurrence,
}
