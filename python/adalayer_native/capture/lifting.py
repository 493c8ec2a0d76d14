"""From functional operators back to modules: layers, batch norms, dropouts under their names.

A layer is what is computed, not what class computed it: any convolution or product with a weight
that depends on parameters alone becomes an ordinary ``nn.Conv2d``, ``nn.ConvTranspose2d`` or
``nn.Linear``, with the weight in effect. So a subclass, ``F.conv2d``, weight normalisation,
pruning hooks, attention's projections and tied weights are all the same to the rooms above.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from adalayer_native.capture import recurrence
from adalayer_native.capture.vocabulary import arguments, module_of, op_name
from adalayer_native.padding import PaddedConv2d, Sides, four_paddings

__all__ = ["Lifter"]

_CONVOLUTIONS = ("aten.conv1d", "aten.conv2d")
_TRANSPOSED = ("aten.conv_transpose1d", "aten.conv_transpose2d")
_PADS = ("aten.pad.default", "aten.constant_pad_nd.default")
_LINEAR = ("aten.linear.default",)
_PRODUCTS = ("aten.mm.default", "aten.matmul.default")
_NORMS = ("aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default")


@dataclass
class _Call:
    """An operator that a module computes.

    Attributes:
        operand: what it reads.
        module: that computes it.
        weight: node of the weight, from which the name comes.
        bias: node of the bias.
        key: equal for calls of the same layer.
    """

    operand: fx.Node
    module: nn.Module
    weight: fx.Node
    bias: fx.Node | None
    key: tuple[Any, ...]


class Lifter:
    """Rewrites one exported graph in place.

    Args:
        module: owner of parameters and buffers.
        model: the model that was exported, for the names under which it holds things.
        marks: modules by the name that a marking operator carries (dropouts).
    """

    def __init__(self, module: fx.GraphModule, model: nn.Module, marks: dict[str, nn.Module]):
        self.module, self.graph = module, module.graph
        self.model = model
        self.marks = marks
        self.values: dict[fx.Node, Tensor | None] = {}
        self.known: dict[tuple[Any, ...], str] = {}
        self.lifted: dict[str, nn.Module] = {}
        self.roots: dict[Any, str] = {}  # by what its inputs contribute, a recurrence's weight
        self.owners = {
            name: {id(t): leaf for leaf, t in _own_tensors(owner)}
            for name, owner in model.named_modules(remove_duplicate=False)
        }

    def run(self) -> dict[str, nn.Module]:
        """Replace operators by calls of modules; the modules by name."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and op_name(node) == recurrence.LAYERS:
                recurrence.expand(self.graph, node, self.value)
        for node in list(self.graph.nodes):
            if node.op != "call_function":
                continue
            if op_name(node) == "adalayer.mark.default":
                self._marked(node)
            elif op_name(node) in _NORMS:
                self._norm(node)
            elif op_name(node) in (recurrence.STATES, recurrence.CELLS):
                self._recurrent(node)
            else:
                call = self._layer(node)
                if call is not None:
                    self._replace(node, call)
        for node in self.graph.nodes:
            module = module_of(node, self.lifted)
            if isinstance(module, recurrence.RecurrentStates):
                module.layer_name = str(next(iter(node.users)).target)
        return self.lifted

    # -- layers -----------------------------------------------------------------------------

    def _layer(self, node: fx.Node) -> _Call | None:
        name = op_name(node)
        kind = name.rpartition(".")[0]
        if kind in _CONVOLUTIONS or kind in _TRANSPOSED:
            return self._convolution(node, kind in _TRANSPOSED)
        if name == "aten.convolution.default":
            return self._convolution(node, bool(arguments(node)["transposed"]))
        if name in _LINEAR:
            a = arguments(node)
            return self._linear(a["input"], a["weight"], a["bias"], transposed=False)
        if name in _PRODUCTS:
            left, right = node.args[:2]
            return self._linear(left, right, None, transposed=True)
        if name == "aten.addmm.default":
            a = arguments(node)
            if a["beta"] == 1 and a["alpha"] == 1:
                return self._linear(a["mat1"], a["mat2"], a["self"], transposed=True)
        return None

    def _parameters(self, weight: Any, bias: Any) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias in effect; None where the inputs decide them."""
        found = self.value(weight)
        if found is None or not found.is_floating_point():
            return None
        if bias is None:
            return found, None
        offset = self.value(bias)
        if offset is None or offset.dim() != 1:
            return None
        return found, offset

    def _convolution(self, node: fx.Node, transposed: bool) -> _Call | None:
        a = arguments(node)
        operand, weight_node, bias_node = a["input"], a["weight"], a["bias"]
        around: Sides = (0, 0, 0, 0)
        if not transposed:
            operand, around = self._without_padding(operand)
        found = self._parameters(weight_node, bias_node)
        if found is None or not isinstance(operand, fx.Node) or self.value(operand) is not None:
            return None
        weight, bias = found
        axes = weight.dim() - 2
        info = operand.meta.get("val")
        if axes not in (1, 2) or not isinstance(info, Tensor) or info.dim() != weight.dim():
            return None
        groups = int(a["groups"])
        stride, dilation = _each(a["stride"], axes), _each(a["dilation"], axes)
        padding = a["padding"]
        if not isinstance(padding, str):
            padding = _each(padding, axes)
        output_padding = _each(a.get("output_padding") or 0, axes)
        if axes == 1:  # an image of height 1
            weight = weight.unsqueeze(2)
            stride, dilation = (1, *stride), (1, *dilation)
            output_padding = (0, *output_padding)
            if not isinstance(padding, str):
                padding = (0, *padding)
        kernel = tuple(weight.shape[2:])
        layer: nn.Module
        if transposed:
            layer = nn.ConvTranspose2d(
                weight.shape[0], weight.shape[1] * groups, kernel, stride, padding,  # type: ignore[arg-type]
                output_padding, groups, bias is not None, dilation, device="meta",  # type: ignore[arg-type]
            )  # fmt: skip
        else:
            layer = nn.Conv2d(
                weight.shape[1] * groups, weight.shape[0], kernel, stride, padding,  # type: ignore[arg-type]
                dilation, groups, bias is not None, device="meta",  # type: ignore[arg-type]
            )  # fmt: skip
            if any(around):
                layer = _padded(layer, around)
        self._fill(layer, weight, bias, (weight_node, bias_node))
        key = (transposed, kernel, stride, padding, around, dilation, output_padding, groups, axes)
        return _Call(operand, layer, weight_node, bias_node, key)

    def _without_padding(self, operand: Any) -> tuple[Any, Sides]:
        """What a convolution reads behind zero padding that stands alone, and how much of it.

        The padding then is the convolution's own, and no image with a margin is ever stored. It
        stays an operation where anything else reads its result.
        """
        around: Sides = (0, 0, 0, 0)
        while isinstance(operand, fx.Node):
            more = _zeros_around(operand)
            if more is None or not all(self._convolves(user, operand) for user in operand.users):
                break
            a, b, c, d = (old + new for old, new in zip(around, more, strict=True))
            around = a, b, c, d
            operand = operand.args[0]
        return operand, around

    def _convolves(self, node: fx.Node, operand: fx.Node) -> bool:
        """Whether a node is a convolution of this operand with a constant weight."""
        if node.op != "call_function":
            # A pad behind this one that a convolution has taken, or a layer of another kind.
            return False
        name = op_name(node)
        if name in _PADS:
            return _zeros_around(node) is not None and all(
                self._convolves(user, node) for user in node.users
            )
        plain = name.rpartition(".")[0] in _CONVOLUTIONS
        if not plain and name == "aten.convolution.default":
            plain = not arguments(node)["transposed"]
        if not plain:
            return False
        a = arguments(node)
        return a["input"] is operand and self.value(a["weight"]) is not None

    def _linear(self, operand: Any, weight: Any, bias: Any, *, transposed: bool) -> _Call | None:
        found = self._parameters(weight, bias)
        if found is None or not isinstance(operand, fx.Node) or self.value(operand) is not None:
            return None
        matrix, offset = found
        if matrix.dim() != 2:
            return None
        if transposed:
            matrix = matrix.t()  # a view: torch's own product of it has the bits of the original
        if offset is not None and offset.shape != matrix.shape[:1]:
            return None
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], offset is not None, device="meta")
        self._fill(layer, matrix, offset, (weight, bias))
        return _Call(operand, layer, weight, bias, ("linear", transposed))

    def _fill(
        self, layer: Any, weight: Tensor, bias: Tensor | None, nodes: tuple[Any, Any]
    ) -> None:
        layer.weight = nn.Parameter(weight.detach(), self._trained(nodes[0]))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), self._trained(nodes[1]))

    def _trained(self, node: fx.Node) -> bool:
        """Whether any parameter behind a value wants a gradient."""
        pending, seen = [node], set()
        while pending:
            item = pending.pop()
            if item in seen:
                continue
            seen.add(item)
            if item.op == "get_attr":
                found = _find(self.module, str(item.target))
                if isinstance(found, nn.Parameter) and found.requires_grad:
                    return True
            pending.extend(item.all_input_nodes)
        return False

    def _replace(self, node: fx.Node, call: _Call) -> None:
        sources = (_origin(call.weight), None if call.bias is None else _origin(call.bias))
        key = (*sources, call.weight, *call.key)
        name = self.known.get(key)
        if name is None:
            name = self._unused(self._layer_name(node, call.weight))
            self.known[key] = name
            self.lifted[name] = call.module
        info = call.operand.meta["val"]
        flat = info.dim() == 3 and isinstance(call.module, (nn.Conv2d, nn.ConvTranspose2d))
        with self.graph.inserting_before(node):
            operand = call.operand
            if flat:
                # torch does the same: a permuted operand would take the kernels of another layout.
                plain = self.graph.call_function(torch.ops.aten.contiguous.default, (operand,))
                _inherit(plain, operand)
                operand = self._derived("unsqueeze", plain, 2)
            new = self.graph.create_node("call_module", name, (operand,))
            _inherit(new, node)
            if flat:
                value = node.meta["val"]
                new.meta["val"] = value.unsqueeze(2)
                new = self._derived("squeeze", new, 2)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def _derived(self, kind: str, operand: fx.Node, axis: int) -> fx.Node:
        aten = torch.ops.aten
        target = aten.unsqueeze.default if kind == "unsqueeze" else aten.squeeze.dim
        new = self.graph.call_function(target, (operand, axis))
        _inherit(new, operand)
        value = operand.meta["val"]
        new.meta["val"] = value.unsqueeze(axis) if kind == "unsqueeze" else value.squeeze(axis)
        return new

    def _layer_name(self, node: fx.Node, weight: fx.Node) -> str:
        """Where the model holds the weight: ``layer1.0.conv1``; or who computed with it."""
        path = _path(node)
        target = _origin(weight)
        if target is None:
            # Where the module has a weight, computed or not; else after what is done.
            own = path != "" and hasattr(_submodule(self.model, path), "weight")
            return path if own else f"{path}.{op_name(node).split('.')[1]}".lstrip(".")
        tensor = _find(self.module, target)
        leaf = self.owners.get(path, {}).get(id(tensor))
        if leaf is not None and _find(self.model, f"{path}.{leaf}".lstrip(".")) is not None:
            target = f"{path}.{leaf}".lstrip(".")
        owner, _, leaf = target.rpartition(".")
        return owner if leaf == "weight" and owner else target

    def _unused(self, name: str) -> str:
        """A name that no other lifted module has, neither above nor below another one.

        Modules are exchanged as a whole, with all that is below them.
        """
        for other in self.lifted:
            if name.startswith(f"{other}."):
                name = f"{other}_{name[len(other) + 1 :].replace('.', '_')}"
        found, count = name, 1
        while found in self.lifted or any(each.startswith(f"{found}.") for each in self.lifted):
            count += 1
            found = f"{name}_{count}"
        return found

    # -- recurrent layers -------------------------------------------------------------------

    def _recurrent(self, node: fx.Node) -> None:
        """The steps between the products of a recurrent layer."""
        a = arguments(node)
        module: nn.Module
        begin = (a["state"], a["cell"])
        operands: tuple[Any, ...]
        if "weight" in a:
            module = recurrence.RecurrentStates(a["kind"], a["reverse"])
            operands, role = (a["products"], *begin), "states"
            target = _origin(a["weight"]) or f"{_path(node)}.weight_hh".lstrip(".")
            self.roots[node.args[0]] = target
        else:
            module = recurrence.RecurrentCells(a["kind"], a["reverse"], a["cells"])
            operands, role = (a["products"], a["recurrent"], *begin), "cells"
            if a["cells"]:
                role = "cell_states"
            target = self.roots[node.args[0]]
        owner, _, leaf = target.rpartition(".")
        leaf = leaf.replace("weight_hh", role) if "weight_hh" in leaf else f"{leaf}_{role}"
        name = self._unused(f"{owner}.{leaf}".lstrip("."))
        self.lifted[name] = module.eval()
        with self.graph.inserting_before(node):
            new = self.graph.create_node("call_module", name, operands)
        _inherit(new, node)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    # -- batch norms and marks --------------------------------------------------------------

    def _norm(self, node: fx.Node) -> None:
        a = arguments(node)
        whole = op_name(node) != "aten.batch_norm.default"
        if not whole and a["training"]:
            return
        tensors = [
            None if a[key] is None else self.value(a[key])
            for key in ("weight", "bias", "running_mean", "running_var")
        ]
        wanted = [a[key] for key in ("weight", "bias", "running_mean", "running_var")]
        if any(t is None and n is not None for t, n in zip(tensors, wanted, strict=True)):
            return
        weight, bias, mean, var = tensors
        if mean is None or var is None:
            return
        operand = a["input"]
        rank = operand.meta["val"].dim()
        kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
        if rank not in kinds:
            return
        name = self._norm_name(node, a["running_mean"])
        norm = kinds[rank](mean.numel(), eps=float(a["eps"]), affine=False)
        old = _submodule(self.model, name)
        norm.momentum = getattr(old, "momentum", float(a["momentum"]))
        for leaf, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                parameter = nn.Parameter(tensor.detach(), self._trained(a[leaf]))
                norm.register_parameter(leaf, parameter)
        norm.affine = weight is not None
        # Copies: training the graph writes into them.
        norm.running_mean, norm.running_var = mean.clone(), var.clone()
        counted = getattr(old, "num_batches_tracked", None)
        if isinstance(counted, Tensor):
            norm.num_batches_tracked = counted.clone()
        key = ("norm", *wanted, rank, a["eps"])
        known = self.known.get(key)
        if known is None:
            known = self._unused(name)
            self.known[key] = known
            self.lifted[known] = norm.eval()
        result = node
        if whole:
            readers = [user for user in node.users if user.args[1] == 0]
            if not readers:
                return
            result = readers[0]
        with self.graph.inserting_before(node):
            new = self.graph.create_node("call_module", known, (operand,))
        _inherit(new, result)
        result.replace_all_uses_with(new)
        if whole:
            for user in list(node.users):
                self.graph.erase_node(user)
        self.graph.erase_node(node)

    def _norm_name(self, node: fx.Node, mean: fx.Node) -> str:
        target = _origin(mean)
        if target is None:
            return _path(node) or node.name
        return target.rpartition(".")[0] or _path(node) or node.name

    def _marked(self, node: fx.Node) -> None:
        """A module that is kept as it is: a dropout."""
        operand, mark = node.args[:2]
        key = ("mark", mark)
        name = self.known.get(key)
        if name is None:
            name = self.known[key] = self._unused(str(mark))
            self.lifted[name] = copy.deepcopy(self.marks[str(mark)]).eval()
        with self.graph.inserting_before(node):
            new = self.graph.create_node("call_module", name, (operand,))
        _inherit(new, node)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    # -- values that depend on parameters alone ---------------------------------------------

    def value(self, node: Any) -> Tensor | None:
        """A tensor that does not depend on the inputs, computed; None for others."""
        if not isinstance(node, fx.Node):
            return None
        pending = [node]
        while pending:
            item = pending[-1]
            if item in self.values:
                pending.pop()
                continue
            if item.op == "get_attr":
                found = _find(self.module, str(item.target))
                self.values[item] = found.detach() if isinstance(found, Tensor) else None
                continue
            sources = item.all_input_nodes
            if item.op != "call_function" or (not sources and op_name(item) not in _FACTORIES):
                self.values[item] = None
                continue
            missing = [s for s in sources if s not in self.values]
            if missing:
                pending.extend(missing)
                continue
            self.values[item] = self._computed(item)
        return self.values[node]

    def _computed(self, node: fx.Node) -> Tensor | None:
        held = {s: self.values[s] for s in node.all_input_nodes}
        if any(value is None for value in held.values()):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), held.__getitem__)
        assert callable(node.target)
        with torch.no_grad():
            result: Any = node.target(*args, **kwargs)
        return result  # also tuples, which getitem takes apart


_FACTORIES = frozenset(
    f"aten.{name}"
    for name in ("full.default", "zeros.default", "ones.default", "arange.default",
                 "arange.start", "arange.start_step", "eye.default", "scalar_tensor.default")
)  # fmt: skip


def _zeros_around(node: fx.Node) -> Sides | None:
    """``(top, left, bottom, right)`` of a node that pads images or rows with zeros, else None."""
    if node.op != "call_function" or op_name(node) not in _PADS:
        return None
    a = arguments(node)
    info = a["self"].meta.get("val")
    if a.get("mode", "constant") != "constant" or a.get("value") not in (None, 0):
        return None
    amounts = list(a["pad"])  # of the last axis first
    axes = info.dim() - 2 if isinstance(info, Tensor) else 0
    if axes not in (1, 2) or any(type(n) is not int or n < 0 for n in amounts):
        return None  # sizes that the input decides, or a crop
    left, right, top, bottom, *others = [*amounts, 0, 0, 0, 0]
    if any(others) or (axes == 1 and (top or bottom)):
        return None
    return top, left, bottom, right


def _padded(layer: nn.Conv2d, around: Sides) -> nn.Conv2d:
    """A convolution with more zeros around its input than it has itself."""
    own = four_paddings(layer)
    top, left, bottom, right = (old + new for old, new in zip(own, around, strict=True))
    return PaddedConv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride,
        layer.padding, layer.dilation, layer.groups, layer.bias is not None,
        device="meta", sides=(top, left, bottom, right),
    )  # fmt: skip


def _each(value: Any, axes: int) -> tuple[int, ...]:
    items: Sequence[Any] = [value] if isinstance(value, int) else list(value)
    numbers = tuple(int(item) for item in items)
    return numbers * axes if len(numbers) == 1 else numbers


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    found = [*module._parameters.items(), *module._buffers.items()]
    return [(name, tensor) for name, tensor in found if tensor is not None]


def _find(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    found = _find(model, name) if name else model
    return found if isinstance(found, nn.Module) else None


def _origin(node: fx.Node) -> str | None:
    """The parameter that a value is a view of; None if it is computed."""
    views = ("transpose.int", "t.default", "permute.default", "view.default", "detach.default",
             "alias.default", "slice.Tensor", "select.int", "unsqueeze.default", "squeeze.dim",
             "reshape.default", "clone.default")  # fmt: skip
    allowed = {f"aten.{name}" for name in views} | {"getitem"}
    splits = {"aten.split.Tensor", "aten.chunk.default", "aten.split_with_sizes.default",
              "aten.unbind.int"}  # fmt: skip
    while node.op == "call_function" and op_name(node) in allowed | splits:
        first = node.args[0]
        assert isinstance(first, fx.Node)
        node = first
    return str(node.target) if node.op == "get_attr" else None


def _path(node: fx.Node) -> str:
    """The innermost module that computed a node, as the model calls it."""
    return str(node.meta.get("path", ""))


def _inherit(new: fx.Node, old: fx.Node) -> None:
    new.meta.update({key: old.meta[key] for key in ("val", "path", "leaf") if key in old.meta})
