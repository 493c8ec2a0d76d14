"""What ONNX Runtime's quantizer writes as ``QuantFormat.QOperator``, in its own domain.

Each of these is a standard operator with a scale and a zero point beside every operand and its
result. So it is followed as what it says: operands as real numbers on their grids, the standard
operator, the result on its grid. Convolutions and products keep their integers, and what lies
between them is u8 again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adalayer_native.onnx.building import OPERATORS, Builder, NodeView, Refused, operator_of
from adalayer_native.onnx.layers import product, row_of
from adalayer_native.onnx.quantized import along, kind_of, quantize, real
from adalayer_native.onnx.shapes import transposed
from adalayer_native.onnx.values import Constant

__all__: list[str] = []

DOMAIN = "com.microsoft"
_OF_ONE = {
    "QLinearAveragePool": "AveragePool", "QLinearGlobalAveragePool": "GlobalAveragePool",
    "QLinearLeakyRelu": "LeakyRelu", "QLinearSigmoid": "Sigmoid", "QLinearSoftmax": "Softmax",
}  # fmt: skip
_OF_TWO = {"QLinearAdd": "Add", "QLinearMul": "Mul"}


def _names(kinds: dict[str, str]) -> list[str]:
    return [f"{DOMAIN}.{kind}" for kind in kinds]


def _standard(g: Builder, node: NodeView, kind: str, *operands: Any) -> Any:
    """What a standard operator makes of real numbers."""
    return OPERATORS[kind][0](g, replace(node, kind=kind), *operands)


def _result(g: Builder, node: NodeView, found: Any, like: Any, scale: Any, zero: Any) -> Any:
    """Real numbers as integers again, of the type of ``like`` where no zero point says it."""
    kind = kind_of(like if zero is None else zero)
    offset = torch.zeros(1, dtype=torch.int32) if zero is None else g.known(zero, "zero point")
    return quantize(g, node, found, g.known(scale, "scale"), offset, kind)


@operator_of(*_names(_OF_ONE), quantized=True)
def _one(
    g: Builder, node: NodeView, x: Any, x_scale: Any, x_zero: Any, y_scale: Any, y_zero: Any = None
) -> Any:
    if node.get("channels_last"):
        raise Refused("its channels come last (channels_last); expected NCHW")
    # (A softmax says itself which version's it is: those before 13 flatten.)
    said = replace(node, opset=node.get("opset", node.opset))
    found = _standard(g, said, _OF_ONE[node.kind], real(g, node, x, x_scale, x_zero))
    return _result(g, node, found, x, y_scale, y_zero)


@operator_of(*_names(_OF_TWO), quantized=True)
def _two(
    g: Builder, node: NodeView, a: Any, a_scale: Any, a_zero: Any, b: Any, b_scale: Any,
    b_zero: Any, y_scale: Any, y_zero: Any = None,
) -> Any:  # fmt: skip
    operands = (real(g, node, a, a_scale, a_zero), real(g, node, b, b_scale, b_zero))
    found = _standard(g, node, _OF_TWO[node.kind], *operands)
    return _result(g, node, found, a, y_scale, y_zero)


@operator_of(f"{DOMAIN}.QLinearWhere", quantized=True)
def _where(
    g: Builder, node: NodeView, condition: Any, a: Any, a_scale: Any, a_zero: Any, *rest: Any
) -> Any:
    if len(rest) != 5:
        raise Refused(f"{len(rest) + 4} inputs are too many or too few")
    b, b_scale, b_zero, y_scale, y_zero = rest
    operands = (real(g, node, a, a_scale, a_zero), real(g, node, b, b_scale, b_zero))
    found = _standard(g, node, "Where", condition, *operands)
    return _result(g, node, found, a, y_scale, y_zero)


@operator_of(f"{DOMAIN}.QLinearConcat", quantized=True)
def _concat(g: Builder, node: NodeView, y_scale: Any, y_zero: Any, *parts: Any) -> Any:
    if not parts or len(parts) % 3:
        raise Refused(f"{len(parts)} operands; expected three for every tensor")
    triples = [parts[i : i + 3] for i in range(0, len(parts), 3)]
    values = [real(g, node, *triple) for triple in triples]
    return _result(g, node, _standard(g, node, "Concat", *values), parts[0], y_scale, y_zero)


@operator_of(f"{DOMAIN}.QGemm", quantized=True)
def _gemm(
    g: Builder, node: NodeView, a: Any, a_scale: Any, a_zero: Any, b: Any, b_scale: Any,
    b_zero: Any, *result: Any,
) -> Any:  # fmt: skip
    c, y_scale, y_zero = (*result, None, None, None)[:3]
    turned, alpha = bool(node.get("transB")), node.get("alpha", 1.0)
    left = real(g, node, a, a_scale, a_zero)
    if node.get("transA"):
        left = transposed(g, left, [1, 0])
    steps = g.known(b_scale, "scale").float() * alpha
    right = real(g, along(node, 0 if turned else 1), b, Constant(steps), b_zero)
    if turned:
        right = transposed(g, right, [1, 0])
    bias: Tensor | None = None
    if c is not None:  # int32 sums
        unit = g.known(a_scale, "scale").double() * steps.double()
        c = Constant((g.known(c, "bias").double() * unit).float())
        bias = row_of(c, right.shape[1])
    found = product(g, node, left, right, bias)
    if c is not None and bias is None:
        found = g.call(torch.add, found, c)
    return found if y_scale is None else _result(g, node, found, a, y_scale, y_zero)
