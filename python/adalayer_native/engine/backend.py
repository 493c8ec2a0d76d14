"""The ``torch.compile`` backend ``"adalayer"``."""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from adalayer_native._recent import Recent
from adalayer_native.engine.compiler import compile_exported, compile_range
from adalayer_native.engine.export import Exported, export
from adalayer_native.engine.runtime import Engine
from adalayer_native.engine.sizes import Size
from adalayer_native.errors import UnsupportedModelError

__all__ = ["backend"]

_FLOAT_LAYERS = (
    torch.conv2d,
    torch.conv_transpose2d,
    F.conv2d,
    F.conv_transpose2d,
    F.linear,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.linear.default,
)
_RESHAPES = (
    torch.ops.aten.reshape.default,
    torch.ops.aten.view.default,
    torch.ops.aten.expand.default,
)
_PATH = re.compile(r"\['(\w+)'\]")


def backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile one graph of ``torch.compile(model, backend="adalayer")``.

    Graphs without layers (between breaks) run as they are.

    Args:
        options: ``policy`` and ``strict`` as in :func:`adalayer_native.compile`.

    Raises:
        UnsupportedModelError: the graph has convolutions or linear layers, but none is native: the
            model was never calibrated.
    """
    if not any(str(node.target).startswith("adalayer.") for node in gm.graph.nodes):
        if any(_is_float_layer(gm, node) for node in gm.graph.nodes):
            raise UnsupportedModelError(
                'backend "adalayer": the model has no native layers because it was never '
                "calibrated; compress it with adalayer_native.compress(model, calibration, "
                "budget) and compile the model that it returns"
            )
        return gm.forward
    known = dict(options or {})
    unknown = set(known) - {"policy", "strict"}
    if unknown:
        raise ValueError(f'backend "adalayer": unknown options {sorted(unknown)}')
    return _Compiled(_Bound(gm, example_inputs), known)


def _is_float_layer(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), (nn.Conv2d, nn.Linear))
    return node.op == "call_function" and node.target in _FLOAT_LAYERS


class _Bound(nn.Module):
    """A graph of the compiler with the model's parameters bound, so that only inputs are left."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        super().__init__()
        graph_module = fx.GraphModule(gm, fx.Graph())
        graph_module.graph.output(graph_module.graph.graph_copy(gm.graph, {}))
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self.plan: list[tuple[str, Any]] = []
        self.inputs: list[int] = []  # positions of the user's tensors
        self.constants: list[Tensor] = []
        self.names: list[str] = []
        for position, (node, example) in enumerate(zip(placeholders, example_inputs, strict=True)):
            if not isinstance(example, Tensor):
                self.plan.append(("size", node))
            elif _is_constant(example):
                self.plan.append(("constant", len(self.constants)))
                self.constants.append(example)
                self.names.append(self._bind(node, example))
            else:
                self.plan.append(("input", len(self.inputs)))
                self.inputs.append(position)
        self.plan = [
            (kind, self._origin(which, placeholders) if kind == "size" else which)
            for kind, which in self.plan
        ]
        # By input the axes whose sizes are the compiler's symbols, behind the batch.
        self.free = [
            _symbols(placeholders[position].meta.get("example_value")) for position in self.inputs
        ]
        if self.inputs:
            _free_batch(graph_module, example_inputs[self.inputs[0]].shape[0])
        graph_module.recompile()
        self.__dict__["run"] = graph_module

    def _bind(self, node: fx.Node, value: Tensor) -> str:
        """Hold a constant under its name in the model, from which the engine names layers."""
        source = getattr(node.meta.get("grapharg"), "source", None)
        name = getattr(source, "name", "")
        text = str(name() if callable(name) else name).partition("]")[2]
        kinds = ("_modules", "_parameters", "_buffers")
        path = [part for part in _PATH.findall(text) if part not in kinds]
        owner: nn.Module = self
        for part in path[:-1]:
            if part not in owner._modules:
                if hasattr(owner, part):
                    path = []
                    break
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if not path or hasattr(owner, path[-1]):
            owner, path = self, [f"constant_{len(self._buffers)}"]
        owner.register_buffer(path[-1], value.detach())
        return ".".join(path)

    def _origin(self, node: fx.Node, placeholders: Sequence[fx.Node]) -> tuple[int, int]:
        """Which axis of which input a symbolic size is."""
        symbol = node.meta["example_value"]
        for number, position in enumerate(self.inputs):
            value = placeholders[position].meta.get("example_value")
            for axis, size in enumerate(getattr(value, "shape", ())):
                if isinstance(size, torch.SymInt) and str(size) == str(symbol):
                    return number, axis
        raise UnsupportedModelError(f"the size {symbol} is that of no input")

    def forward(self, *inputs: Tensor) -> Any:
        arguments: list[Any] = []
        for kind, which in self.plan:
            if kind == "input":
                arguments.append(inputs[which])
            elif kind == "constant":
                arguments.append(self.get_buffer(self.names[which]))
            else:
                arguments.append(inputs[which[0]].shape[which[1]])
        return self.run(*arguments)

    run: fx.GraphModule


