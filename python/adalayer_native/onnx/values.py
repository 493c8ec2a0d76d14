"""What a network's values are while its graph is built.

Three kinds, as operators of ONNX take all three in one place: a :class:`Value` is known when the
network runs, a :class:`Constant` now, and sizes are whole numbers, or :class:`Size` where an
input decides them, in lists (``Shape`` gives one, ``Reshape`` takes one). A list of sizes is an
object array of numpy, so that the arithmetic of exporters (``Gather``, ``Concat``, ``Mul``) is
numpy's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, fx

__all__ = ["Constant", "Grid", "Integers", "Size", "Value", "larger", "quotient", "smaller"]


@dataclass(frozen=True)
class Grid:
    """A u8 grid on which all elements of a value lie, as ``nn.FakeQuantize`` has it.

    Attributes:
        scale: of one step, a float32 value.
        zero_point: level of 0.0, from 0 on.
        bits: 2 to 8.
        lowest: what the file's integers have for level 0: 0 for uint8, -128 for int8.
        kind: ONNX type of those integers.
    """

    scale: float
    zero_point: int
    bits: int
    lowest: int
    kind: str


@dataclass(frozen=True)
class Integers:
    """The integers that a constant was dequantized from.

    Attributes:
        levels: ``q - zero_point``, int16, shaped as the constant.
        scale: float32, one or one per slice of ``axis``; None in ``axis`` for one.
        kind: ONNX type of the integers (``"INT4"``).
        why_not: where scales lie otherwise, say per block: why no layer of ours can have them.
    """

    levels: Tensor
    scale: Tensor
    axis: int | None
    kind: str
    why_not: str = ""


@dataclass(eq=False)
class Value:
    """A tensor that the network computes.

    Attributes:
        node: of the graph.
        fake: a tensor without memory of its sizes in the example.
        grid: where all of its elements lie on one.
        quantized: the file has it as integers here, of that grid; the node gives real numbers.
        kind: ONNX type where torch has none of it: integers of 2 and 4 bits as int8 or uint8.
        flat_of: the value whose elements these are, in one axis.
    """

    node: fx.Node
    fake: Any
    grid: Grid | None = None
    quantized: bool = False
    kind: str = ""
    flat_of: Value | None = None

    @property
    def rank(self) -> int:
        """Number of axes."""
        return int(self.fake.dim())

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in the example."""
        return tuple(self.fake.shape)

    def on(self, grid: Grid | None, quantized: bool = False) -> Value:
        """The same, whose elements lie on a grid."""
        return replace(self, grid=grid, quantized=quantized)


@dataclass(eq=False)
class Constant:
    """A tensor that the file holds, or that follows from what it holds.

    Attributes:
        tensor: its elements; integers of 2 and 4 bits as int8 or uint8.
        name: in the file, if it is there as such.
        kind: ONNX type where torch has none of it.
        integers: what it was dequantized from.
    """

    tensor: Tensor
    name: str = ""
    kind: str = ""
    integers: Integers | None = None

    @property
    def rank(self) -> int:
        """Number of axes."""
        return self.tensor.dim()

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        return tuple(self.tensor.shape)


def quotient(a: Any, b: Any) -> Any:
    """Of whole numbers, towards zero, as ONNX divides them."""
    if isinstance(a, Size) or isinstance(b, Size):
        return a // b
    return -(-a // b) if (a < 0) != (b < 0) else a // b


def smaller(a: Any, b: Any) -> Any:
    """Of whole numbers, sizes among them."""
    return _either(a, b, min)


def larger(a: Any, b: Any) -> Any:
    """Of whole numbers, sizes among them."""
    return _either(a, b, max)


def _either(a: Any, b: Any, function: Callable[..., Any]) -> Any:
    if isinstance(a, Size):
        return a._with(b, function)
    return b._with(a, function, True) if isinstance(b, Size) else function(a, b)


class Size:
    """A whole number that an input decides, with its value in the example."""

    def __init__(self, node: fx.Node, example: int) -> None:
        self.node, self.example = node, example

    def _with(self, other: Any, function: Callable[..., Any], turned: bool = False) -> Any:
        if not isinstance(other, (Size, int, np.integer)):
            return NotImplemented
        sides = (self, other if isinstance(other, Size) else int(other))
        left, right = sides[::-1] if turned else sides
        graph = self.node.graph
        nodes = tuple(s.node if isinstance(s, Size) else s for s in (left, right))
        values = (s.example if isinstance(s, Size) else s for s in (left, right))
        return Size(graph.call_function(function, nodes), function(*values))

    def __add__(self, other: Any) -> Any:
        return self if other == 0 else self._with(other, operator.add)

    def __radd__(self, other: Any) -> Any:
        return self if other == 0 else self._with(other, operator.add, True)

    def __sub__(self, other: Any) -> Any:
        return self if other == 0 else self._with(other, operator.sub)

    def __rsub__(self, other: Any) -> Any:
        return self._with(other, operator.sub, True)

    def __mul__(self, other: Any) -> Any:
        return self if other == 1 else self._with(other, operator.mul)

    def __rmul__(self, other: Any) -> Any:
        return self if other == 1 else self._with(other, operator.mul, True)

    def __floordiv__(self, other: Any) -> Any:
        return self if other == 1 else self._with(other, quotient)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._with(other, quotient, True)

    def __mod__(self, other: Any) -> Any:
        return self._with(other, operator.mod)

    def __neg__(self) -> Any:
        return self._with(-1, operator.mul)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Size({self.node}, {self.example})"
