"""Values that depend on parameters and the batch's size alone: constants, repeated per sample.

Masks of attention are such values, and positions of tokens: models make them for the batch that
they are given. What is made is computed for one sample and for several, and compared.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from adalayer_native.capture.vocabulary import FACTORIES, LIKE_FACTORIES, attribute, op_name
from adalayer_native.engine.views import BATCH

__all__ = ["Repeats"]

# Operators that repeat an operand themselves, and its place.
_REPEATING = {"adalayer.grid_attention.default": 3, "adalayer.grid_line.default": 1}
_SEVERAL = 5
_RESHAPE, _EXPAND = torch.ops.aten.reshape.default, torch.ops.aten.expand.default


class Repeats:
    """Takes such values of an exported graph apart.

    Args:
        owner: of the graph and its constants.
        holders: the inputs whose first size is the batch's, with its symbol there. Inputs that
            the model does not combine have symbols of their own, which a call gives one value.
    """

    def __init__(self, owner: fx.GraphModule, holders: dict[fx.Node, torch.SymInt]) -> None:
        self.owner, self.graph = owner, owner.graph
        self.holder, self.batch = next(iter(holders.items()))
        self.symbols = {str(symbol): symbol.node.expr for symbol in holders.values()}
        self.known: set[fx.Node] = set()
        for node in self.graph.nodes:
            if self._is_known(node):
                self.known.add(node)

    def fold(self) -> None:
        """Write every such value that others read as a constant, repeated where it must be."""
        read = [
            node
            for node in self.graph.nodes
            if node in self.known
            and node.op == "call_function"
            and isinstance(node.meta.get("val"), Tensor)
            and any(user not in self.known and user.op != "output" for user in node.users)
        ]
        if not read:
            return
        one, several = (self._values(count, read) for count in (1, _SEVERAL))
        for node in read:
            sizes = [self._size(size, BATCH[0]) for size in node.meta["val"].shape]
            rows = sizes[0] // BATCH[0] if sizes and sizes[0] % BATCH[0] == 0 else 0
            found = one[node]
            wanted = found.repeat(_SEVERAL, *[1] * (found.dim() - 1)) if rows else found
            if torch.equal(wanted, several[node]):
                alike = rows > 1 and torch.equal(found, found[:1].expand_as(found))
                self._replace(
                    node,
                    found[:1]
                    if alike and all(_repeats(user, node) for user in node.users)
                    else found,
                    rows,
                )

    def _is_known(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        if node.op == "get_attr":
            return True
        if node.op != "call_function":
            return False
        if isinstance(value, torch.SymInt):
            return self.symbols.keys() >= {str(n) for n in value.node.expr.free_symbols}
        if op_name(node) in LIKE_FACTORIES:
            return self.known.issuperset(node.all_input_nodes[1:])
        sources = node.all_input_nodes
        if not self.known.issuperset(sources) or not (sources or op_name(node) in FACTORIES):
            return False
        if node.target is operator.getitem:
            return True
        made = isinstance(node.target, torch._ops.OpOverload)
        return made and torch.Tag.nondeterministic_seeded not in node.target.tags  # type: ignore[union-attr]

    def _size(self, size: Any, batch: int) -> int:
        """A size for so many samples."""
        if isinstance(size, torch.SymInt):
            return int(size.node.expr.subs(dict.fromkeys(self.symbols.values(), batch)))
        return int(size)

    def _values(self, batch: int, wanted: list[fx.Node]) -> dict[fx.Node, Any]:
        """What is wanted, for so many samples."""
        needed, pending = set(wanted), list(wanted)
        while pending:
            new = [item for item in pending.pop().all_input_nodes if item not in needed]
            new = [item for item in new if item in self.known]
            needed.update(new)
            pending += new
        found: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node not in needed:
                continue
            value = node.meta["val"]
            if node.op == "get_attr":
                found[node] = attribute(self.owner, str(node.target))
            elif isinstance(value, torch.SymInt):
                found[node] = self._size(value, batch)
            else:
                if op_name(node) in LIKE_FACTORIES:
                    like = node.all_input_nodes[0]
                    sizes = [self._size(size, batch) for size in like.meta["val"].shape]
                    found[like] = torch.empty(sizes, dtype=like.meta["val"].dtype)
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
                with torch.no_grad():
                    found[node] = node.target(*args, **kwargs)
        return found

    def _replace(self, node: fx.Node, value: Tensor, rows: int) -> None:
        """By a constant; of ``rows`` per sample, which are repeated."""
        name = f"folded_{node.name}"
        self.owner.register_buffer(name, value.clone(), persistent=False)
        with self.graph.inserting_before(node):
            found = self.graph.get_attr(name)
            found.meta["val"] = node.meta["val"].new_empty(value.shape)
        for user in [user for user in node.users if user not in self.known]:
            repeats = _repeats(user, node)
            if not rows or (repeats and len(value) == 1):
                user.replace_input_with(node, found)
            elif rows == 1:
                user.replace_input_with(node, self._repeated(node, found))
            elif repeats and op_name(user) == "adalayer.grid_attention.default":
                self._of_windows(user, found, rows)

    def _repeated(self, node: fx.Node, constant: fx.Node) -> fx.Node:
        """The value for all samples."""
        with self.graph.inserting_before(node):
            size = self.graph.call_function(torch.ops.aten.sym_size.int, (self.holder, 0))
            size.meta["val"] = self.batch
            rest = [int(item) for item in constant.meta["val"].shape[1:]]
            found = self.graph.call_function(_EXPAND, (constant, [size, *rest]))
        found.meta.update(node.meta)
        return found

    def _of_windows(self, node: fx.Node, mask: fx.Node, rows: int) -> None:
        """Give windows, or heads, an axis of their own, for a mask that differs between them."""
        shapes = [item.meta["val"].shape for item in node.args[:3]]  # type: ignore[union-attr]
        if any(len(shape) not in (3, 4) for shape in shapes):
            return
        operands: Any = node.args[:3]
        target: Any = node.target
        with self.graph.inserting_before(node):
            split = [
                self._reshaped(item, [rows, *shape[1:]])
                for item, shape in zip(operands, shapes, strict=True)
            ]
            new = self.graph.call_function(target, (*split, mask, *node.args[4:]))
            rest = list(map(int, node.meta["val"].shape[1:]))
            new.meta.update(node.meta)
            new.meta["val"] = node.meta["val"].new_empty((self.batch, rows, *rest))
            joined = self.graph.call_function(_RESHAPE, (new, [-1, *rest]))
            joined.meta.update(node.meta)
        node.replace_all_uses_with(joined)
        self.graph.erase_node(node)

    def _reshaped(self, node: fx.Node, sizes: list[Any]) -> fx.Node:
        found = self.graph.call_function(_RESHAPE, (node, [-1, *map(int, sizes)]))
        found.meta.update(node.meta)
        found.meta["val"] = node.meta["val"].new_empty((self.batch, *map(int, sizes)))
        return found


def _repeats(node: fx.Node, operand: fx.Node) -> bool:
    place = _REPEATING.get(op_name(node))
    return place is not None and node.args[place] is operand
