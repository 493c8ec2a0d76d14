"""An ONNX graph under construction: nodes, constants, and which values lie on which grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from adalayer_native.capture.vocabulary import arguments
from adalayer_native.engine.export import Exported, op_name
from adalayer_native.onnx.package import onnx_package

__all__ = ["RULES", "Emitter", "Grid", "Unwritable", "rule"]

Grid = tuple[float, int, int]
"""Scale, zero point and bits of a u8 grid."""

RULES: dict[str, Callable[..., Any]] = {}
"""By torch operator (``"aten.relu.default"``): what writes it, ``(emitter, node, arguments)``."""


class Unwritable(Exception):
    """An operation has no form in ONNX's standard operators; the text says why."""


def rule(*names: str) -> Callable[[Any], Any]:
    """Decorates what writes torch operators; it returns the name of the result, or several."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass
class Emitter:
    """The graph, and what is known of its values.

    Attributes:
        exported: the network.
        opset: version of the operators that are written.
        nodes, constants: of the ONNX graph.
        names: ONNX value by node of torch's graph, several where it gives several.
        grids: of values whose elements all lie on one.
        layers: what a reader is told of every layer: bits, sparsity, bits of the input.
    """

    exported: Exported
    opset: int
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    names: dict[fx.Node, Any] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    _known: dict[Any, str] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set)

    # -- making ------------------------------------------------------------------------------

    def unused(self, name: str) -> str:
        """A name that no value has yet."""
        found, count = name, 1
        while found in self._used:
            count += 1
            found = f"{name}_{count}"
        self._used.add(found)
        return found

    def op(
        self, kind: str, operands: Sequence[str], name: str, outputs: int = 1, **attributes: Any
    ) -> Any:
        """A node; gives the name of its result, or a tuple of several."""
        results = [self.unused(name) for _ in range(outputs)]
        attributes = {key: value for key, value in attributes.items() if value is not None}
        node = onnx_package("helper").make_node(
            kind, list(operands), results, name=f"{results[0]}/{kind}", **attributes
        )
        self.nodes.append(node)
        return results[0] if outputs == 1 else tuple(results)

    def constant(self, value: Any, name: str = "", dtype: Any = None) -> str:
        """A constant; equal small ones are one."""
        array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else None
        array = np.asarray(value, dtype=dtype) if array is None else array
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size <= 16 else None
        if key is not None and key in self._known:
            return self._known[key]
        found = self.unused(name or "constant")
        self.constants.append(onnx_package("numpy_helper").from_array(np.array(array), found))
        if key is not None:
            self._known[key] = found
        return found

    def integers(self, levels: Tensor, bits: int, name: str) -> tuple[str, str]:
        """Integer weights in the narrowest type that this opset has; its name comes with them."""
        onnx = onnx_package()
        kind = "INT8"
        if bits <= 2 and self.opset >= 25:
            kind = "INT2"
        elif bits <= 4 and self.opset >= 21:
            kind = "INT4"
        array = levels.contiguous().numpy()
        if kind != "INT8":
            number = getattr(onnx.TensorProto, kind)
            array = array.astype(onnx.helper.tensor_dtype_to_np_dtype(number))
        found = self.unused(name)
        self.constants.append(onnx.numpy_helper.from_array(array, found))
        return found, kind

    # -- values ------------------------------------------------------------------------------

    def of(self, node: Any, dtype: torch.dtype = torch.float32) -> str:
        """The name of an operand: a value, a parameter, or a number."""
        if not isinstance(node, fx.Node):
            return self.constant(torch.tensor(node, dtype=dtype))
        if node.op == "get_attr" and node not in self.names:
            self.names[node] = self.constant(self.exported.tensor(node), str(node.target))
        if node not in self.names:
            raise Unwritable(f"{node} is a number that follows from the batch")
        return str(self.names[node])

    def value(self, node: fx.Node) -> Any:
        """The (fake) tensor of a node."""
        return node.meta["val"]

    def rank(self, node: fx.Node) -> int:
        """Axes of a value."""
        return int(node.meta["val"].dim())

    def sizes(self, node: fx.Node) -> list[int | None]:
        """Sizes of a value; None for one that follows from the batch."""
        return [size if isinstance(size, int) else None for size in node.meta["val"].shape]

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """Arguments of a torch operator by name, defaults included."""
        return arguments(node)

    def moved(self, result: Any, operand: str) -> Any:
        """A result that holds elements of the operand alone: it lies on the same grid."""
        grid = self.grids.get(operand)
        if grid is not None:
            for name in result if isinstance(result, tuple) else (result,):
                self.grids[name] = grid
        return result

    def quantized(self, operand: str, grid: Grid, name: str) -> str:
        """A value on a grid: ``QuantizeLinear`` and ``DequantizeLinear``, unless it lies on it."""
        if self.grids.get(operand) == grid:
            return operand
        key = ("quantized", operand, grid)
        if key in self._known:
            return self._known[key]
        scale, zero_point, bits = grid
        source = operand
        if bits < 8:  # QuantizeLinear knows the ends of uint8 only
            ends = [-zero_point * scale, ((1 << bits) - 1 - zero_point) * scale]
            low, high = (self.constant(end, dtype=np.float32) for end in ends)
            source = self.op("Clip", [source, low, high], f"{name}.range")
        step = self.constant(scale, dtype=np.float32)
        zero = self.constant(zero_point, dtype=np.uint8)
        levels = self.op("QuantizeLinear", [source, step, zero], f"{name}.levels")
        found = str(self.op("DequantizeLinear", [levels, step, zero], f"{name}.quantized"))
        self.grids[found] = grid
        self._known[key] = found
        return found


def described(node: fx.Node) -> str:
    """A node of torch's graph as messages call it."""
    return f"{op_name(node)} ({node.name})"
