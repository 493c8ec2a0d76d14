"""Multiply-accumulates of every operator that has them, from the shapes of the exported graph.

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
from adalayer_native.capture.vocabulary import arguments, op_name
from adalayer_native.engine.export import Exported

__all__ = ["multiply_accumulates"]

Shape = tuple[int, ...]


class _Shapes:
    """Sizes of a node's operands, by name in the operator's schema, and of its result."""

    def __init__(self, exported: Exported, node: fx.Node) -> None:
        self.exported = exported
        self.arguments = arguments(node)
        value = node.meta.get("val")
        self.result = self._shape(value[0] if isinstance(value, (list, tuple)) else value)

    def __getitem__(self, name: str) -> Shape:
        return self.of(self.arguments[name])

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
    count = _COUNTS.get(name) or _COUNTS.get(name.rpartition(".")[0])
    return 0 if count is None else count(_Shapes(exported, node))


def _positions(shape: Shape, weight: Shape) -> int:
    """Sizes of an image's positions; the weights say how many axes these are."""
    return math.prod(shape[len(shape) - (len(weight) - 2) :])


def _convolution(shapes: _Shapes) -> int:
    return math.prod(shapes.result) * math.prod(shapes["weight"][1:])


def _transposed(shapes: _Shapes) -> int:
    # Every value of the operand meets the weights of its input channel.
    return math.prod(shapes["input"]) * math.prod(shapes["weight"][1:])


def _either(shapes: _Shapes) -> int:
    return _transposed(shapes) if shapes.arguments["transposed"] else _convolution(shapes)


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


def _inner(operand: str) -> Callable[[_Shapes], int]:
    """Every value of the result is a sum over the last axis of an operand."""
    return lambda shapes: math.prod(shapes.result) * (shapes[operand][-1:] or (1,))[0]


def _summed_batch(shapes: _Shapes) -> int:
    return math.prod(shapes["batch1"]) * shapes["batch2"][-1]


def _tensordot(shapes: _Shapes) -> int:
    operand = shapes["self"]
    summed = math.prod(operand[axis] for axis in shapes.arguments["dims_self"])
    return math.prod(shapes.result) * summed


def _bilinear(shapes: _Shapes) -> int:
    return math.prod(shapes.result) * math.prod(shapes["weight"][1:])


def _attention(shapes: _Shapes) -> int:
    # Scores, then their sums of values; a mask leaves nothing out.
    *heads, rows, width = shapes["query"]
    columns = shapes["key"][-2]
    return math.prod(heads) * rows * columns * (width + shapes["value"][-1])


def _recurrent(operand: str) -> Callable[[_Shapes], int]:
    """Every weight of every layer and direction once per step, those of projections, too."""

    def count(shapes: _Shapes) -> int:
        weights = (shapes.of(item) for item in shapes.arguments["params"])
        steps = math.prod(shapes[operand][:-1])
        return steps * sum(math.prod(weight) for weight in weights if len(weight) == 2)

    return count


def _cell(shapes: _Shapes) -> int:
    return math.prod(shapes["input"][:-1]) * (math.prod(shapes["w_ih"]) + math.prod(shapes["w_hh"]))


def _einsum(shapes: _Shapes) -> int:
    """Products of the pairs that torch contracts: along a path if there is one, else from the left.

    An axis that only one of a pair has, and that nobody reads later, is added up before.
    """
    operands = [shapes.of(item) for item in shapes.arguments["tensors"]]
    terms, arrow, result = shapes.arguments["equation"].replace(" ", "").partition("->")
    sizes: dict[Any, int] = {}
    found: list[set[Any]] = []
    for term, shape in zip(terms.split(","), operands, strict=True):
        labels = _labels(term, len(shape))
        found.append(set(labels))
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    if arrow:
        wanted = {label for label in sizes if type(label) is int or label in result}
    else:  # axes that occur once
        letters = terms.replace(".", "")
        wanted = {label for label in sizes if type(label) is int or letters.count(label) == 1}
    if arrow and "..." not in result:
        wanted = {label for label in wanted if type(label) is str}
    path = list(shapes.arguments.get("path") or ())
    total = 0
    while len(found) > 1:
        i, j = sorted((path.pop(0), path.pop(0))) if path else (0, 1)
        right, left = found.pop(j), found.pop(i)
        later = wanted.union(*found)
        total += math.prod(sizes[label] for label in (left & right) | ((left | right) & later))
        found.insert(len(found) if shapes.arguments.get("path") else 0, (left | right) & later)
    return total


def _labels(term: str, rank: int) -> list[Any]:
    """An operand's axes: letters, and numbers from the right for those of an ellipsis."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *range(hidden, 0, -1), *after]


_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_COUNTS: dict[str, Callable[[_Shapes], int]] = {
    "adalayer.conv2d": _native_convolution,
    "adalayer.conv_transpose2d": _native_transposed,
    "adalayer.linear": _inner("x"),
    **dict.fromkeys(("aten.conv1d", "aten.conv2d", "aten.conv3d"), _convolution),
    **dict.fromkeys((f"aten.conv_transpose{n}d" for n in (1, 2, 3)), _transposed),
    **dict.fromkeys(("aten.convolution", "aten._convolution"), _either),
    "aten.linear": _inner("input"),
    **dict.fromkeys(("aten.matmul", "aten.linalg_matmul", "aten.mm", "aten.bmm"), _inner("self")),
    **dict.fromkeys(("aten.mv", "aten.dot", "aten.vdot", "aten.inner"), _inner("self")),
    "aten.addmm": _inner("mat1"),
    "aten.addmv": _inner("mat"),
    "aten.baddbmm": _inner("batch1"),
    "aten.addbmm": _summed_batch,
    "aten.tensordot": _tensordot,
    "aten.bilinear": _bilinear,
    "aten.einsum": _einsum,
    **dict.fromkeys(
        (
            "aten.scaled_dot_product_attention",
            "aten._scaled_dot_product_flash_attention_for_cpu",
            "aten._scaled_dot_product_flash_attention",
            "aten._scaled_dot_product_efficient_attention",
        ),
        _attention,
    ),
    **{
        f"aten.{kind}.{operand}": _recurrent(operand)
        for kind in _RECURRENT
        for operand in ("input", "data")
    },
    **{f"aten.{kind}_cell": _cell for kind in _RECURRENT},
}
