"""Writes into tensors become new tensors, where that is plain to see; one graph has no regions."""

from __future__ import annotations

import operator

import torch
from torch import fx

from adalayer_native.capture.vocabulary import op_name

__all__ = ["functionalise", "inline_regions"]

# What torch.export makes of ``with torch.no_grad()`` and ``with torch.autocast(...)``: the position
# of the region's graph among the arguments.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}

# They may return their operand itself without saying so in their schema.
_MAY_RETURN_OPERAND = frozenset(
    f"aten.{name}"
    for name in (
        "dropout.default", "feature_dropout.default", "alpha_dropout.default",
        "feature_alpha_dropout.default", "type_as.default", "native_dropout.default",
    )
)  # fmt: skip


def inline_regions(module: fx.GraphModule) -> bool:
    """Put the operators of regions that change nothing in inference in the regions' place.

    Returns:
        False where a region computes in another type (``torch.autocast``): ``torch.export`` can say
        which values it casts, and the graph must then not be used.
    """
    graph = module.graph
    for node in list(graph.nodes):
        place = _REGIONS.get(_operator_name(node))
        if place is None:
            continue
        if place == 4 and node.args[2]:
            return False
        holder = node.args[place]
        assert isinstance(holder, fx.Node)
        region = module.get_submodule(str(holder.target))
        assert isinstance(region, fx.GraphModule)
        if not inline_regions(region):
            return False
        inner = iter(node.args[place + 1 :])
        new: dict[fx.Node, fx.Node] = {}
        with graph.inserting_before(node):
            for item in region.graph.nodes:
                if item.op == "placeholder":
                    new[item] = next(inner)
                elif item.op != "output":
                    new[item] = graph.node_copy(item, new.__getitem__)
        (results,) = next(iter(reversed(region.graph.nodes))).args
        assert isinstance(results, (tuple, list))
        for reader in list(node.users):
            assert reader.target is operator.getitem
            result = results[reader.args[1]]
            assert isinstance(result, fx.Node)
            reader.replace_all_uses_with(new[result])
            graph.erase_node(reader)
        graph.erase_node(node)
        if not holder.users:
            graph.erase_node(holder)
    return True


def _operator_name(node: fx.Node) -> str:
    target = node.target
    return target.name() if isinstance(target, torch._ops.HigherOrderOperator) else ""


def functionalise(graph: fx.Graph) -> bool:
    """Replace operators that write into their operand by those that return a new tensor.

    Whoever reads the operand later reads the new tensor. That is all there is to do where no other
    view of the memory is read later; ``torch.export`` can do the rest, but takes three times as
    long as all else.

    Returns:
        False where it takes more than that; the graph must then not be used.
    """
    writes = [node for node in graph.nodes if _writes(node)]
    if not writes:
        return True
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in writes:
        target = node.target
        assert isinstance(target, torch._ops.OpOverload)
        name = target._schema.name.removeprefix("aten::")
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
        overload = getattr(packet, target._overloadname, None) if name.endswith("_") else None
        operand = node.args[0] if node.args else None
        if overload is None or not isinstance(operand, fx.Node) or operand.op == "get_attr":
            return False
        before, after = operand.meta.get("val"), node.meta.get("val")
        if getattr(before, "dtype", None) != getattr(after, "dtype", None):
            return False  # x.mul_(y) keeps the type of x, and x * y may not
        relatives = _relatives(operand, node)
        if any(order[reader] > order[node] for item in relatives for reader in item.users):
            return False
        node.target = overload
        for reader in list(operand.users):
            if order[reader] > order[node]:
                reader.replace_input_with(operand, node)
    return True


def _writes(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _shares(node: fx.Node) -> bool:
    """Whether a node's result may share memory with its first operand."""
    if node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    named = any(result.alias_info is not None for result in target._schema.returns)
    return named or op_name(node) in _MAY_RETURN_OPERAND


def _relatives(node: fx.Node, write: fx.Node) -> set[fx.Node]:
    """Other nodes that may share memory with one, but for what is made of the write's result."""
    found = {node, write}
    pending = [node]

    def visit(item: object) -> None:
        if isinstance(item, fx.Node) and item not in found:
            found.add(item)
            pending.append(item)

    while pending:
        item = pending.pop()
        if _shares(item):
            visit(item.args[0])
        for reader in item.users:
            if _shares(reader) and reader.args and reader.args[0] is item:
                visit(reader)
    return found - {node, write}
