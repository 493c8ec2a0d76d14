"""Masks of attention that an input of the call decides: which keys of a sample are hidden.

What a model makes of such an input differs from model to model: casts, comparisons, products with a
large negative number, indices, causal parts. So the steps are not recognised one by one; they are
computed for some inputs, and the mask is taken apart where it is nothing but the lower one of a
constant mask and of a number that each key's entry of the input decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from adalayer_native.capture.vocabulary import op_name
from adalayer_native.ops.attention import additive_mask

__all__ = ["take_masks_apart"]

_ATTENTION, _MASK = "adalayer.grid_attention.default", 3
_SAMPLES = 6
_OTHERS = (2, -1, 256, 1 << 16)  # what an integer mask may hold beside 0 and 1


@dataclass
class _Source:
    """What a mask depends on.

    Attributes:
        holder: the input.
        nodes: the steps from it to the mask, in the order of the graph.
    """

    holder: fx.Node
    nodes: list[fx.Node]


def take_masks_apart(owner: fx.GraphModule) -> None:
    """Replace masks that an input decides by one operator, ``adalayer.key_mask``.

    Args:
        owner: an exported model, with constants computed.
    """
    order = {node: k for k, node in enumerate(owner.graph.nodes)}
    found: dict[fx.Node, fx.Node | None] = {}
    for node in list(owner.graph.nodes):
        if node.op != "call_function" or op_name(node) != _ATTENTION:
            continue
        mask = node.args[_MASK]
        if not isinstance(mask, fx.Node) or mask.op == "get_attr":
            continue
        if mask not in found:
            source = _source_of(mask, order)
            found[mask] = None if source is None else _Apart(owner, mask, source).made()
        if found[mask] is not None:
            node.update_arg(_MASK, found[mask])


def _source_of(mask: fx.Node, order: dict[fx.Node, int]) -> _Source | None:
    """The one input that a mask depends on; None for what depends on more, or on other things."""
    nodes, pending, holders = set(), [mask], set()
    while pending:
        node = pending.pop()
        if node in nodes or not isinstance(node.meta.get("val"), Tensor):
            continue  # (A size is one of the batch's.)
        if node.op == "placeholder":
            holders.add(node)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if torch.Tag.nondeterministic_seeded in node.target.tags:
                return None
            nodes.add(node)
            pending += node.all_input_nodes
        elif node.op != "get_attr":
            return None
    if len(holders) != 1:
        return None
    return _Source(holders.pop(), sorted(nodes, key=order.__getitem__))


_Found = tuple[Tensor, float, float, bool]
"""A constant mask, the numbers for 0 and for 1, and whether all others mean the latter, too."""


class _Apart:
    """Computes a mask for some inputs."""

    def __init__(self, owner: fx.GraphModule, mask: fx.Node, source: _Source) -> None:
        self.owner, self.mask, self.source = owner, mask, source

    def made(self) -> fx.Node | None:
        """The operator in front of the mask's first reader, or None."""
        shape = self.source.holder.meta["val"].shape
        keys = self.mask.meta["val"].shape[-1]
        sizes = list(shape[1:])
        if type(keys) is not int or not all(type(size) is int for size in sizes):
            return None
        if type(shape[0]) is int or math.prod(sizes) != keys or keys < 1:
            return None
        dtype = self.source.holder.meta["val"].dtype
        try:
            found = self._additive() if dtype.is_floating_point else self._hidden(dtype, keys)
        except (RuntimeError, IndexError, TypeError):  # a step that another batch does not suit
            return None
        return None if found is None else self._node(*found)

    def _of(self, values: Tensor) -> Tensor:
        """The mask for these entries ``[samples, keys]``: float32 of four axes."""
        holder = self.source.holder
        batch = len(values)
        sizes = [int(size) for size in holder.meta["val"].shape[1:]]
        known: dict[fx.Node, Any] = {holder: values.reshape(batch, *sizes)}

        def value(node: fx.Node) -> Any:
            if node in known:
                return known[node]
            val = node.meta["val"]
            if isinstance(val, Tensor):
                found: Any = self.owner
                for part in str(node.target).split("."):
                    found = getattr(found, part)
                return found
            if not isinstance(val, torch.SymInt):
                return val
            # (There is one size that varies.)
            expression = val.node.expr
            return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))

        for node in self.source.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        mask = additive_mask(known[self.mask])
        return mask.reshape((1,) * (4 - mask.dim()) + mask.shape).expand(batch, *mask.shape[-3:])

    def _patterns(self, keys: int) -> Tensor:
        """Samples of zeros and ones: all of one kind, and random ones."""
        generator = torch.Generator().manual_seed(0)
        flags = torch.rand(_SAMPLES, keys, generator=generator) < 0.5
        flags[0], flags[1] = True, False
        return flags

    def _hidden(self, dtype: torch.dtype, keys: int) -> _Found | None:
        """A mask that zeros hide keys by, or all other numbers do."""
        flags = self._patterns(keys)
        given = flags.to(dtype)
        masks = self._of(given)
        if masks.shape[0] != _SAMPLES or masks.shape[-1] != keys:
            return None
        tops = [float(masks[k].max()) for k in (1, 0)]  # of zeros, of ones
        shown = 1 if tops[1] > tops[0] else 0
        constant = masks[1 - shown]
        numbers = [0.0, 0.0]
        numbers[shown] = max(0.0, tops[shown])
        numbers[1 - shown] = tops[1 - shown]
        if not numbers[1 - shown] < numbers[shown]:
            return None
        lower = torch.where(flags, numbers[1], numbers[0])[:, None, None, :]
        if not torch.equal(masks, torch.minimum(constant, lower).expand_as(masks)):
            return None
        several = dtype is torch.bool
        if not several:
            again = given.clone()
            for k, number in enumerate(_OTHERS):
                again[:, k :: len(_OTHERS)] *= number
            several = torch.equal(self._of(again), masks)
        return constant, numbers[0], numbers[1], several

    def _additive(self) -> _Found | None:
        """The same for a mask that is the input itself."""
        keys = int(self.mask.meta["val"].shape[-1])
        generator = torch.Generator().manual_seed(0)
        sizes = 10.0 ** torch.randint(-3, 30, (_SAMPLES, keys), generator=generator)
        values = torch.randn(_SAMPLES, keys, generator=generator) * sizes
        values[self._patterns(keys)] = 0.0
        masks = self._of(values)
        if not torch.equal(masks, values[:, None, None, :].expand_as(masks)):
            return None
        return torch.zeros(masks.shape[1:]), 0.0, 0.0, True

    def _node(self, constant: Tensor, zero: float, other: float, several: bool) -> fx.Node:
        graph, holder = self.owner.graph, self.source.holder
        name = f"mask_{self.mask.name}"
        self.owner.register_buffer(name, constant.clone(), persistent=False)
        with graph.inserting_after(self.mask):
            held = graph.get_attr(name)
        held.meta["val"] = self.mask.meta["val"].new_empty(constant.shape, dtype=torch.float32)
        with graph.inserting_after(held):
            new = graph.call_function(
                torch.ops.adalayer.key_mask.default, (holder, held, zero, other, several)
            )
        batch = holder.meta["val"].shape[0]
        new.meta["val"] = self.mask.meta["val"].new_empty(
            (batch, *constant.shape), dtype=torch.float32
        )
        return new
