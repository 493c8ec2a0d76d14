"""Multiply-accumulates of every operator that has them, from the shapes at both of its ends."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

__all__ = ["COUNTS", "Shape", "Shapes", "count_of", "inner"]

Shape = tuple[int, ...]


class Shapes(ABC):
    """Sizes of an operator's operands, by name in its schema, and of its result.

    Attributes:
        arguments: all of them by name.
        result: sizes of the result, or of the first of several.
    """

    arguments: dict[str, Any]
    result: Shape

    def __getitem__(self, name: str) -> Shape:
        return self.of(self.arguments[name])

    @abstractmethod
    def of(self, operand: Any) -> Shape:
        """Sizes of an operand."""


def count_of(name: str) -> Callable[[Shapes], int] | None:
    """How an operator (``aten.conv2d.default``) is counted; None where it multiplies nothing."""
    return COUNTS.get(name) or COUNTS.get(name.rpartition(".")[0])


def _convolution(shapes: Shapes) -> int:
    return math.prod(shapes.result) * math.prod(shapes["weight"][1:])


def _transposed(shapes: Shapes) -> int:
    # Every value of the operand meets the weights of its input channel.
    return math.prod(shapes["input"]) * math.prod(shapes["weight"][1:])


def _either(shapes: Shapes) -> int:
    return _transposed(shapes) if shapes.arguments["transposed"] else _convolution(shapes)


def inner(operand: str) -> Callable[[Shapes], int]:
    """Every value of the result is a sum over the last axis of an operand."""
    return lambda shapes: math.prod(shapes.result) * (shapes[operand][-1:] or (1,))[0]


def _summed_batch(shapes: Shapes) -> int:
    return math.prod(shapes["batch1"]) * shapes["batch2"][-1]


def _tensordot(shapes: Shapes) -> int:
    operand = shapes["self"]
    summed = math.prod(operand[axis] for axis in shapes.arguments["dims_self"])
    return math.prod(shapes.result) * summed


def _bilinear(shapes: Shapes) -> int:
    return math.prod(shapes.result) * math.prod(shapes["weight"][1:])


def _attention(shapes: Shapes) -> int:
    # Scores, then their sums of values; a mask leaves nothing out.
    *heads, rows, width = shapes["query"]
    columns = shapes["key"][-2]
    return math.prod(heads) * rows * columns * (width + shapes["value"][-1])


def _recurrent(operand: str) -> Callable[[Shapes], int]:
    """Every weight of every layer and direction once per step, those of projections, too."""

    def count(shapes: Shapes) -> int:
        weights = (shapes.of(item) for item in shapes.arguments["params"])
        steps = math.prod(shapes[operand][:-1])
        return steps * sum(math.prod(weight) for weight in weights if len(weight) == 2)

    return count


def _cell(shapes: Shapes) -> int:
    return math.prod(shapes["input"][:-1]) * (math.prod(shapes["w_ih"]) + math.prod(shapes["w_hh"]))


def _einsum(shapes: Shapes) -> int:
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
COUNTS: dict[str, Callable[[Shapes], int]] = {
    **dict.fromkeys(
        (
            "aten.conv1d",
            "aten.conv2d",
            "aten.conv3d",
            "aten.slow_conv3d",
            "aten.conv_depthwise3d",
            "aten._conv_depthwise2d",
        ),
        _convolution,
    ),
    **dict.fromkeys((f"aten.conv_transpose{n}d" for n in (1, 2, 3)), _transposed),
    **dict.fromkeys(
        ("aten.convolution", "aten._convolution", "aten.convolution_overrideable"), _either
    ),
    "aten.linear": inner("input"),
    **dict.fromkeys(
        ("aten.matmul", "aten.linalg_matmul", "aten.mm", "aten.bmm", "aten._int_mm"), inner("self")
    ),
    **dict.fromkeys(("aten.mv", "aten.dot", "aten.vdot", "aten.inner"), inner("self")),
    "aten.addmm": inner("mat1"),
    "aten.addmv": inner("mat"),
    "aten.baddbmm": inner("batch1"),
    "aten.addbmm": _summed_batch,
    "aten.tensordot": _tensordot,
    "aten.bilinear": _bilinear,
    "aten.einsum": _einsum,
    **dict.fromkeys(
        (
            "adalayer.grid_attention",
            "aten.scaled_dot_product_attention",
            "aten._scaled_dot_product_flash_attention_for_cpu",
            "aten._scaled_dot_product_flash_attention",
            "aten._scaled_dot_product_efficient_attention",
            "aten._scaled_dot_product_attention_math",
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
