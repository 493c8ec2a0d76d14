"""Steps whose bits depend on how they are computed become operators that compute as the engine.

torch adds up floats in an order of its own and rounds products and sums one by one. Norms, lines
with a constant, averages, bilinear resizing, and a softmax or another function at the
end are therefore operators of ours (ops/norms.py, averages.py, resizing.py, fused.py) in the exact
simulation and in converted models. So is attention between values on grids: the engine rounds the
weights of a softmax (ops/attention.py), which a simulation in float32 leaves as they are. So are
convolutions and linear layers that stay in float (ops/floats.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import fx, nn

from adalayer_native.capture import TensorInfo, info_of
from adalayer_native.capture import vocabulary as table
from adalayer_native.capture.attention import Attention, Choice, attentions, mask_values
from adalayer_native.capture.rms_norms import rms_norms
from adalayer_native.padding import four_paddings
from adalayer_native.quantization.fake_quant import ActivationQuantizer, QuantLayer

__all__ = ["exact_steps", "undo_steps"]

_ops = torch.ops.adalayer
_LINES = tuple(f"aten.{kind}.Tensor" for kind in ("add", "sub", "mul", "div"))
_FUNCTIONS = frozenset(
    [f"aten.{name}.default" for name in table.FUNCTIONS]
    + [f"aten.{name}.Scalar" for name in ("add", "sub", "mul", "div", "rsub")]
    + ["aten.pow.Tensor_Scalar"]
)


def exact_steps(model: nn.Module, folded: Collection[str], found: dict[fx.Node, fx.Node]) -> None:
    """Replace every step that has an operator of ours; nothing where no layer is quantized.

    Args:
        model: prepared and calibrated.
        folded: batch norms that are parts of layers.
        found: gets the new node for every old one, which nobody reads any more.
    """
    assert isinstance(model, fx.GraphModule)
    if not any(isinstance(module, QuantLayer) for module in model.modules()):
        return
    steps = _Steps(model, folded)
    for node in list(model.graph.nodes):
        new = steps.of(node)
        if new is not None:
            new.meta.update(node.meta)
            node.replace_all_uses_with(new)
            found[node] = new
    if found:
        model.recompile()


def undo_steps(model: nn.Module, replaced: dict[fx.Node, fx.Node]) -> None:
    """What :func:`exact_steps` has replaced is there again."""
    assert isinstance(model, fx.GraphModule)
    for old, new in reversed(replaced.items()):
        new.replace_all_uses_with(old)
        _erase(model.graph, new)
    if replaced:
        model.recompile()


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Take out a new node with what is there for it alone; what it replaced reads all else."""
    operands = node.all_input_nodes
    graph.erase_node(node)
    for operand in operands:
        if not operand.users:
            _erase(graph, operand)


