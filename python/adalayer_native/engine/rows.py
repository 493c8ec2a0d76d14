"""Rows of features that a model lays one below the other only for a linear layer."""

from __future__ import annotations

import torch
from torch import fx

from adalayer_native.capture.vocabulary import FUNCTIONS, RESHAPES, op_name

__all__ = ["unfold_rows"]

_BETWEEN = frozenset(
    ["adalayer.fake_quantize.default", *(f"aten.{name}.default" for name in FUNCTIONS)]
)


def unfold_rows(graph: fx.Graph) -> None:
    """``linear(x.reshape(rows, n)).reshape(*sizes, m)`` is ``linear(x.reshape(*sizes, n))``.

    So the batch stays an axis of its own: torch's attention merges it with the tokens, which come
    first there.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node) != "adalayer.linear.default":
            continue
        rows = node.args[0]
        if isinstance(rows, fx.Node) and op_name(rows) in RESHAPES and len(rows.users) == 1:
            _unfold(graph, rows, node)


def _unfold(graph: fx.Graph, rows: fx.Node, linear: fx.Node) -> None:
    chain = [linear]
    while len(chain[-1].users) == 1 and op_name(next(iter(chain[-1].users))) in _BETWEEN:
        chain.append(next(iter(chain[-1].users)))
    readers = list(chain[-1].users)
    if not readers or any(op_name(user) != "aten.reshape.default" for user in readers):
        return
    before, after = rows.meta["val"], readers[0].meta["val"]
    shapes = {tuple(map(str, user.meta["val"].shape)) for user in readers}
    features = before.shape[-1]
    if before.dim() != 2 or len(shapes) > 1 or after.shape[-1] != linear.meta["val"].shape[-1]:
        return
    sizes = [*readers[0].args[1][:-1], features]  # type: ignore[index,misc]
    earlier = set()
    for item in graph.nodes:
        if item is linear:
            break
        earlier.add(item)
    if any(isinstance(size, fx.Node) and size not in earlier for size in sizes):
        return
    with graph.inserting_before(linear):
        unfolded = graph.call_function(torch.ops.aten.reshape.default, (rows.args[0], sizes))
    unfolded.meta = {**rows.meta, "val": after.new_empty((*after.shape[:-1], features))}
    linear.replace_input_with(rows, unfolded)
    for item in chain:
        item.meta["val"] = after
    for user in readers:
        user.replace_all_uses_with(chain[-1])
        graph.erase_node(user)
    graph.erase_node(rows)
