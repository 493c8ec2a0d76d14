"""Operators that compute element by element, comparisons, sums along axes."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from adalayer_native.onnx import functions
from adalayer_native.onnx.building import Builder, NodeView, Refused, operator_of
from adalayer_native.onnx.package import onnx_package
from adalayer_native.onnx.values import Constant, Size, Value, larger, quotient, smaller

__all__ = ["SMALL", "as_sizes", "torch_dtype"]

SMALL = {"INT4": torch.int8, "UINT4": torch.uint8, "INT2": torch.int8, "UINT2": torch.uint8}
"""Integers that torch has no operators for, and what holds them."""

_UNARY: dict[str, Any] = {
    "Abs": torch.abs, "Acos": torch.acos, "Asin": torch.asin, "Atan": torch.atan,
    "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp,
    "Floor": torch.floor, "HardSwish": F.hardswish, "IsNaN": torch.isnan, "Log": torch.log,
    "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign,
    "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": F.softplus, "Softsign": F.softsign,
    "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip
_BINARY: dict[str, Any] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Pow": torch.pow, "Equal": torch.eq,
    "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le,
    "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
}  # fmt: skip
_OF_SIZES: dict[str, Any] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": np.frompyfunc(quotient, 2, 1),
    "Mod": lambda a, b: a % b,
    "Min": np.frompyfunc(smaller, 2, 1),
    "Max": np.frompyfunc(larger, 2, 1),
}


def torch_dtype(kind: int) -> torch.dtype:
    """torch's type for a number of ONNX's.

    Raises:
        Refused: torch has none.
    """
    name = onnx_package().TensorProto.DataType.Name(kind)
    names = {"FLOAT": "float32", "DOUBLE": "float64"}
    found = getattr(torch, names.get(name, name.lower()), None)
    # (torch has names for integers of 2 and 4 bits, and no operators.)
    if not isinstance(found, torch.dtype) or name in SMALL:
        raise Refused(f"elements of type {name} are not supported")
    return found


def as_sizes(value: Any) -> np.ndarray | None:
    """Whole numbers as an object array; None where the network computes them."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, Constant) and not value.tensor.is_floating_point():
        return np.array(value.tensor.tolist(), dtype=object)
    return None


def _as_tensor(g: Builder, sizes: np.ndarray) -> Any:
    """Whole numbers as a tensor: a constant where no input decides any."""
    if any(isinstance(item, Size) for item in sizes.flat):
        return g.tensor(sizes)
    return Constant(torch.tensor(sizes.tolist(), dtype=torch.int64))


def _operand(other: Any, value: Any) -> Any:
    """What torch gets beside ``value``: a constant of one element is a number."""
    single = isinstance(value, Constant) and value.tensor.numel() == 1
    if single and isinstance(other, Value) and value.rank <= other.rank:
        return value if value.tensor.dtype == torch.bool else value.tensor.item()
    return value


@operator_of(*_UNARY)
def _unary(g: Builder, node: NodeView, x: Any) -> Any:
    if isinstance(x, np.ndarray):
        if node.kind == "Neg":
            return np.asarray(-x, dtype=object)
        x = _as_tensor(g, x)
    if node.kind == "Sign" and _dtype(x).is_floating_point:  # torch's says 0 of what is no number
        return g.call(torch.where, g.call(torch.isnan, x), x, g.call(torch.sign, x))
    return g.call(_UNARY[node.kind], x)


@operator_of(*_BINARY, "Div", "Mod", "BitShift")
def _binary(g: Builder, node: NodeView, a: Any, b: Any) -> Any:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        left, right = as_sizes(a), as_sizes(b)
        if left is not None and right is not None:
            if node.kind in _OF_SIZES and not node.get("fmod"):
                return np.asarray(_OF_SIZES[node.kind](left, right), dtype=object)
            if node.kind == "Equal":
                alike = np.frompyfunc(_alike, 2, 1)(left, right)
                if not any(item is None for item in np.asarray(alike).flat):
                    return Constant(torch.tensor(np.asarray(alike).tolist(), dtype=torch.bool))
        a, b = (_as_tensor(g, item) if isinstance(item, np.ndarray) else item for item in (a, b))
    kind = _dtype(a)
    floats = kind.is_floating_point
    a, b = _operand(b, a), _operand(a, b)
    if node.kind == "Div":
        return g.call(torch.div, a, b) if floats else g.call(torch.div, a, b, rounding_mode="trunc")
    if node.kind == "Mod":
        return g.call(torch.fmod if node.get("fmod") else torch.remainder, a, b)
    if node.kind == "BitShift":
        left_shift = node.get("direction") == "LEFT"
        return g.call(torch.bitwise_left_shift if left_shift else torch.bitwise_right_shift, a, b)
    if node.kind == "Pow":
        found = g.call(torch.pow, *_tensor_first("Pow", a, b))
        return found if _dtype(found) == kind else g.call(torch.Tensor.to, found, kind)
    return g.call(_BINARY[node.kind], *_tensor_first(node.kind, a, b))