class _Steps:
    """Makes the new node for an old one."""

    def __init__(self, model: fx.GraphModule, folded: Collection[str]) -> None:
        self.graph = model.graph
        self.modules = dict(model.named_modules())
        self.folded = folded
        self.constants = table.constants(model.graph)
        found = attentions(model)
        self.attentions = {item.result: item for item in found}
        # What stays in torch's steps inside of them, and in masks.
        self.scores = {step for item in found for step in item.inner}
        self.scores |= mask_values(self.graph, found)
        self.norms = rms_norms(self.graph)
        self.inside = {step for norm in self.norms.values() for step in norm.inside}

    def of(self, node: fx.Node) -> fx.Node | None:
        """The new node, in front of the old one; None for other steps."""
        if table.is_batch_norm(node, self.modules):
            return None if node.target in self.folded else self._batch_norm(node)
        if node.op == "call_module":
            return self._float_layer(node)
        if node.op != "call_function" or node in self.constants:
            return None
        if node in self.attentions:
            return self._attention(self.attentions[node])
        name = table.op_name(node)
        if node in self.inside or node in self.scores:
            return None
        if node in self.norms:
            norm = self.norms[node]
            if norm.unit:
                return self._norm(node, _ops.grid_unit.default, [norm.eps], norm.operand)
            rest = [norm.weight, norm.eps]
            return self._norm(node, _ops.grid_rms_norm.default, rest, norm.operand)
        if name == "aten.layer_norm.default":
            return self._layer_norm(node)
        if name in _LINES:
            return self._line(node, name.split(".")[1])
        make = _MAKERS.get(name)
        return None if make is None or not table.is_value(node) else make(self, node)

    def _parameters(self, node: fx.Node, *leaves: str) -> list[fx.Node | None]:
        """Those of the module that a node calls."""
        module = self.modules[str(node.target)]
        with self.graph.inserting_before(node):
            # (A file is loaded into a graph that is there already.)
            return [
                self.graph.get_attr(f"{node.target}.{leaf}")
                if getattr(module, leaf) is not None
                else None
                for leaf in leaves
            ]

    def _float_layer(self, node: fx.Node) -> fx.Node | None:
        """A convolution or linear layer that nobody quantizes."""
        layer = self.modules[str(node.target)]
        kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
        if isinstance(layer, QuantLayer) or not isinstance(layer, kinds):
            return None
        if layer.weight.dtype != torch.float32 or not table.is_value(node):
            return None
        rest: list[Any] = [node.args[0]]
        if isinstance(layer, nn.Linear):
            rest += self._parameters(node, "weight", "bias")
            return self._insert(node, _ops.exact_linear.default, rest)
        info = info_of(node)
        if layer.padding_mode != "zeros" or not isinstance(info, TensorInfo):
            return None
        if len(info.shape) != 4:
            return None
        if isinstance(layer, nn.ConvTranspose2d) and len(node.args) + len(node.kwargs) > 1:
            return None  # of a size that the call gives
        rest += self._parameters(node, "weight", "bias")
        if isinstance(layer, nn.ConvTranspose2d):
            pads = [list(layer.padding), list(layer.output_padding)]
            rest += [list(layer.stride), *pads, layer.groups, list(layer.dilation)]
            return self._insert(node, _ops.exact_conv_transpose2d.default, rest)
        sides = list(four_paddings(layer))
        rest += [list(layer.stride), sides, list(layer.dilation), layer.groups]
        return self._insert(node, _ops.exact_conv2d.default, rest)

    def _batch_norm(self, node: fx.Node) -> fx.Node | None:
        grid = self._grid_of(table.source(node))
        if grid is not None and not self._becomes_levels(node):
            grid = None  # of the real values
        tensors = self._parameters(node, "running_mean", "running_var", "weight", "bias")
        eps = self.modules[str(node.target)].eps
        rest = [node.args[0], *tensors, eps, self._qparams(node, grid)]
        return self._insert(node, _ops.grid_batch_norm.default, rest)

    def _layer_norm(self, node: fx.Node) -> fx.Node | None:
        a = table.arguments(node)
        if len(a["normalized_shape"]) != 1:
            return None
        return self._norm(node, _ops.grid_layer_norm.default, [a["weight"], a["bias"], a["eps"]])

    def _group_norm(self, node: fx.Node) -> fx.Node | None:
        a = table.arguments(node)
        rest = [a["num_groups"], a["weight"], a["bias"], a["eps"]]
        return self._norm(node, _ops.grid_group_norm.default, rest)

    def _norm(self, node: fx.Node, target: Any, rest: list[Any], operand: Any = None) -> fx.Node:
        """Of levels where the operand is on a grid, else of floats."""
        operand = node.args[0] if operand is None else operand
        qparams = self._qparams(node, self._grid_of(operand))
        return self._insert(node, target, [operand, *rest, qparams])

    def _line(self, node: fx.Node, kind: str) -> fx.Node | None:
        """A value on a grid and a constant with more than one element."""
        a = table.arguments(node)
        left = a["self"] in self.constants
        operand, constant = (a["other"], a["self"]) if left else (a["self"], a["other"])
        info = info_of(constant)
        if (
            constant not in self.constants
            or not isinstance(info, TensorInfo)
            or all(size == 1 for size in info.shape)
            or (kind == "div" and left)
            or not _same_shape(operand, node)
            or not self._becomes_levels(node)
        ):
            return None
        rest = [constant, kind, float(a.get("alpha", 1)), left]
        return self._on_grid(node, _ops.grid_line.default, rest, operand)

    def _two_lines(self, node: fx.Node) -> fx.Node | None:
        """``addend + value * factor * operand`` of two constants."""
        a = table.arguments(node)
        pair = [a["tensor1"], a["tensor2"]]
        given = [item in self.constants for item in (a["self"], *pair)]
        if given[0] is False or given[1] == given[2] or a["value"] != 1:
            return None
        constant, operand = pair if given[1] else pair[::-1]
        if not _same_shape(operand, node) or not self._becomes_levels(node):
            return None
        grid = self._grid_of(operand)
        if grid is None:
            return None
        rest = [constant, "mul", 1.0, bool(given[1]), self._qparams(node, grid), a["self"]]
        return self._insert(node, _ops.grid_line.default, [operand, *rest])

    def _avg_pool(self, node: fx.Node) -> fx.Node | None:
        a = table.arguments(node)
        info = info_of(node)
        if a["divisor_override"] is not None or not isinstance(info, TensorInfo):
            return None
        if len(info.shape) != 4:
            return None
        kernel, padding = _pair(a["kernel_size"]), _pair(a["padding"])
        stride = _pair(a["stride"] or kernel)
        rest = [kernel, stride, padding, a["ceil_mode"], a["count_include_pad"]]
        return self._average(node, _ops.exact_avg_pool2d.default, rest)

    def _adaptive(self, node: fx.Node) -> fx.Node | None:
        info = info_of(node)
        if not isinstance(info, TensorInfo) or len(info.shape) != 4:
            return None
        rest = [table.arguments(node)["output_size"]]
        return self._average(node, _ops.exact_adaptive_avg_pool2d.default, rest)

    def _mean(self, node: fx.Node) -> fx.Node | None:
        a = table.arguments(node)
        if not a["dim"] or a["dtype"] is not None:
            return None
        rest = [list(a["dim"]), a["keepdim"]]
        return self._average(node, _ops.exact_mean.default, rest)

    def _vector_norm(self, node: fx.Node) -> fx.Node | None:
        a = table.arguments(node)
        if a["ord"] != 2 or not a["dim"] or a["dtype"] is not None:
            return None
        rest = [
            list(a["dim"]),
            a["keepdim"],
            self._qparams(node, self._grid_of(table.source(node))),
        ]
        return self._insert(node, _ops.exact_vector_norm.default, [node.args[0], *rest])

    def _sum(self, node: fx.Node) -> fx.Node | None:
        a = table.arguments(node)
        if not a["dim"] or a["dtype"] is not None:
            return None
        rest = [
            list(a["dim"]),
            a["keepdim"],
            self._qparams(node, self._grid_of(table.source(node))),
        ]
        return self._insert(node, _ops.exact_sum.default, [node.args[0], *rest])

    def _bilinear(self, node: fx.Node) -> fx.Node | None:
        a = table.arguments(node)
        factors = a.get("scale_factors")
        if a.get("scales_h") is not None and a.get("scales_w") is not None:
            factors = [a["scales_h"], a["scales_w"]]
        rest = [a["output_size"], a["align_corners"], factors]
        return self._average(node, _ops.exact_bilinear.default, rest)

    def _softmax(self, node: fx.Node) -> fx.Node | None:
        """Over one axis, which the engine has as channels."""
        a, info = table.arguments(node), info_of(node)
        if not isinstance(info, TensorInfo) or a.get("dtype") is not None:
            return None
        axis = a["dim"] % len(info.shape)
        if axis == 0 or a.get("half_to_float"):
            return None
        if axis == 1:
            return self._insert(node, _ops.exact_softmax.default, [node.args[0]])
        with self.graph.inserting_before(node):
            operand = self._exchanged(node.args[0], 1, axis)
        found = self._insert(node, _ops.exact_softmax.default, [operand])
        with self.graph.inserting_before(node):
            return self._exchanged(found, 1, axis)

    def _attention(self, found: Attention) -> fx.Node | None:
        operands = (found.query, found.key, found.value)
        grids = [self._grid_of(operand) for operand in operands]
        if None in grids:
            return None
        node = found.result
        qparams = [self._qparams(node, grid) for grid in grids]
        turned = (False, found.key_turned, found.result_turned)
        with self.graph.inserting_before(node):
            query, key, value = (
                self._exchanged(item) if turn else item
                for item, turn in zip(operands, turned, strict=True)
            )
            width = self._size(found.value, -2 if found.result_turned else -1)
            if found.split:
                *lead, queries, keys = found.split
                depth = self._size(found.query, -1)
                query = self._reshaped(query, [*lead, queries, depth])
                key = self._reshaped(key, [*lead, keys, depth])
                value = self._reshaped(value, [*lead, keys, width])
            mask = None
            for item in map(self._mask, found.masks):
                add = torch.ops.aten.add.Tensor
                mask = item if mask is None else self.graph.call_function(add, (mask, item))
            factor = self._product(found.factors)
        rest = [mask, found.causal, found.scale, *qparams, factor]
        new = self._insert(node, _ops.grid_attention.default, [query, key, value, *rest])
        with self.graph.inserting_before(node):
            if found.joined:
                new = self._reshaped(new, [*found.joined[:-1], width])
            return self._exchanged(new) if found.result_turned else new

    def _mask(self, mask: fx.Node | Choice) -> fx.Node:
        """What is added to scores."""
        if isinstance(mask, fx.Node):
            return mask
        where, (left, right) = torch.ops.aten.where, (mask.if_true, mask.if_false)
        overload = where.ScalarOther if isinstance(left, fx.Node) else where.Scalar
        overload = where.ScalarSelf if isinstance(right, fx.Node) else overload
        return self.graph.call_function(overload, (mask.condition, left, right))

    def _product(self, factors: Iterable[tuple[fx.Node, bool]]) -> fx.Node | None:
        """Constants, and inverses of those that divide (True), multiplied."""
        found = None
        for item, divides in factors:
            if divides:
                item = self.graph.call_function(torch.ops.aten.reciprocal.default, (item,))
            mul = torch.ops.aten.mul.Tensor
            found = item if found is None else self.graph.call_function(mul, (found, item))
        return found

    def _size(self, node: fx.Node, axis: int) -> int | str:
        info = info_of(node)
        assert isinstance(info, TensorInfo)
        return info.shape[axis]

    def _reshaped(self, node: fx.Node, sizes: list[Any]) -> fx.Node:
        return self.graph.call_function(torch.ops.aten.reshape.default, (node, sizes))

    def _exchanged(self, node: Any, first: int = -2, second: int = -1) -> fx.Node:
        return self.graph.call_function(torch.ops.aten.transpose.int, (node, first, second))

    def _function(self, node: fx.Node) -> fx.Node | None:
        """Behind the last quantized layer; in front of it a table of levels does it."""
        if self._reaches_levels(node):
            return None
        kind = table.op_name(node).split(".")[1]
        return self._insert(node, _ops.exact_function.default, [node.args[0], kind])

    def _reaches_levels(self, node: fx.Node) -> bool:
        """Whether a quantizer or quantized layer depends on a value."""
        pending, seen = [node], {node}
        while pending:
            for user in pending.pop().users:
                module = table.module_of(user, self.modules)
                if isinstance(module, (ActivationQuantizer, QuantLayer)):
                    return True
                if user not in seen:
                    seen.add(user)
                    pending.append(user)
        return False

    def _average(self, node: fx.Node, target: Any, rest: list[Any]) -> fx.Node:
        """On levels where the result becomes levels, too, else on floats."""
        grid = self._grid_of(table.source(node)) if self._becomes_levels(node) else None
        return self._insert(node, target, [node.args[0], *rest, self._qparams(node, grid)])

    def _on_grid(
        self, node: fx.Node, target: Any, rest: list[Any], operand: Any = None
    ) -> fx.Node | None:
        operand = node.args[0] if operand is None else operand
        grid = self._grid_of(operand)
        if grid is None:
            return None
        return self._insert(node, target, [operand, *rest, self._qparams(node, grid)])

    def _qparams(self, node: fx.Node, grid: str | None) -> fx.Node | None:
        with self.graph.inserting_before(node):
            return None if grid is None else self.graph.get_attr(f"{grid}.qparams")

    def _insert(self, node: fx.Node, target: Any, args: list[Any]) -> fx.Node:
        with self.graph.inserting_before(node):
            return self.graph.call_function(target, tuple(args))

    def _grid_of(self, node: fx.Node | None) -> str | None:
        """Name of the quantizer whose grid a value lies on."""
        while node is not None:
            if self._is_quantizer(node):
                return str(node.target)
            preserving = table.is_grid_preserving(node, self.modules)
            node = table.source(node) if preserving else None
        return None

    def _is_quantizer(self, node: fx.Node) -> bool:
        return isinstance(table.module_of(node, self.modules), ActivationQuantizer)

    def _becomes_levels(self, node: fx.Node) -> bool:
        """Whether a reader, perhaps behind functions of one value, puts the result on a grid."""

        def passes(user: fx.Node) -> bool:
            return table.is_grid_preserving(user, self.modules) or (
                user.op == "call_function" and table.op_name(user) in _FUNCTIONS
            )

        return any(self._is_quantizer(reader) for reader in table.readers([node], passes))


