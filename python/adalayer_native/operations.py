"""The engine's table of operations (``csrc/engine/operations.hpp``), by name.

A node of a program holds lists of whole numbers, floats and numbers of constants. Their order is
C++'s; here they have names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from adalayer_native import _C

__all__ = ["Operation", "Parameters", "geometry", "operation", "parameters"]


class Parameters(NamedTuple):
    """The lists of one node; ``constants`` holds -1 where an optional one is absent."""

    ints: list[int]
    floats: list[float]
    constants: list[int]


@dataclass(frozen=True)
class Operation:
    """Names of parameters in their order, with the value of those that need not be given, and the
    place of the optional table that an operation applies to its levels."""

    name: str
    ints: Mapping[str, int | None]
    floats: Mapping[str, float | None]
    constants: Mapping[str, int | None]
    table_per_input: bool

    @property
    def table(self) -> int | None:
        """The place among the constants; None where the operation has none."""
        return list(self.constants).index("table") if "table" in self.constants else None


@cache
def _operations() -> dict[str, Operation]:
    found = {}
    for name, entry in _C.operations().items():
        found[name] = Operation(
            name,
            {parameter: usual for parameter, _, _, usual in entry["ints"]},
            dict(entry["floats"]),
            {
                parameter: -1 if optional else None
                for parameter, _, _, optional in entry["constants"]
            },
            entry["table_per_input"],
        )
    return found


def operation(name: str) -> Operation:
    """An entry of the table.

    Raises:
        KeyError: no operation has that name.
    """
    return _operations()[name]


def geometry(
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> dict[str, int]:
    """The geometry of a convolution of any kind, by name.

    Args:
        padding: top, left, bottom, right.
    """
    sizes = [*kernel, *stride, *padding, *dilation, groups]
    return dict(zip(operation("float_conv").ints, map(int, sizes), strict=True))


def _in_order(name: str, known: Mapping[str, Any], given: dict[str, Any]) -> list[Any]:
    found = []
    for parameter, usual in known.items():
        value = given.pop(parameter, usual)
        if value is None:
            raise TypeError(f"{name}: {parameter} is missing")
        found.append(value)
    return found


def parameters(name: str, inputs: int = 1, **given: Any) -> Parameters:
    """The lists of a node.

    Args:
        name: the operation.
        inputs: how many it reads.
        given: its parameters by name; constants by their numbers in the program.

    Raises:
        TypeError: one is missing, or not one of the operation's.
    """
    known = operation(name)
    ints = [int(value) for value in _in_order(name, known.ints, given)]
    floats = [float(value) for value in _in_order(name, known.floats, given)]
    constants: Sequence[int] = (
        [-1] * inputs if known.table_per_input else _in_order(name, known.constants, given)
    )
    if given:
        raise TypeError(f"{name} has no parameter {', '.join(sorted(given))}")
    return Parameters(ints, floats, list(constants))
