"""Which nodes run natively and which in torch, as alternating parts of the graph."""

from __future__ import annotations

import copy
import importlib
import math
import pickle
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from adalayer_native.capture.opaque import OPERATOR, OpaqueCall
from adalayer_native.capture.vocabulary import arguments, op_name
from adalayer_native.engine.export import Exported
from adalayer_native.engine.lower import CannotLower, Grids, Lowered, lower, rule_for
from adalayer_native.engine.work import multiply_accumulates
from adalayer_native.errors import UnsupportedModelError
from adalayer_native.nn.float_layer import FloatLayer

__all__ = ["Part", "TorchPart", "divide", "float_layer", "is_layer"]


@dataclass
class Part:
    """Consecutive work of one kind.

    Attributes:
        native: whether the engine runs it.
        nodes: in graph order.
        inputs: nodes outside whose tensors it reads.
        outputs: nodes inside whose tensors others read.
        lowered: the program of a native part.
    """

    native: bool
    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    lowered: Lowered | None = None


def is_layer(node: fx.Node) -> bool:
    """Whether the node is a native layer of the module tree."""
    return node.op == "call_function" and op_name(node) in (
        "adalayer.conv2d.default",
        "adalayer.conv_transpose2d.default",
        "adalayer.linear.default",
    )


def is_tensor(node: Any) -> bool:
    """Whether a node yields tensors (and not sizes)."""
    if not isinstance(node, fx.Node):
        return False
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (
        isinstance(value, (list, tuple)) and all(isinstance(item, Tensor) for item in value)
    )


def _work(exported: Exported) -> list[fx.Node]:
    """What has to be computed. A constant is nobody's work, unless it is a result."""
    return [
        n
        for n in exported.graph.nodes
        if n.op == "call_function"
        and is_tensor(n)
        and (exported.constant(n) is None or n in exported.outputs)
    ]


def _partition(exported: Exported, native: set[fx.Node]) -> list[Part]:
    """Layers of alternating kind: even ones native, odd ones in torch."""
    depth: dict[fx.Node, int] = {}
    work = _work(exported)
    for node in work:
        level = 0 if node in native else 1
        for item in node.all_input_nodes:
            if item in depth:
                other = depth[item]
                level = max(level, other if (other % 2 == 0) == (node in native) else other + 1)
        depth[node] = level
    outputs = {item for item in exported.outputs if isinstance(item, fx.Node)}
    parts = []
    for level in sorted(set(depth.values())):
        nodes = [node for node in work if depth[node] == level]
        inside = set(nodes)
        inputs = [
            item
            for node in nodes
            for item in node.all_input_nodes
            if item not in inside and exported.constant(item) is None and is_tensor(item)
        ]
        leaving = [
            node
            for node in nodes
            if node in outputs
            or any(
                u not in inside and u.op != "output" and exported.constant(u) is None
                for u in node.users
            )
        ]
        parts.append(Part(level % 2 == 0, nodes, list(dict.fromkeys(inputs)), leaving))
    return parts


def _pieces_together(node: fx.Node, torch_nodes: dict[fx.Node, str], reason: str) -> None:
    """A list of tensors does not cross a boundary: its maker and its readers go together."""
    pending = [node]
    while pending:
        item = pending.pop()
        if item in torch_nodes:
            continue
        torch_nodes[item] = reason
        if op_name(item) == "getitem":
            pending.append(item.all_input_nodes[0])
        if isinstance(item.meta.get("val"), (list, tuple)):
            pending.extend(item.users)