def _same_shape(left: fx.Node, right: fx.Node) -> bool:
    """Whether two values have the same sizes in every call."""
    a, b = info_of(left), info_of(right)
    if not isinstance(a, TensorInfo) or not isinstance(b, TensorInfo) or a.dtype != b.dtype:
        return False
    # (A size may be a number in one and its text in the other.)
    return list(map(str, a.shape)) == list(map(str, b.shape))


def _pair(value: Any) -> list[int]:
    items = [value] if isinstance(value, int) else list(value)
    return items * 2 if len(items) == 1 else items


_MAKERS: dict[str, Callable[[_Steps, fx.Node], fx.Node | None]] = {
    "aten.avg_pool2d.default": _Steps._avg_pool,
    "aten.adaptive_avg_pool2d.default": _Steps._adaptive,
    "aten.mean.dim": _Steps._mean,
    "aten.linalg_vector_norm.default": _Steps._vector_norm,
    "aten.sum.dim_IntList": _Steps._sum,
    "aten.addcmul.default": _Steps._two_lines,
    "aten.group_norm.default": _Steps._group_norm,
    "aten.upsample_bilinear2d.vec": _Steps._bilinear,
    "aten.upsample_bilinear2d.default": _Steps._bilinear,
    "aten.softmax.int": _Steps._softmax,
    "aten._softmax.default": _Steps._softmax,
    "aten.sigmoid.default": _Steps._function,
    "aten.tanh.default": _Steps._function,
    "aten.silu.default": _Steps._function,
    "aten.hardsigmoid.default": _Steps._function,
    "aten.hardswish.default": _Steps._function,
}
