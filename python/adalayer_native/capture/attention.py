"""Attention in a captured graph: torch's own operator, or the products that spell it out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from adalayer_native.capture.model import TensorInfo, info_of
from adalayer_native.capture.tidying import CASTS
from adalayer_native.capture.vocabulary import (
    arguments,
    attribute,
    is_identity,
    is_value,
    op_name,
)

__all__ = ["Attention", "attentions", "mask_values"]

_PRODUCTS = ("aten.matmul.default", "aten.bmm.default")
_SOFTMAXES = ("aten.softmax.int", "aten._softmax.default")
_MASKING = (
    "aten.add.Tensor", "aten.masked_fill.Scalar", "aten.masked_fill.Tensor", "aten.where.self",
    "aten.where.ScalarOther", "aten.where.ScalarSelf",
)  # fmt: skip
_SAME = tuple(f"aten.{name}.default" for name in ("contiguous", "clone", "alias", "detach"))


# What stands in the place of a score is as good as added to it from here on: weights are zero, and
# where all scores of a row are hidden, they are alike, since float32 keeps no digit of what was.
_HIDING = -1e9


@dataclass(frozen=True)
class Choice:
    """A mask of two values: tensors of one number, or numbers."""

    condition: fx.Node
    if_true: fx.Node | float
    if_false: fx.Node | float


@dataclass(frozen=True)
class Attention:
    """``softmax(scale * query key^T + mask) value``.

    Attributes:
        result: the node that has its value.
        query: ``[..., heads, queries, depth]``.
        key: ``[..., heads, keys, depth]``, its last two axes exchanged where ``key_turned``.
        value: ``[..., heads, keys, width]``, exchanged where ``result_turned``.
        masks: what is added to the scores, or one bool tensor.
        causal: a query meets the keys up to its own place.
        scale: of the scores.
        factors: constants of one number, or one per head, that they are multiplied with, too, or
            divided by (True).
        key_turned: as a matrix product has it.
        result_turned: the result is ``[..., heads, width, queries]``.
        split: sizes of the scores where a mask is added, if their first axes are split for it.
        joined: sizes that they have again behind it.
        entries: nodes that read query, key or value.
        inner: all nodes from there on, the result among them.
    """

    result: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    masks: tuple[fx.Node | Choice, ...]
    causal: bool
    scale: float
    factors: tuple[tuple[fx.Node, bool], ...] = ()
    key_turned: bool = False
    result_turned: bool = False
    split: tuple[Any, ...] = ()
    joined: tuple[Any, ...] = ()
    entries: frozenset[fx.Node] = frozenset()
    inner: frozenset[fx.Node] = frozenset()


def attentions(model: fx.GraphModule) -> list[Attention]:
    """Every attention of a graph whose scores nobody else reads."""
    modules = dict(model.named_modules())
    found = []
    for node in model.graph.nodes:
        if node.op != "call_function":
            continue
        name = op_name(node)
        match: Attention | None = None
        if name == "aten.scaled_dot_product_attention.default":
            match = _operator(node)
        elif name in _PRODUCTS:
            match = _Spelled(model, modules, node).match()
        if match is not None and all(map(is_value, (match.query, match.key, match.value))):
            found.append(match)
    return found


def mask_values(graph: fx.Graph, found: Iterable[Attention]) -> set[fx.Node]:
    """What nobody but the masks of attentions reads, up to the inputs of the call."""
    values: set[fx.Node] = set()
    readers: dict[fx.Node, set[fx.Node]] = {}
    for item in found:
        for mask in item.masks:
            parts: list[Any] = [mask]
            if isinstance(mask, Choice):
                parts = [mask.condition, mask.if_true, mask.if_false]
            for part in parts:
                if isinstance(part, fx.Node):
                    readers.setdefault(part, set()).update(item.inner)
    for node in reversed(list(graph.nodes)):
        users = [user for user in node.users if user.op == "output" or info_of(user) is not None]
        known = readers.get(node, set())
        if users and all(user in values or user in known for user in users):
            values.add(node)
    return values


def _operator(node: fx.Node) -> Attention | None:
    a = arguments(node)
    query, key, value = a["query"], a["key"], a["value"]
    if a["dropout_p"] or not _heads_agree(query, key, value, node):
        return None
    scale = a["scale"]
    if scale is None:
        depth = _size(query, -1)
        if not isinstance(depth, int):
            return None
        scale = 1.0 / math.sqrt(depth)
    inner = frozenset([node])
    masks = () if a["attn_mask"] is None else (a["attn_mask"],)
    causal, scale = bool(a["is_causal"]), float(scale)
    return Attention(node, query, key, value, masks, causal, scale, entries=inner, inner=inner)


class _Spelled:
    """Looks backward from the second product to the first."""

    def __init__(self, model: fx.GraphModule, modules: dict[str, nn.Module], node: fx.Node) -> None:
        self.model = model
        self.modules = modules
        self.node = node
        self.inner = [node]
        self.scale = 1.0
        self.factors: list[tuple[fx.Node, bool]] = []
        self.masks: list[fx.Node | Choice] = []
        self.split: tuple[Any, ...] = ()
        self.joined: tuple[Any, ...] = ()

    def match(self) -> Attention | None:
        left, right = self.node.args[:2]
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        for weights, value, turned in ((left, right, False), (right, left, True)):
            self.inner, self.scale, self.factors, self.masks = [self.node], 1.0, [], []
            self.split = self.joined = ()
            softmax = self._softmax(weights, turned)
            product = None if softmax is None else self._scores(softmax)
            if product is None:
                continue
            query, key = product.args[:2]
            split = bool(self.split)
            entries = {self.node, product}
            query, key = (self._scaled(item, product, entries) for item in (query, key))
            inner = frozenset([*self.inner, *entries])
            closed = all(inner.issuperset(node.users) for node in inner - {self.node})
            sizes = (_size(query, -1), _size(value, -2 if turned else -1))
            known = all(isinstance(size, int) for size in sizes)
            if closed and (known or not split) and _ranks_agree((query, key, value)):
                return Attention(
                    self.node, query, key, value, tuple(self.masks), False, self.scale,
                    tuple(self.factors), True, turned, self.split, self.joined,
                    frozenset(entries), inner,
                )  # fmt: skip
        return None

    def _step(self, node: fx.Node) -> fx.Node:
        """Past what leaves a value as it is."""
        while is_identity(node, self.modules) or (
            node.op == "call_function" and op_name(node) in _SAME
        ):
            self.inner.append(node)
            operand = node.args[0]
            assert isinstance(operand, fx.Node)
            node = operand
        return node

    def _softmax(self, node: fx.Node, turned: bool) -> fx.Node | None:
        """What the softmax reads whose result a product multiplies with."""
        node = self._step(node)
        if turned:
            if node.op != "call_function" or not _exchanges(node):
                return None
            self.inner.append(node)
            node = self._step(node.args[0])  # type: ignore[arg-type]
        if node.op != "call_function" or op_name(node) not in _SOFTMAXES:
            return None
        a, info = arguments(node), info_of(node)
        if not isinstance(info, TensorInfo) or a["dim"] not in (-1, len(info.shape) - 1):
            return None
        self.inner.append(node)
        operand = node.args[0]
        return operand if isinstance(operand, fx.Node) else None

    def _scores(self, node: fx.Node) -> fx.Node | None:
        """The product of queries and keys, behind a scale and a mask."""
        while True:
            node = self._step(node)
            if node.op != "call_function":
                return None
            name = op_name(node)
            if name in _PRODUCTS:
                return node if bool(self.joined) == bool(self.split) else None
            if self._multiplied(node):
                self.inner.append(node)
                node = node.args[0]  # type: ignore[assignment]
                continue
            if name == "aten.reshape.default":
                # Windows and heads apart, for a mask that differs between windows.
                if not self._splits(node):
                    return None
            # A factor of the sum would be one of the mask, too.
            elif name not in _MASKING or node.kwargs or self.factors or self.scale != 1.0:
                return None
            self.inner.append(node)
            operand = node.args[0] if name == "aten.reshape.default" else self._masked(node)
            if not isinstance(operand, fx.Node):
                return None
            node = operand

    def _splits(self, node: fx.Node) -> bool:
        """Note a reshape of the scores' first axes: the one behind a mask, then its inverse."""
        before, after = info_of(node.args[0]), info_of(node)
        if not isinstance(before, TensorInfo) or not isinstance(after, TensorInfo):
            return False
        sizes = node.args[1]
        if before.shape[-2:] != after.shape[-2:] or not isinstance(sizes, (list, tuple)):
            return False
        if not self.joined:
            self.joined = tuple(sizes)
            return not self.masks
        self.split = tuple(sizes)
        return len(self.masks) == 1

    def _masked(self, node: fx.Node) -> fx.Node | None:
        """The scores that a node adds a mask to, or hides parts of."""
        operands = [item for item in node.args if isinstance(item, fx.Node)]
        scores = [item for item in operands if self._is_score(item)]
        if len(scores) != 1:
            return None
        added = op_name(node) == "aten.add.Tensor"
        mask: fx.Node | Choice | None = None
        if not added:
            mask = self._choice(node, scores[0])
        elif len(operands) == 2:
            mask = operands[1 - operands.index(scores[0])]
        info = info_of(mask.condition if isinstance(mask, Choice) else mask)
        found, before = info_of(node), info_of(scores[0])
        if mask is None or not isinstance(info, TensorInfo):
            return None
        if added and info.dtype == torch.bool:  # (it adds one)
            return None
        if not isinstance(found, TensorInfo) or not isinstance(before, TensorInfo):
            return None
        if found.sizes != before.sizes:  # (repeats the scores)
            return None
        # With other axes than those of the mask before it: none that both have but the heads.
        if self.split and len(info.shape) > 3 and set(info.shape[:-3]) != {1}:
            return None
        if bool(self.joined) != bool(self.split) and self.masks:
            return None
        self.masks.append(mask)
        return scores[0]

    def _choice(self, node: fx.Node, scores: fx.Node) -> Choice | None:
        """What a node puts in the place of hidden scores, and zero elsewhere."""
        if op_name(node).startswith("aten.masked_fill."):
            scored, condition, number = node.args
            places = [number, scored]
        else:
            condition, *places = node.args
        if not isinstance(condition, fx.Node):
            return None
        left, right = (0.0 if item is scores else self._hiding(item) for item in places)
        return None if left is None or right is None else Choice(condition, left, right)

    def _hiding(self, item: object) -> fx.Node | float | None:
        """A number that hides what it replaces, or a tensor of one such number."""
        number = item
        if isinstance(item, fx.Node):
            info, source = info_of(item), item
            while source.op == "call_function" and op_name(source) in (*_SAME, *CASTS):
                source = source.args[0]  # type: ignore[assignment]
            if not isinstance(info, TensorInfo) or info.shape or not info.is_float32:
                return None
            if source.op == "get_attr":
                tensor = attribute(self.model, str(source.target))
                number = None if tensor.device.type == "meta" else float(tensor)
            elif op_name(source) == "aten.full.default":
                number = source.args[1]
        hides = isinstance(number, (int, float)) and number <= _HIDING
        return item if hides else None  # type: ignore[return-value]

    def _is_score(self, node: object) -> bool:
        """Whether an operand of a sum leads to a product of two tensors."""
        while isinstance(node, fx.Node) and node.op == "call_function":
            name = op_name(node)
            if name in _PRODUCTS:
                return True
            passes = name in _SAME or name == "aten.reshape.default"
            if name in _MASKING:
                return any(map(self._is_score, node.args))
            if self._factor(node) is None and not passes:
                return False
            node = node.args[0]
        return False

    def _factor(self, node: fx.Node) -> tuple[float | fx.Node, bool] | None:
        """The constant that a node multiplies its first operand with, or divides it by (True)."""
        if node.op != "call_function" or node.kwargs:
            return None
        kind, _, overload = op_name(node).removeprefix("aten.").partition(".")
        if kind not in ("mul", "div") or overload not in ("Tensor", "Scalar"):
            return None
        operand, other = node.args[:2]
        if not isinstance(operand, fx.Node):
            return None
        if isinstance(other, fx.Node):
            # A file may bring another value: it is read when the attention is computed.
            before, info = info_of(operand), info_of(other)
            if not isinstance(before, TensorInfo) or not isinstance(info, TensorInfo):
                return None
            one = set(info.shape) <= {1} and len(info.shape) <= len(before.shape)
            fits = one or _is_per_head(info, before)
            return (other, kind == "div") if fits and self._is_constant(other) else None
        if not isinstance(other, (int, float)) or (kind == "div" and not other):
            return None
        return float(other), kind == "div"

    def _is_constant(self, node: fx.Node) -> bool:
        """Whether a float32 number depends on parameters and numbers alone."""
        if node.op == "get_attr":
            return attribute(self.model, str(node.target)).device.type != "meta"
        inputs = node.all_input_nodes
        return node.op == "call_function" and bool(inputs) and all(map(self._is_constant, inputs))

    def _multiplied(self, node: fx.Node) -> bool:
        """Note the factor that a node has; False where it has none."""
        found = self._factor(node)
        if found is None:
            return False
        factor, divides = found
        if isinstance(factor, fx.Node):
            self.factors.append((factor, divides))
        else:
            self.scale = self.scale / factor if divides else self.scale * factor
        return True

    def _scaled(self, node: object, reader: fx.Node, entries: set[fx.Node]) -> fx.Node:
        """An operand in front of a scale that only this product reads."""
        assert isinstance(node, fx.Node)
        if set(node.users) != {reader} or not self._multiplied(node):
            return node
        entries.add(node)
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        return operand


