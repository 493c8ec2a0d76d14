"""Comparisons, choices, orders and sums along axes as ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from adalayer_native.engine.export import op_name
from adalayer_native.onnx.emitting import Emitter, Unwritable, rule
from adalayer_native.onnx.package import onnx_package

__all__: list[str] = []

_COMPARISONS = {
    "eq": "Equal", "ne": "Equal", "gt": "Greater", "lt": "Less", "ge": "GreaterOrEqual",
    "le": "LessOrEqual",
}  # fmt: skip
_LOGIC = {
    name: kind
    for stem, kind in (("and", "And"), ("or", "Or"), ("xor", "Xor"))
    for name in (f"logical_{stem}.default", f"bitwise_{stem}.Tensor", f"__{stem}__.Tensor")
}
_FIRST, _LAST = -(1 << 63), (1 << 63) - 1


def _ints(e: Emitter, *values: int) -> str:
    return e.constant(np.array(values, dtype=np.int64))


def _size(e: Emitter, node: Any, axis: int, what: str) -> int:
    size = e.sizes(node)[axis]
    if size is None:
        raise Unwritable(f"{what} along the batch")
    return size


def _common(e: Emitter, *operands: Any) -> torch.dtype:
    """The type in which torch computes with tensors and numbers together."""
    values = [e.value(item) if isinstance(item, fx.Node) else item for item in operands]
    found = values[0]
    for other in values[1:]:
        found = torch.empty((), dtype=torch.result_type(found, other))
    return found.dtype if isinstance(found, Tensor) else torch.result_type(found, found)


def _as(e: Emitter, item: Any, dtype: torch.dtype, name: str) -> str:
    """An operand in a type; ONNX's operators want one type of all."""
    operand = e.of(item, dtype)
    if not isinstance(item, fx.Node) or e.value(item).dtype == dtype:
        return operand
    like = torch.zeros((), dtype=dtype).numpy().dtype
    kind = onnx_package("helper").np_dtype_to_tensor_dtype(like)
    return str(e.op("Cast", [operand], name, to=kind))


def _together(e: Emitter, node: fx.Node, *operands: Any) -> list[str]:
    dtype = _common(e, *operands)
    return [_as(e, item, dtype, f"{node.name}.operand") for item in operands]


@rule(*(f"aten.{name}.{kind}" for name in _COMPARISONS for kind in ("Tensor", "Scalar")))
def _compare(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    kind = op_name(node).split(".")[1]
    operands = _together(e, node, a["self"], a["other"])
    if kind != "ne":
        return e.op(_COMPARISONS[kind], operands, node.name)
    return e.op("Not", [e.op("Equal", operands, f"{node.name}.equal")], node.name)


@rule(*(f"aten.{name}" for name in (*_LOGIC, "logical_not.default", "bitwise_not.default")))
def _logic(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    operands = [item for key, item in a.items() if key in ("self", "other")]
    if any(e.value(item).dtype != torch.bool for item in operands):
        raise Unwritable("logic of values that are not bool")
    kind = _LOGIC.get(op_name(node).removeprefix("aten."), "Not")
    return e.op(kind, [e.of(item) for item in operands], node.name)


@rule("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def _where(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    return e.op(
        "Where", [e.of(a["condition"]), *_together(e, node, a["self"], a["other"])], node.name
    )


@rule("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def _masked_fill(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    dtype = e.value(node).dtype
    fill = _as(e, a["value"], dtype, f"{node.name}.value")
    return e.op("Where", [e.of(a["mask"]), fill, e.of(a["self"])], node.name)


@rule("aten.maximum.default", "aten.minimum.default", "aten.max.other", "aten.min.other")
def _extreme(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    kind = "Max" if op_name(node).split(".")[1].startswith("max") else "Min"
    return e.op(kind, _together(e, node, a["self"], a["other"]), node.name)


@rule("aten.argmax.default", "aten.argmin.default")
def _arg_extreme(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    kind = "ArgMax" if "argmax" in op_name(node) else "ArgMin"
    operand, axis, keep = e.of(a["self"]), a["dim"], int(a["keepdim"])
    if axis is None:
        if keep:
            raise Unwritable("the place of an extreme over all axes, which are kept")
        operand, axis = e.op("Reshape", [operand, _ints(e, -1)], f"{node.name}.flat"), 0
    return e.op(kind, [operand], node.name, axis=int(axis), keepdims=keep)


@rule("aten.topk.default", "aten.sort.default", "aten.sort.stable", "aten.max.dim", "aten.min.dim")
def _ordered(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    kind = op_name(node).split(".")[1]
    axis = int(a.get("dim", -1))
    if kind in ("max", "min"):
        names = e.op("TopK", [e.of(a["self"]), _ints(e, 1)], node.name, 2, axis=axis,
                     largest=int(kind == "max"))  # fmt: skip
        if a["keepdim"]:
            return names
        return tuple(e.op("Squeeze", [n, _ints(e, axis)], f"{node.name}.one") for n in names)
    if kind == "sort":
        count, largest = _size(e, a["self"], axis, "an order"), int(a["descending"])
    else:
        count, largest = a["k"], int(a["largest"])
    if not isinstance(count, int):
        raise Unwritable("a number of largest values that follows from the batch")
    return e.op("TopK", [e.of(a["self"]), _ints(e, count)], node.name, 2, axis=axis,
                largest=largest)  # fmt: skip


@rule("aten.cumsum.default")
def _cumsum(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    operand = _as(e, a["self"], e.value(node).dtype, f"{node.name}.operand")
    return e.op("CumSum", [operand, e.constant(np.int64(a["dim"]))], node.name)


@rule("aten.einsum.default")
def _einsum(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    operands = [e.of(item) for item in a["tensors"]]
    return e.op("Einsum", operands, node.name, equation=a["equation"].replace(" ", ""))


@rule("aten.roll.default")
def _roll(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    result = operand = e.of(a["self"])
    if len(a["dims"]) != len(a["shifts"]):
        raise Unwritable("a roll over all axes together")
    for axis, shift in zip(a["dims"], a["shifts"], strict=True):
        cut = -int(shift) % max(1, _size(e, a["self"], int(axis), "a roll"))
        if cut == 0:
            continue
        pieces = [
            e.op(
                "Slice", [result, *(_ints(e, n) for n in (*ends, int(axis)))], f"{node.name}.piece"
            )
            for ends in ((cut, _LAST), (0, cut))
        ]
        result = e.op("Concat", pieces, node.name, axis=int(axis))
    return e.moved(result, operand)


@rule("aten.flip.default")
def _flip(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    operand, axes = e.of(a["self"]), [int(axis) for axis in a["dims"]]
    count = len(axes)
    rest = [[-1] * count, [_FIRST] * count, axes, [-1] * count]
    result = e.op("Slice", [operand, *(_ints(e, *values) for values in rest)], node.name)
    return e.moved(result, operand)


@rule("aten.stack.default")
def _stack(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    axis = _ints(e, int(a["dim"]))
    operands = [e.op("Unsqueeze", [e.of(x), axis], f"{node.name}.item") for x in a["tensors"]]
    return e.op("Concat", operands, node.name, axis=int(a["dim"]))


@rule("aten.unbind.int")
def _unbind(e: Emitter, node: fx.Node, a: dict[str, Any]) -> Any:
    operand, axis = e.of(a["self"]), int(a["dim"])
    count = _size(e, a["self"], axis, "taking apart")
    found = tuple(
        e.op("Gather", [operand, e.constant(np.int64(i))], f"{node.name}.{i}", axis=axis)
        for i in range(count)
    )
    return e.moved(found, operand)
