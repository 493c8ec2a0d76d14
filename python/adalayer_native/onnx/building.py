"""A graph of torch's operators, built one ONNX node at a time."""

from __future__ import annotations

import builtins
import keyword
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from adalayer_native.onnx import functions
from adalayer_native.onnx.values import Constant, Size, Value

__all__ = ["OPERATORS", "Builder", "NodeView", "Refused", "operator_of"]

# Modules behind this name hold what no layer does.
CONSTANTS = "constants"
# Elements of a constant that follows from others.
MOST_COMPUTED = 1 << 28

# What the code of a graph means by these names is no argument, and what a module has no layer.
_TAKEN = {"self", "torch", "math", "operator", "device", "inf", "nan", "NoneType"}
_TAKEN |= {"adalayer_native", "fx_pytree", "pytree"}
_MODULE = nn.Module()

OPERATORS: dict[str, tuple[Callable[..., Any], bool]] = {}
"""By ONNX name: what follows it, and whether it takes quantized values as they are."""


class Refused(Exception):
    """An operator cannot be followed; the text says why, whoever catches it says where."""


def operator_of(*names: str, quantized: bool = False) -> Callable[[Any], Any]:
    """Decorates what follows ONNX operators: ``(builder, node, *operands) -> results``.

    Operands are :class:`Value`, :class:`Constant`, an object array of sizes, or None where one
    is left out. Without ``quantized`` values come as integers where the file has them so.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS.update(dict.fromkeys(names, (function, quantized)))
        return function

    return register


@dataclass(frozen=True)
class NodeView:
    """What an operator is told of its node.

    Attributes:
        kind: name of the operator.
        name: of the node.
        opset: version of the standard operators in the file.
        attributes: by name, as Python values and tensors.
        outputs: how many results the node has, and which are left out ("").
    """

    kind: str
    name: str
    opset: int
    attributes: dict[str, Any]
    outputs: list[str]

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.attributes.get(name, default)


@dataclass
class Builder:
    """The graph under construction.

    Attributes:
        graph: of torch's operators.
        root: holds layers and constants.
        mode: in which example tensors without memory are computed.
        batch: of the example, and what the file has in its place where the file fixes it.
        integers: whether layers with integer weights become native.
        kept: by layer, what became of its integers: bits, or why they are not kept.
        held: constants that are buffers, and where.
        names: of modules and buffers.
        shared: layers by what makes two calls the same layer.
        ranged: axes of inputs whose sizes are free, and their ranges.
    """

    mode: FakeTensorMode
    batch: tuple[int, int | None]
    integers: bool
    graph: fx.Graph = field(default_factory=fx.Graph)
    root: nn.Module = field(default_factory=nn.Module)
    kept: dict[str, int | str] = field(default_factory=dict)
    held: dict[Constant, str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    shared: dict[Any, str] = field(default_factory=dict)
    ranged: Mapping[tuple[str, int], Any] = field(default_factory=dict)
    inputs: list[tuple[str, Value]] = field(default_factory=list)

    # -- values -----------------------------------------------------------------------------

    def input(self, name: str, fake: Tensor) -> Value:
        """An argument of the network; its sizes but the batch are those of the example."""
        taken = {node.target for node in self.graph.nodes}
        base = identifier = _identifier(name)
        while identifier in taken:
            identifier = f"{base}_{len(taken) + 1}"
        found = Value(self.graph.placeholder(identifier), self._faked(fake))
        self.inputs.append((name, found))
        return found

    def check_inputs(self) -> None:
        """Have the network check the sizes of its arguments, behind the last of them."""
        for name, value in self.inputs:
            if value.rank:
                sizes: list[Any] = [None, *value.shape[1:]]
                for axis in range(1, value.rank):
                    size = self.ranged.get((name, axis))
                    if size is not None:
                        sizes[axis] = (size.first, size.last, size.multiple_of)
                checked = self.call(functions.sized, value, name, sizes)
                value.node = checked.node

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of one of torch's functions, or ours, now if all operands are known."""
        parts = _flat((args, kwargs))
        if not any(isinstance(part, (Value, Size)) for part in parts):
            self._check_size(function, args, kwargs)
            with torch.no_grad():
                return _constants(function(*_mapped(args, _plain), **_mapped(kwargs, _plain)))
        node = self.graph.call_function(
            function, _mapped(args, self._noded), _mapped(kwargs, self._noded)
        )
        with self.mode, torch.no_grad():
            fake = function(*_mapped(args, self._example), **_mapped(kwargs, self._example))
        return self._values(node, fake)

    def _check_size(self, function: Any, args: Any, kwargs: Any) -> None:
        """Raise where a constant would be made that no network has: a few bytes may ask for it."""
        with self.mode, torch.no_grad():
            try:
                fake = function(*_mapped(args, self._example), **_mapped(kwargs, self._example))
            except DataDependentOutputException:
                return
        for item in fake if isinstance(fake, (list, tuple)) else (fake,):
            if isinstance(item, Tensor) and item.numel() > MOST_COMPUTED:
                raise Refused(
                    f"it makes a constant of sizes {list(item.shape)}; expected at most "
                    f"{MOST_COMPUTED} elements"
                )

    def module(self, name: str, module: nn.Module, *operands: Any) -> Any:
        """A call of a module, which is put at ``name`` if it is not there yet."""
        if name not in self.names:
            owner, _, leaf = name.rpartition(".")
            self._put(owner, leaf, module)
        return self.again(name, *operands)

    def again(self, name: str, *operands: Any) -> Any:
        """Another call of a module: a value, or several."""
        node = self.graph.call_module(name, _mapped(operands, self._noded))
        with self.mode, torch.no_grad():
            fake = self.root.get_submodule(name)(*_mapped(operands, self._example))
        return self._values(node, fake)

    def size(self, operand: Value, axis: int) -> Size:
        """A size of a value."""
        node = self.graph.call_function(functions.size_of, (operand.node, axis))
        return Size(node, operand.shape[axis])

    def tensor(self, value: Any) -> Value:
        """A value that the network reads: constants become buffers, sizes a tensor."""
        if isinstance(value, Value):
            return value
        if isinstance(value, np.ndarray):
            found = self.call(functions.tensor_of, list(value.flat), value.ndim)
            return found if isinstance(found, Value) else self.tensor(found)
        assert isinstance(value, Constant)
        return Value(self._noded(value), self._faked(value.tensor))

    def integers_of(self, value: Value) -> Value:
        """The integers that the file has in the place of a value that is quantized there."""
        grid = value.grid
        assert grid is not None
        found: Value = self.call(
            functions.integers_of, value.on(None), grid.scale, grid.zero_point, grid.lowest
        )
        return found

    # -- operands that have to be known -------------------------------------------------------

    def known(self, value: Any, what: str) -> Tensor:
        """The tensor of a constant."""
        if isinstance(value, Constant):
            return value.tensor
        if isinstance(value, np.ndarray) and not any(isinstance(i, Size) for i in value.flat):
            return torch.tensor(value.tolist(), dtype=torch.int64)
        raise Refused(f"its {what} is computed while the network runs; expected a constant")

    def sizes(self, value: Any, what: str) -> list[Any]:
        """A list of whole numbers, which the sizes of inputs may decide."""
        if isinstance(value, np.ndarray):
            return list(value.flat)
        return [int(item) for item in self.known(value, what).flatten().tolist()]

    # -- names ------------------------------------------------------------------------------

    def layer_name(self, node: NodeView, weight: Any = None) -> str:
        """Where a layer goes: by its weight's name if that is one of a module's, else its own."""
        stem, _, leaf = getattr(weight, "name", "").rpartition(".")
        found = _dotted(stem) if stem and leaf == "weight" else ""
        if not found:
            parts = [part for part in node.name.split("/") if part]
            # "/layer1/layer1.0/conv1/Conv": every part repeats what is around it.
            if len(parts) > 1 and parts[-1].startswith(node.kind):
                parts.pop()
            path = ""
            for part in parts:
                path = part if part.startswith(f"{path}.") else f"{path}.{part}".lstrip(".")
            found = _dotted(path)
        if found.partition(".")[0] == CONSTANTS:
            found = f"layer_{found}"
        return self.unused(found or node.kind.lower())

    def unused(self, name: str) -> str:
        """A name that no module has yet, neither above nor below another one."""
        if any(name.startswith(f"{other}.") for other in self.names):
            name = name.replace(".", "_")  # a layer holds no other
        found, count = name, 1
        while any(found == other or other.startswith(f"{found}.") for other in self.names):
            count += 1
            found = f"{name}_{count}"
        return found

    def _put(self, owner: str, leaf: str, item: nn.Module | Tensor) -> None:
        holder = self.root
        for part in owner.split(".") if owner else ():
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        if isinstance(item, Tensor):
            holder.register_buffer(leaf, item)
        else:
            holder.add_module(leaf, item)
        self.names.add(f"{owner}.{leaf}".lstrip("."))

    # -- operands of a call -------------------------------------------------------------------

    def _noded(self, value: Any) -> Any:
        if isinstance(value, (Value, Size)):
            return value.node
        if isinstance(value, Constant):
            if value not in self.held:
                leaf = _dotted(value.name).replace(".", "_") or "constant"
                name = self.unused(f"{CONSTANTS}.{leaf}")
                self._put(CONSTANTS, name.rpartition(".")[2], value.tensor)
                self.held[value] = name
            return self.graph.get_attr(self.held[value])
        return value

    def _example(self, value: Any) -> Any:
        if isinstance(value, Value):
            return value.fake
        if isinstance(value, Constant):
            return self._faked(value.tensor)
        return value.example if isinstance(value, Size) else value

    def _faked(self, tensor: Tensor) -> Any:
        return self.mode.from_tensor(tensor)

    def _values(self, node: fx.Node, fake: Any) -> Any:
        if isinstance(fake, Tensor):
            return Value(node, fake)
        if isinstance(fake, (list, tuple)):
            return tuple(
                self._values(self.graph.call_function(operator.getitem, (node, i)), item)
                for i, item in enumerate(fake)
            )
        raise Refused(f"{node.target} gives {type(fake).__name__}")


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in _flat(item)]
    if isinstance(value, dict):
        return _flat(list(value.values()))
    return [value]


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(item, function) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(item, function) for key, item in value.items()}
    return function(value)


def _plain(value: Any) -> Any:
    return value.tensor if isinstance(value, Constant) else value


def _constants(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Constant(value)
    if isinstance(value, (list, tuple)):
        return tuple(Constant(item) for item in value)
    raise Refused(f"gives {type(value).__name__}")


def _identifier(text: str) -> str:
    found = re.sub(r"\W", "_", text).strip("_") or "x"
    found = f"x_{found}" if found[0].isdigit() else found
    taken = keyword.iskeyword(found) or found in _TAKEN or hasattr(builtins, found)
    return f"{found}_" if taken else found


def _dotted(text: str) -> str:
    """A name of nested modules: of letters, digits and underscores, with dots between."""
    parts = [re.sub(r"\W", "_", part).strip("_") for part in text.split(".")]
    return ".".join(f"{part}_" if hasattr(_MODULE, part) else part for part in parts if part)