def divide(
    exported: Exported, as_float: Collection[fx.Node] = ()
) -> tuple[list[Part], dict[fx.Node, str]]:
    """Lower as much as possible.

    Args:
        as_float: quantized layers that shall be computed in float; all have such a form.

    Returns:
        The parts in an order that runs, and the reason of every node that runs in torch.
    """
    reasons: dict[fx.Node, str] = {}
    for node in _work(exported):
        if rule_for(node) is None:
            _pieces_together(node, reasons, "the engine has no such operation")
    grids = Grids()
    while True:
        native = {node for node in _work(exported) if node not in reasons}
        parts = _partition(exported, native)
        changed = False
        if len(parts) > 1:
            for part in parts:
                # Not worth a change from float to levels and back.
                if part.native and not any(multiply_accumulates(exported, n) for n in part.nodes):
                    for node in part.nodes:
                        _pieces_together(node, reasons, "it stands between operations in torch")
                    changed = True
        if changed:
            continue
        try:
            for part in parts:
                if part.native:
                    part.lowered = lower(exported, part.nodes, part.outputs, grids, as_float)
            return parts, reasons
        except CannotLower as error:
            failed, reason = error.node, error.reason
        if failed is None:
            raise AssertionError(reason)
        _pieces_together(failed, reasons, reason)


# -- parts in torch -------------------------------------------------------------------------------


def float_layer(exported: Exported, node: fx.Node, on_grid: bool) -> FloatLayer:
    """A native layer in float. ``on_grid``: its input has the fake-quantized values already."""
    tensors = ("weight_packed", "weight_scale", "bias")
    a = arguments(node)
    given = {key: exported.tensor(value) if key in tensors else value for key, value in a.items()}
    return FloatLayer(str(node.target).split(".")[1], given, on_grid)


_PLAIN_NORMS = tuple(
    f"adalayer.grid_{kind}_norm.default" for kind in ("batch", "layer", "rms", "group")
)


def _plain_norm(graph: fx.Graph, node: fx.Node, find: Callable[[fx.Node], Any]) -> fx.Node:
    """torch's own norm, which is many times as fast as the engine's steps in torch."""
    a = fx.node.map_aggregate(
        arguments(node), lambda item: find(item) if isinstance(item, fx.Node) else item
    )
    if "running_mean" in a:
        mean, var = a["running_mean"], a["running_var"]
        return graph.call_function(
            torch.ops.aten.batch_norm.default,
            (a["input"], a["weight"], a["bias"], mean, var, False, 0.1, a["eps"], False),
        )
    if "num_groups" in a:
        return graph.call_function(
            torch.ops.aten.group_norm.default,
            (a["input"], a["num_groups"], a["weight"], a["bias"], a["eps"]),
        )
    channels = node.meta["val"].shape[-1]
    if "bias" not in a:
        rest = ([channels], a["weight"], a["eps"])
        return graph.call_function(torch.ops.aten.rms_norm.default, (a["input"], *rest))
    return graph.call_function(
        torch.ops.aten.layer_norm.default,
        (a["input"], [channels], a["weight"], a["bias"], a["eps"]),
    )


