"""Products that are spelled as sums over letters, or with a sum, as plain products of matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from adalayer_native.capture.vocabulary import arguments, op_name

__all__ = ["plain_products"]

_aten = torch.ops.aten


def plain_products(graph: fx.Graph) -> None:
    """``einsum`` of two tensors and ``baddbmm`` as ``matmul`` and ``bmm``, where they are such."""
    for node in list(graph.nodes):
        name = op_name(node) if node.op == "call_function" else ""
        new: fx.Node | None = None
        with graph.inserting_before(node):
            if name == "aten.baddbmm.default":
                new = _sum(graph, arguments(node))
            elif name == "aten.einsum.default":
                new = _letters(graph, str(node.args[0]), list(node.args[1]))
        if new is not None:
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda item: item.meta["val"]))
    return node


def _sum(graph: fx.Graph, a: dict[str, Any]) -> fx.Node:
    found = _call(graph, _aten.bmm.default, a["batch1"], a["batch2"])
    if a["alpha"] != 1:
        found = _call(graph, _aten.mul.Tensor, found, a["alpha"])
    if a["beta"] == 0:  # what is added may be anything then
        return found
    added = a["self"]
    if a["beta"] != 1:
        added = _call(graph, _aten.mul.Tensor, added, a["beta"])
    return _call(graph, _aten.add.Tensor, found, added)


def _letters(graph: fx.Graph, equation: str, operands: list[fx.Node]) -> fx.Node | None:
    terms, arrow, result = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    if not arrow or len(names) != 2 or len(operands) != 2 or not (terms + result).isascii():
        return None
    if any(len(set(text)) != len(text) or "." in text for text in (*names, result)):
        return None
    left, right = names
    sizes: list[dict[str, str]] = []
    for text, node in zip(names, operands, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() != len(text):
            return None
        sizes.append(dict(zip(text, map(str, value.shape), strict=True)))
    shared = [letter for letter in left if letter in right]
    if any(sizes[0][letter] != sizes[1][letter] for letter in shared):
        return None  # (one of them is repeated)
    batch = [letter for letter in result if letter in shared]
    summed = [letter for letter in shared if letter not in result]
    rows = [letter for letter in left if letter not in right]
    columns = [letter for letter in right if letter not in left]
    if set(rows + columns + batch) != set(result) or len(summed) != 1 or len(columns) != 1:
        return None
    if not rows or (len(rows) > 1 and batch):
        return None
    first = _ordered(graph, operands[0], left, [*batch, *rows, *summed])
    second = _ordered(graph, operands[1], right, [*batch, *summed, *columns])
    found = _call(graph, _aten.matmul.default, first, second)
    return _ordered(graph, found, "".join([*batch, *rows, *columns]), list(result))


def _ordered(graph: fx.Graph, node: fx.Node, letters: str, wanted: list[str]) -> fx.Node:
    order = [letters.index(letter) for letter in wanted]
    if order == list(range(len(order))):
        return node
    return _call(graph, _aten.permute.default, node, order)