def _is_per_head(factor: TensorInfo, scores: TensorInfo) -> bool:
    """Whether a constant has one number for each head, ``[heads, 1, 1]``."""
    lead, last = factor.shape[:-2], factor.shape[-2:]
    return (
        3 <= len(factor.shape) <= len(scores.shape)
        and last == (1, 1)
        and set(lead[:-1]) <= {1}
        and lead[-1] == scores.shape[-3]
    )


def _size(node: fx.Node, axis: int) -> int | str | None:
    info = info_of(node)
    return info.shape[axis] if isinstance(info, TensorInfo) else None


def _exchanges(node: fx.Node) -> bool:
    """Whether a node exchanges the last two axes."""
    info = info_of(node)
    if op_name(node) != "aten.transpose.int" or not isinstance(info, TensorInfo):
        return False
    rank = len(info.shape)
    return {int(axis) % rank for axis in node.args[1:3]} == {rank - 2, rank - 1}  # type: ignore[arg-type]


def _heads_agree(query: fx.Node, key: fx.Node, value: fx.Node, result: fx.Node) -> bool:
    """Whether keys and values have the axes of queries, perhaps with fewer heads.

    The operator repeats whatever has one of something, queries too.
    """
    infos = [info_of(node) for node in (query, key, value, result)]
    sizes = [info.sizes for info in infos if isinstance(info, TensorInfo)]
    if len(sizes) != 4 or min(map(len, sizes)) < 2:
        return False
    q, k, v, y = sizes
    heads = len(q) < 3 or q[-3] % k[-3] == 0
    return heads and q[:-3] == k[:-3] and k[:-2] == v[:-2] and y[:-1] == q[:-1]


def _ranks_agree(nodes: Iterable[fx.Node]) -> bool:
    """Whether all have the same axes in front of the last two; products broadcast others."""
    found = set()
    for node in nodes:
        info = info_of(node)
        if not isinstance(info, TensorInfo) or len(info.shape) < 3:
            return False
        found.add(tuple(map(str, info.shape[:-2])))
    return len(found) == 1