def _alike(a: Any, b: Any) -> bool | None:
    """Whether whole numbers are equal; None where an input decides. No size is below 0."""
    if a is b:
        return True
    if isinstance(a, Size) or isinstance(b, Size):
        other = b if isinstance(a, Size) else a
        return False if not isinstance(other, Size) and other < 0 else None
    return bool(a == b)


def _tensor_first(kind: str, a: Any, b: Any) -> tuple[Any, Any]:
    """Some of torch's functions take a number as the second operand only."""
    if isinstance(a, (int, float)) and kind in ("Add", "Mul", "Equal"):
        return b, a
    if isinstance(a, (int, float)) and kind != "Sub":
        return Constant(torch.tensor(a)), b
    return a, b


def _dtype(value: Any) -> torch.dtype:
    found = value.fake.dtype if isinstance(value, Value) else value.tensor.dtype
    assert isinstance(found, torch.dtype)
    return found


@operator_of("Max", "Min", "Sum", "Mean")
def _several(g: Builder, node: NodeView, *operands: Any) -> Any:
    function = {"Max": torch.maximum, "Min": torch.minimum}.get(node.kind, torch.add)
    if any(isinstance(item, np.ndarray) for item in operands):
        lists = [as_sizes(item) for item in operands]
        if node.kind in _OF_SIZES and all(item is not None for item in lists):
            return np.asarray(functools.reduce(_OF_SIZES[node.kind], lists), dtype=object)
        operands = tuple(
            _as_tensor(g, item) if isinstance(item, np.ndarray) else item for item in operands
        )
    found = operands[0]
    for item in operands[1:]:
        left, right = found, item
        if function is torch.add:
            left, right = _tensor_first("Add", _operand(right, left), _operand(left, right))
        found = g.call(function, left, right)
    return g.call(torch.div, found, len(operands)) if node.kind == "Mean" else found


@operator_of("Where")
def _where(g: Builder, node: NodeView, condition: Any, a: Any, b: Any) -> Any:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        left, right = as_sizes(a), as_sizes(b)
        if isinstance(condition, Constant) and left is not None and right is not None:
            return np.where(condition.tensor.numpy(), left, right)
    a, b, condition = (
        _as_tensor(g, item) if isinstance(item, np.ndarray) else item for item in (a, b, condition)
    )
    return g.call(torch.where, condition, a, b)


@operator_of("Clip")
def _clip(g: Builder, node: NodeView, x: Any, low: Any = None, high: Any = None) -> Any:
    bounds = []
    for name, bound in (("min", low), ("max", high)):
        if bound is None:  # opset 10 has them as attributes
            bounds.append(node.get(name))
        else:
            bounds.append(g.known(bound, name).item())
    if bounds == [None, None]:
        return x
    return g.call(torch.clamp, x, *bounds)


@operator_of("LeakyRelu", "Elu", "Celu", "ThresholdedRelu")
def _with_alpha(g: Builder, node: NodeView, x: Any) -> Any:
    alpha = node.get("alpha", 0.01 if node.kind == "LeakyRelu" else 1.0)
    if node.kind == "ThresholdedRelu":
        return g.call(torch.where, g.call(torch.gt, x, alpha), x, 0.0)
    function = {"LeakyRelu": F.leaky_relu, "Elu": F.elu, "Celu": F.celu}[node.kind]
    return g.call(function, x, alpha)


@operator_of("Selu")
def _selu(g: Builder, node: NodeView, x: Any) -> Any:
    alpha, gamma = 1.67326319217681884765625, 1.05070102214813232421875
    if (
        abs(node.get("alpha", alpha) - alpha) < 1e-6
        and abs(node.get("gamma", gamma) - gamma) < 1e-6
    ):
        return g.call(F.selu, x)
    return g.call(torch.mul, g.call(F.elu, x, node.get("alpha", alpha)), node.get("gamma", gamma))


@operator_of("HardSigmoid")
def _hard_sigmoid(g: Builder, node: NodeView, x: Any) -> Any:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return g.call(F.hardsigmoid, x)
    line = g.call(torch.add, g.call(torch.mul, x, alpha), beta)
    return g.call(torch.clamp, line, 0.0, 1.0)


@operator_of("Gelu")
def _gelu(g: Builder, node: NodeView, x: Any) -> Any:
    return g.call(F.gelu, x, approximate=node.get("approximate", "none"))


@operator_of("Swish")
def _swish(g: Builder, node: NodeView, x: Any) -> Any:
    alpha = node.get("alpha", 1.0)
    if alpha == 1.0:
        return g.call(F.silu, x)
    return g.call(torch.mul, x, g.call(torch.sigmoid, g.call(torch.mul, x, alpha)))


@operator_of("PRelu")
def _prelu(g: Builder, node: NodeView, x: Value, slope: Any) -> Any:
    weight = g.known(slope, "slope")
    channels = [axis for axis, size in enumerate(weight.shape) if size != 1]
    along = x.rank - weight.dim() + channels[0] if channels else 1
    if x.rank >= 2 and len(channels) <= 1 and along == 1:
        return g.call(F.prelu, x, Constant(weight.flatten(), getattr(slope, "name", "")))
    scaled = g.call(torch.mul, x, slope)
    return g.call(torch.where, g.call(torch.lt, x, 0), scaled, x)