def _symbols(value: Any) -> dict[int, str]:
    """Symbols of an example's sizes by axis, without that of the batch."""
    sizes = list(enumerate(getattr(value, "shape", ())))[1:]
    return {axis: str(size) for axis, size in sizes if isinstance(size, torch.SymInt)}


def _is_constant(example: Tensor) -> bool:
    """Whether an operand of the graph belongs to the model."""
    if getattr(example, "_dynamo_static_input_type", None) is not None:
        return True
    return isinstance(example, nn.Parameter)


def _free_batch(graph_module: fx.GraphModule, batch: int) -> None:
    """Undo that the compiler wrote the batch size into reshapes, so that export keeps it free."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        method = node.op == "call_method" and node.target in ("view", "reshape", "expand")
        if not method and node.target not in _RESHAPES:
            continue
        operand, *rest = node.args
        nested = bool(rest) and isinstance(rest[0], (list, tuple))
        sizes = list(rest[0]) if nested else rest
        shape = getattr(operand.meta.get("example_value"), "shape", ())
        if not sizes or type(sizes[0]) is not int or sizes[0] != batch or not shape:
            continue
        if shape[0] != batch:
            continue
        with graph.inserting_before(node):
            sizes[0] = graph.call_method("size", (operand, 0))
        node.args = (operand, sizes) if nested else (operand, *sizes)


# Engines of a graph that are made one per size, because none could be made for all of them.
_MOST_SIZES = 8
_LEAST, _LARGEST, _STEP = 32, 2048, 64

Run = Callable[..., Any]
Shapes = tuple[tuple[int, ...], ...]


class _Compiled:
    """The engine of one graph; made again when the model's tensors were written to.

    It is made at the first call: inside the compiler, torch.export would add its guards to those
    of the graph that is being compiled. A graph with free sizes (torch's compiler makes one when a
    model comes with a second size) gets an engine for a range of sizes; where there is none, one
    per size.
    """

    def __init__(self, bound: _Bound, options: Mapping[str, Any]) -> None:
        self._bound = bound
        self._options = options
        self._ranged: Engine | None = None
        self._tried = False  # to make that one
        self._runs = Recent[Shapes, Run](_MOST_SIZES)  # by sizes without the batch
        self._versions = -1
        self._lock = threading.Lock()

    def _compile(self, examples: Sequence[Tensor]) -> Run:
        strict = bool(self._options.get("strict", False))
        try:
            exported = export(self._bound, examples)
            options: dict[str, Any] = {
                "policy": str(self._options.get("policy", "fastest")),
                "strict": strict,
                "batch": examples[0].shape[0],
            }
            if not self._tried and any(self._bound.free):
                self._tried = True
                self._ranged = self._for_range(exported, examples, options)
                if self._ranged is not None:
                    return self._ranged
            return compile_exported(exported, **options)
        except UnsupportedModelError as error:
            if strict:
                raise
            warnings.warn(f'backend "adalayer": a graph runs in torch: {error}', stacklevel=3)
            return self._bound

    def _for_range(
        self, exported: Exported, examples: Sequence[Tensor], options: dict[str, Any]
    ) -> Engine | None:
        """An engine for all sizes, or for multiples of what divides these; None if none can be."""
        sizes = [
            examples[k].shape[axis] for k, axes in enumerate(self._bound.free) for axis in axes
        ]
        for step in dict.fromkeys((1, math.gcd(_STEP, *sizes))):
            ranges = {
                node.name: {
                    axis: Size(min(_LEAST, *sizes), _LARGEST, step, symbol)
                    for axis, symbol in axes.items()
                }
                for node, axes in zip(exported.inputs, self._bound.free, strict=True)
                if axes
            }
            try:
                return compile_range(self._bound, exported, tuple(examples), ranges, **options)
            except (UnsupportedModelError, ValueError):
                continue
        return None

    def _run_of(self, shapes: Shapes, inputs: Sequence[Tensor]) -> Run:
        ranged = self._ranged
        if ranged is not None and all(
            port.fits(shape) for port, shape in zip(ranged.inputs, shapes, strict=True)
        ):
            return ranged
        return self._runs.get_or(shapes, lambda: self._compile(inputs))

    def __call__(self, *arguments: Any) -> Any:
        inputs = [arguments[position] for position in self._bound.inputs]
        versions = sum(tensor._version for tensor in self._bound.constants)
        shapes = tuple(tuple(x.shape[1:]) for x in inputs)
        with self._lock:
            if versions != self._versions:
                self._ranged, self._tried, self._runs = None, False, Recent(_MOST_SIZES)
                self._versions = versions
            run = self._run_of(shapes, inputs)
        return run(*inputs)
