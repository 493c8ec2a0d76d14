"""What the graph of an imported network does not need."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from adalayer_native.nn import FakeQuantize, Linear
from adalayer_native.nn.layer import NativeLayer
from adalayer_native.onnx.building import CONSTANTS, Builder

__all__ = ["tidy"]


def tidy(g: Builder) -> None:
    """Take out what nobody reads, and join what belongs to one layer."""
    _drop_dead(g.graph)
    _take_biases(g)
    _drop_grids(g)
    _drop_dead(g.graph)
    _drop_constants(g)


def _drop_dead(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _take_biases(g: Builder) -> None:
    """A constant that is added to a linear layer's outputs is its bias: exporters divide them."""
    for node in list(g.graph.nodes):
        if node.target not in (torch.add, operator.add) or len(node.args) != 2:
            continue
        left, right = node.args
        if isinstance(left, fx.Node) and left.op == "get_attr":
            left, right = right, left
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            continue
        if left.op != "call_module" or right.op != "get_attr" or len(left.users) != 1:
            continue
        name = str(left.target)
        layer: Any = g.root.get_submodule(name)
        called = [item for item in g.graph.nodes if item.target == name]
        if type(layer) not in (nn.Linear, Linear) or len(called) != 1:
            continue
        if layer.bias is not None and layer.bias.any():  # (a native layer has one of zeros)
            continue
        owner, _, leaf = str(right.target).rpartition(".")
        bias = getattr(g.root.get_submodule(owner), leaf)
        if bias.shape == (layer.out_features,) and bool(torch.isfinite(bias).all()):
            if isinstance(layer, NativeLayer):
                layer.bias = bias.to(torch.float32).clone()
            else:
                layer.bias = nn.Parameter(bias.clone())
            node.replace_all_uses_with(left)
            g.graph.erase_node(node)


def _drop_grids(g: Builder) -> None:
    """Native layers put their input on its grid themselves."""
    modules = dict(g.root.named_modules())
    for node in list(g.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[str(node.target)], FakeQuantize):
            continue
        readers = [modules.get(str(user.target)) for user in node.users if user.op == "call_module"]
        native = [item for item in readers if isinstance(item, NativeLayer)]
        if len(native) == len(node.users):
            node.replace_all_uses_with(node.args[0])
            g.graph.erase_node(node)
            owner, _, leaf = str(node.target).rpartition(".")
            del g.root.get_submodule(owner)._modules[leaf]


def _drop_constants(g: Builder) -> None:
    """Buffers that nothing reads any more."""
    read = {str(node.target) for node in g.graph.nodes if node.op == "get_attr"}
    holder = g.root._modules.get(CONSTANTS)
    for leaf in list(holder._buffers) if holder is not None else ():
        if f"{CONSTANTS}.{leaf}" not in read:
            assert holder is not None
            del holder._buffers[leaf]