@operator_of("Softmax", "LogSoftmax")
def _softmax(g: Builder, node: NodeView, x: Value) -> Any:
    log = node.kind == "LogSoftmax"
    if node.opset >= 13:
        return g.call(torch.log_softmax if log else torch.softmax, x, node.get("axis", -1))
    axis = node.get("axis", 1) % x.rank
    if axis == x.rank - 1:
        return g.call(torch.log_softmax if log else torch.softmax, x, axis)
    return g.call(functions.softmax_flat, x, axis, log)


@operator_of("Cast")
def _cast(g: Builder, node: NodeView, x: Any) -> Any:
    dtype = torch_dtype(node.get("to"))
    if isinstance(x, np.ndarray):
        if not dtype.is_floating_point and dtype != torch.bool:
            return x
        x = _as_tensor(g, x)
    return x if _dtype(x) == dtype else g.call(torch.Tensor.to, x, dtype)


@operator_of("CastLike")
def _cast_like(g: Builder, node: NodeView, x: Any, like: Any) -> Any:
    return g.call(torch.Tensor.to, g.tensor(x) if isinstance(x, np.ndarray) else x, _dtype(like))


@operator_of("Identity", "Dropout", quantized=True)
def _identity(g: Builder, node: NodeView, x: Any, *ratio_and_mode: Any) -> Any:
    training = ratio_and_mode[1] if len(ratio_and_mode) > 1 else None
    if training is not None and bool(g.known(training, "training mode")):
        raise Refused("it drops values, as in training; expected a network for inference")
    if len([name for name in node.outputs if name]) > 1:
        return x, g.call(torch.ones_like, x, dtype=torch.bool)
    return x


_REDUCTIONS = ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp")


@operator_of(*(f"Reduce{name}" for name in _REDUCTIONS))
def _reduce(g: Builder, node: NodeView, x: Any, axes: Any = None) -> Any:
    if isinstance(x, np.ndarray):
        if node.kind == "ReduceProd":
            total = math.prod(x.flat)
            return np.array([total] if node.get("keepdims", 1) else total, dtype=object)
        x = g.tensor(x)
    along = node.get("axes") if axes is None else g.sizes(axes, "axes")
    kind = node.kind.removeprefix("Reduce")
    if not along:
        if node.get("noop_with_empty_axes"):  # one element each, of which some are a function
            return _reduced_alone(g, kind, x)
        along = list(range(x.rank))
    dims, keep = [axis % x.rank for axis in along], bool(node.get("keepdims", 1))
    if kind == "Mean":
        return g.call(torch.mean, x, dims, keep)
    if kind in ("Max", "Min"):
        if _dtype(x) == torch.bool:
            raise Refused("its operand is of type bool")
        return g.call(torch.amax if kind == "Max" else torch.amin, x, dims, keep)
    whole = None if _dtype(x).is_floating_point else _dtype(x)  # torch's sums are int64
    if kind == "Prod":
        for axis in sorted(dims, reverse=True):
            x = g.call(torch.prod, x, axis, keep, dtype=whole)
        return x
    if kind == "LogSumExp":
        return g.call(torch.logsumexp, x, dims, keep)
    terms = {
        "L1": lambda: g.call(torch.abs, x),
        "L2": lambda: g.call(torch.square, x),
        "SumSquare": lambda: g.call(torch.square, x),
    }.get(kind, lambda: x)()
    total = g.call(torch.sum, terms, dims, keep, dtype=whole)
    if kind == "L2":
        return g.call(torch.sqrt, total)
    return g.call(torch.log, total) if kind == "LogSum" else total


def _reduced_alone(g: Builder, kind: str, x: Any) -> Any:
    if kind in ("L1", "L2"):
        return g.call(torch.abs, x)
    if kind == "SumSquare":
        return g.call(torch.square, x)
    return g.call(torch.log, x) if kind == "LogSum" else x


@operator_of("ArgMax", "ArgMin")
def _arg(g: Builder, node: NodeView, x: Any) -> Any:
    if node.get("select_last_index"):
        raise Refused("it wants the last of several equal elements (select_last_index)")
    function = torch.argmax if node.kind == "ArgMax" else torch.argmin
    return g.call(function, x, node.get("axis", 0), bool(node.get("keepdims", 1)))


@operator_of("CumSum")
def _cumsum(g: Builder, node: NodeView, x: Any, axis: Any) -> Any:
    along = int(g.known(axis, "axis"))
    back = bool(node.get("reverse"))
    part = g.call(torch.flip, x, [along]) if back else x
    total = g.call(torch.cumsum, part, along, dtype=_dtype(x))
    if node.get("exclusive"):  # without the element itself
        total = g.call(torch.sub, total, part)
    return g.call(torch.flip, total, [along]) if back else total
