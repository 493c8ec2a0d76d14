"""Multiply-accumulates of a captured model, and which of them stay in float.

Counted are convolutions and products, wherever they come from: layers, products of two computed
tensors, attention, recurrent layers. What is in between (norms, activations, sums) has none.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from adalayer_native.capture.example import Inputs
from adalayer_native.capture.model import GraphModel
from adalayer_native.capture.products import Shape, Shapes, count_of
from adalayer_native.capture.quiet import quiet
from adalayer_native.capture.vocabulary import LAYERS, arguments, op_name
from adalayer_native.plan import float_text

__all__ = ["FloatPart", "FloatWork", "Work", "example_of_model", "float_work", "work_of"]


@dataclass(frozen=True)
class Work:
    """What one node of the graph computes for one sample.

    Attributes:
        node: its name.
        name: of the layer, or of the module of the model that computes it.
        what: in words, for others than layers.
        macs: multiply-accumulates.
        layer: whether it calls a layer (a convolution or product with constant weights).
    """

    node: str
    name: str
    what: str
    macs: float
    layer: bool


@dataclass(frozen=True)
class FloatPart:
    """Something that stays in float.

    Attributes:
        name: of the layer or module.
        reason: why.
        share: of the model's multiply-accumulates, 0 to 1.
    """

    name: str
    reason: str
    share: float


@dataclass(frozen=True)
class FloatWork:
    """What stays in float, the largest share first.

    Attributes:
        parts: with their reasons.
        macs: multiply-accumulates of the whole model for one sample.
    """

    parts: tuple[FloatPart, ...]
    macs: float

    @property
    def share(self) -> float:
        """Share of the multiply-accumulates that stay in float."""
        return sum(part.share for part in self.parts)

    def __bool__(self) -> bool:
        return bool(self.parts)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """By name, JSON values: what a plan and a report keep of it."""
        found: dict[str, dict[str, Any]] = {}
        for part in self.parts:
            entry = found.setdefault(part.name, {"reason": part.reason, "share": 0.0})
            if part.reason not in entry["reason"]:
                entry["reason"] += f", {part.reason}"
            entry["share"] += part.share
        return found

    def __str__(self) -> str:
        return float_text(self.as_dict())


def example_of_model(model: GraphModel) -> Inputs:
    """Arguments as large as those that a model was captured with, all zero.

    Sizes that are not known any more, in a process that the model was sent to, are 2 for the batch
    and 32 for others.
    """
    signature = model.signature
    ports = iter(signature.ports)
    leaves: list[Any] = []
    holders = [node for node in model.graph.nodes if node.op == "placeholder"]
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    for position, node in enumerate(holders):
        if position in signature.constants:
            leaves.append(signature.constants[position])
            continue
        port, value = next(ports), node.meta.get("val")
        known = tuple(value.shape) if isinstance(value, Tensor) else port.shape
        sizes = [_size(size, axis) for axis, size in enumerate(known)]
        leaves.append(torch.zeros(sizes, dtype=port.dtype, device=device))
    args, kwargs = pytree.tree_unflatten(leaves, signature.in_spec)
    return Inputs(tuple(args), dict(kwargs))


def _size(size: Any, axis: int) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint if isinstance(size, torch.SymInt) else None
    return int(hint) if hint is not None else 32 if axis else 2


@torch.no_grad()
def work_of(model: GraphModel, x: Inputs | None = None) -> list[Work]:
    """All nodes with multiply-accumulates, per sample; a layer that is called twice is there twice.

    Args:
        model: in evaluation mode.
        x: a batch, whose sizes count. Default: one as large as the model was captured with.
    """
    x = example_of_model(model) if x is None else x
    shapes = tuple(tuple(tensor.shape) for tensor in x.tensors())
    known = _known.setdefault(model, {})
    if shapes in known:
        return known[shapes]
    moving = _moving(model)
    found = []
    for node, what, macs in _counted(model, model.signature.leaves(x.args, x.kwargs), x.count):
        # What depends on parameters alone is no work for a sample.
        if macs > 0 and node in moving:
            if what == _COMPUTED and not moving.issuperset(node.all_input_nodes):
                what = "a product with a constant that is no matrix of a layer"
            found.append(Work(node.name, _place(node), what, macs / x.count, what == ""))
    known[shapes] = found
    return found


_Sizes = tuple[tuple[int, ...], ...]
_known: weakref.WeakKeyDictionary[GraphModel, dict[_Sizes, list[Work]]]
_known = weakref.WeakKeyDictionary()


def _counted(model: GraphModel, leaves: list[Any], count: int) -> list[tuple[fx.Node, str, float]]:
    """Nodes that multiply, what they are and how much; nothing is computed where shapes will do."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        runner = _Counting(model, count)
        with quiet(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            runner.run(*fake, enable_io_processing=False)
    except Exception:  # an operator that has no shapes without values, whatever it raises
        runner = _Counting(model, count)
        runner.run(*leaves, enable_io_processing=False)
    return runner.found


def _moving(model: GraphModel) -> set[fx.Node]:
    """Values that depend on the inputs."""
    found: set[fx.Node] = set()
    for node in model.graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def float_work(
    model: GraphModel,
    native: Collection[str],
    reasons: Mapping[str, str] | None = None,
    work: list[Work] | None = None,
) -> FloatWork:
    """What a model computes in float when some layers are native.

    Args:
        model: captured.
        native: names of the native layers.
        reasons: why other layers are not; default: the plan says so.
        work: :func:`work_of` the model, if it is at hand.
    """
    work = work_of(model) if work is None else work
    total = sum(each.macs for each in work)
    sums: dict[tuple[str, str], float] = {}
    for each in work:
        if each.layer and each.name in native:
            continue
        reason = each.what
        if each.layer:
            reason = (reasons or {}).get(each.name, "the plan keeps it in float")
        sums[each.name, reason] = sums.get((each.name, reason), 0.0) + each.macs
    parts = [FloatPart(name, reason, macs / total) for (name, reason), macs in sums.items()]
    return FloatWork(tuple(sorted(parts, key=lambda part: -part.share)), total)


def _place(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    return str(node.meta.get("path") or node.name)


class _Counting(fx.Interpreter):
    """Runs a graph and notes what its nodes multiply."""

    def __init__(self, model: GraphModel, count: int) -> None:
        super().__init__(model)
        self.found: list[tuple[fx.Node, str, float]] = []
        self.count = count

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if "macs" in n.meta:
            self.found.append((n, "an excluded submodule", self.count * n.meta["macs"]))
        elif n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            if isinstance(module, LAYERS):
                operand: Any = self.map_nodes_to_values(n.args[0], n)
                self.found.append((n, "", _layer_macs(module, operand, result)))
        elif n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload):
            count = count_of(op_name(n))
            if count is not None:
                given: Any = self.map_nodes_to_values(arguments(n), n)
                macs = float(count(_Given(given, result)))
                self.found.append((n, _words(op_name(n)), macs))
        return result


def _layer_macs(module: nn.Module, operand: Tensor, result: Tensor) -> float:
    weight = module.weight
    assert isinstance(weight, Tensor)
    # Weights per value: in_channels / groups * kh * kw or in_features per output value; a
    # transposed convolution has out_channels / groups * kh * kw per input value.
    values = operand if isinstance(module, nn.ConvTranspose2d) else result
    return float(values.numel() * math.prod(weight.shape[1:]))


class _Given(Shapes):
    """Of tensors themselves."""

    def __init__(self, given: dict[str, Any], result: Any) -> None:
        self.arguments = given
        self.result = self.of(result[0] if isinstance(result, (list, tuple)) else result)

    def of(self, operand: Any) -> Shape:
        return tuple(int(size) for size in operand.shape)


# What is said of operators that multiply outside of layers.
_COMPUTED = "a product of two computed tensors"
_WORDS = {
    "conv3d": "there is no native 3-D convolution",
    "conv_transpose3d": "there is no native 3-D convolution",
    "linear": "a linear layer whose weights are computed",
    "bilinear": "a bilinear product",
    "einsum": "a sum over products of computed tensors",
}


def _words(name: str) -> str:
    kind = name.split(".")[1]
    if kind in _WORDS:
        return _WORDS[kind]
    if "conv" in kind:
        return "a convolution whose weights are computed"
    if "attention" in kind:
        return "attention: products of computed tensors"
    if kind.startswith(("lstm", "gru", "rnn")):
        return "a recurrent layer"
    return _COMPUTED
