"""Programs handed over to C++."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from adalayer_native import _C
from adalayer_native.engine.program import Program

__all__ = ["constant_adders", "emit"]


def constant_adders(out: _C.Program) -> dict[str, tuple[Callable[[int, int], int], int]]:
    """How to add a constant of each kind to a program, and the bytes of its elements."""
    return {
        "weights": (out.add_constant_weights, 1),
        "u8": (out.add_constant_u8, 1),
        "f32": (out.add_constant_f32, 4),
        "i32": (out.add_constant_i32, 4),
    }


def emit(program: Program) -> _C.Program:
    """The program as the engine reads it, validated.

    Raises:
        ValueError: naming the node that breaks a rule of ``csrc/engine/program.hpp``.
    """
    out = _C.Program()
    adders = constant_adders(out)
    for constant in program.constants:
        add, width = adders[constant.kind]
        data = np.frombuffer(constant.data, dtype=np.uint8)  # alive until it is copied
        add(data.ctypes.data, data.size // width)
    for value in program.values:
        if value.grid is None:
            out.add_value(value.name, "i32" if value.ids else "f32", *value.size)
        else:
            grid = value.grid
            out.add_value(value.name, "u8", *value.size, grid.scale, grid.zero_point, grid.qmax)
    for node in program.nodes:
        out.add_node(
            node.op,
            node.name,
            node.inputs,
            node.output,
            node.ints,
            node.floats,
            node.constants,
        )
    out.set_inputs(program.inputs)
    out.set_outputs(program.outputs)
    for key, text in program.metadata.items():
        out.set_metadata(key, text)
    out.validate()
    return out
