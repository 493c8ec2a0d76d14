"""The engine's program as Python data, and the passes that shorten it.

Operations and their parameters are those of ``csrc/engine/operations.hpp``; ``emit.py``
hands a program over to C++.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from adalayer_native.engine.grids import Grid, Table
from adalayer_native.engine.views import Size
from adalayer_native.operations import operation, parameters

__all__ = ["Constant", "Node", "Program", "Value", "shorten"]


@dataclass
class Value:
    """A tensor between nodes. ``grid`` is None for float32, and for token ids."""

    name: str
    size: Size
    grid: Grid | None
    ids: bool = False


@dataclass
class Node:
    """One operation; parameters in the order of ``csrc/engine/operations.hpp``."""

    op: str
    name: str
    inputs: list[int]
    output: int
    ints: list[int]
    floats: list[float]
    constants: list[int]


@dataclass(frozen=True)
class Constant:
    """Bytes by kind: "weights" (canonical), "f32", "i32" or "u8"."""

    kind: str
    data: bytes


@dataclass
class Program:
    """Values, nodes in an order that runs, constants, and the values at the boundary."""

    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    _known: dict[Constant, int] = field(default_factory=dict, repr=False)

    def value(self, name: str, size: Size, grid: Grid | None, ids: bool = False) -> int:
        """A new value's number."""
        self.values.append(Value(name, size, grid, ids))
        return len(self.values) - 1

    def node(
        self,
        op: str,
        name: str,
        inputs: Sequence[int],
        size: Size,
        grid: Grid | None,
        **given: Any,
    ) -> int:
        """Append a node; returns the number of the value that it writes.

        Args:
            given: parameters by name, as :func:`adalayer_native.operations.parameters` takes them.
        """
        lists = parameters(op, len(inputs), **given)
        output = self.value(name, size, grid)
        self.nodes.append(Node(op, name, list(inputs), output, *lists))
        return output

    def constant(self, kind: str, data: bytes) -> int:
        """The number of a constant; equal ones share it."""
        key = Constant(kind, data)
        if key not in self._known:
            self._known[key] = len(self.constants)
            self.constants.append(key)
        return self._known[key]

    def f32(self, values: npt.ArrayLike) -> int:
        """A float32 constant."""
        return self.constant("f32", np.ascontiguousarray(values, dtype=np.float32).tobytes())

    def i32(self, values: npt.ArrayLike) -> int:
        """An int32 constant."""
        return self.constant("i32", np.ascontiguousarray(values, dtype=np.int32).tobytes())

    def u8(self, levels: npt.ArrayLike) -> int:
        """A constant of levels."""
        return self.constant("u8", np.ascontiguousarray(levels, dtype=np.uint8).tobytes())

    def table(self, table: Table) -> int:
        """A table of levels: 256, or those of an embedding."""
        return self.u8(table)

    def levels(self, number: int) -> Table:
        """The table with a number; -1 is the identity."""
        if number < 0:
            return np.arange(256, dtype=np.uint8)
        return np.frombuffer(self.constants[number].data, dtype=np.uint8)


def shorten(program: Program) -> None:
    """Drop what no output needs, and move tables into the nodes before or after them."""
    _drop_unused(program)
    _fuse_tables(program)
    _drop_unused(program)
    _renumber(program)


def _readers(program: Program) -> Counter[int]:
    count = Counter(item for node in program.nodes for item in node.inputs)
    count.update(program.outputs)
    return count


def _drop_unused(program: Program) -> None:
    needed = set(program.outputs)
    kept = []
    for node in reversed(program.nodes):
        if node.output in needed:
            needed.update(node.inputs)
            kept.append(node)
    program.nodes = kept[::-1]


def _fuse_tables(program: Program) -> None:
    """A table whose operand nobody else reads joins the node before it, else a concatenation.

    The node then writes the value that the lookup wrote; its own clamp stays on the grid from
    before the table.
    """
    readers = _readers(program)
    producers = {node.output: node for node in program.nodes}
    gone: set[int] = set()
    for node in program.nodes:
        if node.op == "lookup":
            before = producers.get(node.inputs[0])
            if before is None or readers[before.output] != 1:
                continue
            slot = operation(before.op).table
            if slot is None:
                continue
            table = program.levels(node.constants[0])[program.levels(before.constants[slot])]
            before.constants[slot] = program.table(table)
            before.output = node.output
            producers[node.output] = before
            gone.add(id(node))
        elif operation(node.op).table_per_input:
            for position, item in enumerate(node.inputs):
                before = producers.get(item)
                if before is not None and before.op == "lookup" and readers[item] == 1:
                    node.inputs[position] = before.inputs[0]
                    node.constants[position] = before.constants[0]
                    gone.add(id(before))
    program.nodes = [node for node in program.nodes if id(node) not in gone]


def _renumber(program: Program) -> None:
    """Leave out values and constants that nothing refers to."""
    used = {item for node in program.nodes for item in (*node.inputs, node.output)}
    used.update(program.inputs, program.outputs)
    values = {old: new for new, old in enumerate(sorted(used))}
    numbers = {item for node in program.nodes for item in node.constants if item >= 0}
    constants = {old: new for new, old in enumerate(sorted(numbers))} | {-1: -1}
    program.values = [program.values[old] for old in sorted(used)]
    program.constants = [program.constants[old] for old in sorted(numbers)]
    program._known = {item: i for i, item in enumerate(program.constants)}
    program.inputs = [values[item] for item in program.inputs]
    program.outputs = [values[item] for item in program.outputs]
    for node in program.nodes:
        node.inputs = [values[item] for item in node.inputs]
        node.output = values[node.output]
        node.constants = [constants[item] for item in node.constants]
