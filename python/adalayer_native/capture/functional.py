"""Writes into tensors become new tensors, where that is plain to see."""

from __future__ import annotations

import operator

import torch
from torch import fx

from adalayer_native.capture.vocabulary import op_name

__all__ = ["functionalise"]

# They may return their operand itself without saying so in their schema.
_MAY_RETURN_OPERAND = frozenset(
    f"aten.{name}"
    for name in (
        "dropout.default", "feature_dropout.default", "alpha_dropout.default",
        "feature_alpha_dropout.default", "type_as.default", "native_dropout.default",
    )
)  # fmt: skip


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