class TorchPart:
    """Nodes that run in torch, as a function of their inputs and the batch size."""

    def __init__(self, exported: Exported, part: Part) -> None:
        graph = fx.Graph()
        root = nn.Module()
        known: dict[fx.Node, Any] = {}
        batch = graph.placeholder("batch_size")
        for node in part.inputs:
            known[node] = graph.placeholder(node.name)

        def find(node: fx.Node) -> Any:
            if node in known:
                return known[node]
            value = node.meta.get("val")
            constant = exported.constant(node)
            if constant is not None:
                name = f"constant_{len(known)}"
                root.register_buffer(name, constant)
                known[node] = graph.get_attr(name)
                if node.op != "get_attr":
                    sizes = (batch, *constant.shape[1:])
                    known[node] = graph.call_function(
                        torch.ops.aten.expand.default, (known[node], sizes)
                    )
            elif exported.is_batch(value):
                known[node] = batch
            elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                known[node] = graph.node_copy(node, find)
            elif isinstance(value, (int, float)):
                known[node] = value
            else:
                raise UnsupportedModelError(f"node {node} reads {value} from another part")
            return known[node]

        for node in part.nodes:
            if op_name(node) == OPERATOR:
                key, tensors = node.args
                name = f"excluded_{len(known)}"
                root.add_module(name, OpaqueCall(exported.calls[str(key)]))
                found = [find(item) for item in tensors]  # type: ignore[union-attr,arg-type]
                known[node] = graph.call_module(name, (found,))
            elif op_name(node) in _PLAIN_NORMS:
                known[node] = _plain_norm(graph, node, find)
            else:
                known[node] = graph.node_copy(node, find)
        graph.output(tuple(known[node] for node in part.outputs))
        graph.lint()
        # By their names here, those in the exported graph.
        self.names = {known[node].name: node.name for node in part.nodes}
        self.module = fx.GraphModule(root, graph)

    def __call__(self, batch: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = self.module(batch, *inputs)
        return result

    def to(self, device: torch.device) -> TorchPart:
        """The same nodes on another device."""
        other = copy.deepcopy(self)
        other.module.to(device)
        return other

    # A pickled fx.GraphModule holds Python code, which is traced again when it is loaded and then
    # has other nodes. A list of nodes with the names of their operators says what there is.

    def __getstate__(self) -> dict[str, Any]:
        def refer(node: fx.Node) -> Any:
            return _Reference(node.name)

        nodes = []
        for node in self.module.graph.nodes:
            args, kwargs = (fx.map_arg(item, refer) for item in (node.args, node.kwargs))
            nodes.append((node.op, _target_text(node.target), args, kwargs, node.name))
        return {
            "nodes": nodes,
            "names": self.names,
            "tensors": dict(self.module.named_buffers(recurse=False)),
            "layers": dict(self.module.named_children()),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        root, graph = nn.Module(), fx.Graph()
        for name, tensor in state["tensors"].items():
            root.register_buffer(name, tensor)
        for name, layer in state["layers"].items():
            root.add_module(name, layer)
        known: dict[str, fx.Node] = {}

        def find(item: Any) -> Any:
            return known[item.name] if isinstance(item, _Reference) else item

        for op, text, args, kwargs, name in state["nodes"]:
            target = _target(text) if op == "call_function" else text
            args, kwargs = (fx.node.map_aggregate(item, find) for item in (args, kwargs))
            known[name] = graph.create_node(op, target, args, kwargs, name)
        graph.lint()
        self.names = {known[name].name: found for name, found in state["names"].items()}
        self.module = fx.GraphModule(root, graph)

    def times(
        self, batch: int, inputs: list[Tensor], clock: Callable[[], float]
    ) -> dict[str, float]:
        """Seconds of every node in one run, by its name in the exported graph."""
        found: dict[str, float] = {}
        names = self.names

        class Timer(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                start = clock()
                result = super().run_node(n)
                if n.name in names:
                    found[names[n.name]] = clock() - start
                return result

        Timer(self.module).run(batch, *inputs)
        return found


@dataclass(frozen=True)
class _Reference:
    """A node among the arguments of another one."""

    name: str


def _target_text(target: Any) -> str:
    """What a node calls, as text: "aten.relu.default", or "_operator:getitem" for a function."""
    if isinstance(target, (str, torch._ops.OpOverload)):
        return str(target)
    text = f"{target.__module__}:{target.__qualname__}"
    if _target(text) is not target:
        raise pickle.PicklingError(f"{target} cannot be found again as {text}")
    return text


def _target(text: str) -> Any:
    """The operator or function of that name.

    Raises:
        pickle.UnpicklingError: this version of torch, or whoever defined it, has none.
    """
    module, found_colon, path = text.partition(":")
    try:
        found = importlib.import_module(module) if found_colon else torch.ops
        for part in (path if found_colon else text).split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise pickle.UnpicklingError(
            f"the engine runs {text} in torch, which is not there: {error}"
        ) from error
    return found


def image_bytes(nodes: list[fx.Node]) -> int:
    """Bytes per image of float32 tensors."""
    return sum(4 * math.prod(int(s) for s in n.meta["val"].shape[1:]) for n in nodes)
