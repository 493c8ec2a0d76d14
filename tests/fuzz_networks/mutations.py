"""Captured models with a mistake in them, to see whether the judge notices."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import fx, nn

from adalayer_native.capture import GraphModel, info_of

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def mutated(captured: GraphModel) -> Iterator[tuple[str, GraphModel]]:
    """Copies that have lost an operator, a bias, or a norm, with what was lost."""
    for node in captured.graph.nodes:
        if _removable(node):
            yield f"without {node.name} ({node.target})", _without(captured, node.name)
    for name, module in captured.named_modules():
        if isinstance(getattr(module, "bias", None), nn.Parameter) and not isinstance(
            module, NORMS
        ):
            changed = copy.deepcopy(captured)
            with torch.no_grad():
                changed.get_submodule(name).bias.zero_()
            yield f"{name} without bias", changed
        elif isinstance(module, NORMS):
            changed = copy.deepcopy(captured)
            with torch.no_grad():
                changed.get_submodule(name).running_mean.add_(0.5)
            yield f"{name} with another mean", changed


def _removable(node: fx.Node) -> bool:
    """Whether an operand may stand in the place of a node's result."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    mine, operand = info_of(node), info_of(node.args[0])
    if not hasattr(mine, "sizes") or not hasattr(operand, "sizes"):
        return False
    return mine.is_float32 and operand.is_float32 and mine.sizes == operand.sizes


def _without(captured: GraphModel, name: str) -> GraphModel:
    changed = copy.deepcopy(captured)
    (node,) = (item for item in changed.graph.nodes if item.name == name)
    node.replace_all_uses_with(node.args[0])
    changed.graph.erase_node(node)
    changed.recompile()
    return changed
