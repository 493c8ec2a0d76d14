"""RMS norms: torch's own operator, and the steps that models write it as.

So are vectors of length one, ``x / max(|x|, eps)``, but for the root of the number of elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from adalayer_native.capture.model import TensorInfo, info_of
from adalayer_native.capture.vocabulary import arguments, op_name

__all__ = ["RmsNorm", "rms_norms"]


@dataclass(frozen=True)
class RmsNorm:
    """``operand * rsqrt(mean(operand ** 2) + eps) * weight`` over the last axis.

    Attributes:
        node: the result.
        operand: what is normalised.
        weight: a constant of one axis, or None.
        eps: what is added to the mean.
        inside: the steps in between, which nobody else reads.
        unit: the result is ``operand / max(|operand|, eps)`` instead.
    """

    node: fx.Node
    operand: fx.Node
    weight: fx.Node | None
    eps: float
    inside: frozenset[fx.Node]
    unit: bool = False


def rms_norms(graph: fx.Graph) -> dict[fx.Node, RmsNorm]:
    """By their last node."""
    found = (_operator(node) or _written_out(node) or _unit(node) for node in graph.nodes)
    return {norm.node: norm for norm in found if norm is not None}


def _is(node: object, *names: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) in names


def _operator(node: fx.Node) -> RmsNorm | None:
    if not _is(node, "aten.rms_norm.default"):
        return None
    a = arguments(node)
    if len(a["normalized_shape"]) != 1 or not _is_weight(
        a["weight"], int(a["normalized_shape"][0])
    ):
        return None
    eps = torch.finfo(torch.float32).eps if a["eps"] is None else float(a["eps"])
    return RmsNorm(node, a["input"], a["weight"], eps, frozenset())


def _written_out(inverse: fx.Node) -> RmsNorm | None:
    """From the step that turns the root mean square round."""
    root = _root(inverse)
    if root is None or len(inverse.users) != 1:
        return None
    (scaled,) = inverse.users
    divides = _is(scaled, "aten.div.Tensor") and scaled.args[1] is inverse
    if divides != _is(inverse, "aten.sqrt.default"):
        return None  # x / sqrt(...), and x * the others
    operand = next((item for item in _pair(scaled) if item is not inverse), None)
    if not isinstance(operand, fx.Node) or not (divides or _is(scaled, "aten.mul.Tensor")):
        return None
    steps = list(_steps_to(operand, root))
    if not steps or any(len(step.users) != 1 for step in (*steps, inverse)):
        return None
    eps, info = _eps(root), info_of(operand)
    if eps is None or not isinstance(info, TensorInfo) or info_of(scaled) != info:
        return None
    channels, inside = info.shape[-1], {*steps, inverse}
    readers = list(scaled.users)
    if len(readers) == 1 and _is(readers[0], "aten.mul.Tensor"):
        weight = next((item for item in _pair(readers[0]) if item is not scaled), None)
        if isinstance(weight, fx.Node) and _is_weight(weight, channels):
            return RmsNorm(readers[0], operand, weight, eps, frozenset({*inside, scaled}))
    return RmsNorm(scaled, operand, None, eps, frozenset(inside))


def _unit(node: fx.Node) -> RmsNorm | None:
    """``F.normalize`` along the last axis."""
    if not _is(node, "aten.div.Tensor"):
        return None
    operand, info = node.args[0], info_of(node.args[0])
    steps, step = [], node.args[1]
    while _is(step, "aten.expand_as.default", "aten.expand.default", "aten.clamp_min.default"):
        assert isinstance(step, fx.Node)
        steps.append(step)
        step = step.args[0]
    least = [item.args[1] for item in steps if _is(item, "aten.clamp_min.default")]
    if len(least) != 1 or not isinstance(least[0], (int, float)) or least[0] <= 0:
        return None
    if not _is(step, "aten.linalg_vector_norm.default") or not isinstance(info, TensorInfo):
        return None
    assert isinstance(step, fx.Node)
    a, last = arguments(step), len(info.shape) - 1
    if step.args[0] is not operand or a["ord"] != 2 or a["dtype"] is not None or not a["keepdim"]:
        return None
    if [axis % len(info.shape) for axis in a["dim"] or ()] != [last] or info_of(node) != info:
        return None
    if not isinstance(operand, fx.Node):
        return None
    inside = frozenset((*steps, step))
    if any(not inside.union([node]).issuperset(item.users) for item in inside):
        return None
    return RmsNorm(node, operand, None, float(least[0]), inside, unit=True)


def _pair(node: fx.Node) -> tuple[object, ...]:
    return tuple(node.args[:2])


def _root(node: fx.Node) -> fx.Node | None:
    """What the step takes the root of: the mean with eps."""
    source = node.args[0] if node.args else None
    power = _is(node, "aten.pow.Tensor_Scalar") and node.args[1] == -0.5
    if not (power or _is(node, "aten.rsqrt.default", "aten.sqrt.default")):
        return None
    return source if isinstance(source, fx.Node) else None


def _eps(root: fx.Node) -> float | None:
    if not _is(root, "aten.add.Tensor", "aten.add.Scalar") or root.kwargs:
        return None
    eps = root.args[1]
    return float(eps) if isinstance(eps, (int, float)) and eps > 0 else None


def _steps_to(operand: fx.Node, root: fx.Node) -> Iterator[fx.Node]:
    """The steps from an operand to its mean square with eps; none if these are others."""
    mean = root.args[0] if root.args else None
    if not isinstance(mean, fx.Node) or not _is(mean, "aten.mean.dim"):
        return
    a, info = arguments(mean), info_of(operand)
    last = len(info.shape) - 1 if isinstance(info, TensorInfo) else None
    over = [axis if axis >= 0 or last is None else axis + last + 1 for axis in a["dim"] or ()]
    if over != [last] or not a["keepdim"] or a["dtype"] is not None:
        return
    square = mean.args[0]
    by = (
        _is(square, "aten.square.default")
        or (_is(square, "aten.pow.Tensor_Scalar") and square.args[1] == 2)  # type: ignore[union-attr]
        or (_is(square, "aten.mul.Tensor") and square.args[0] is square.args[1])  # type: ignore[union-attr]
    )
    if by and isinstance(square, fx.Node) and square.args[0] is operand:
        yield from (square, mean, root)


def _is_weight(node: object, channels: object) -> bool:
    """Whether it depends on parameters alone and has one number per channel, or is none."""
    if node is None:
        return True
    if not isinstance(node, fx.Node):
        return False
    info = info_of(node)
    if isinstance(info, TensorInfo):
        shape = info.shape
    elif isinstance(node.meta.get("val"), Tensor):
        shape = tuple(node.meta["val"].shape)
    else:
        return False
    if not shape or shape[-1] != channels or any(size != 1 for size in shape[:-1]):
        return False
    pending = [node]
    while pending:
        item = pending.pop()
        operands = item.all_input_nodes
        if item.op != "get_attr" and (item.op != "call_function" or not operands):
            return False
        pending += operands
    return True
