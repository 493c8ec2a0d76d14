"""The operations of recipes: each is a piece of a forward as people write it.

Every function takes values (tensors) and parts (modules, parameters) first and constants by name.
Those that return nothing write into their first operand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OPS: dict[str, Callable[..., Any]] = {}


def op(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function an operation of recipes."""
    OPS[function.__name__] = function
    return function


# ---- modules ------------------------------------------------------------------------------------


@op
def call(module: nn.Module, *values: Tensor) -> Any:
    return module(*values)


@op
def call_by_keyword(module: nn.Module, x: Tensor) -> Any:
    return module(input=x)


@op
def attend(module: nn.MultiheadAttention, x: Tensor, context: Tensor, *, weights: bool) -> Any:
    if not module.batch_first:
        x, context = x.transpose(0, 1), context.transpose(0, 1)
    found, shares = module(x, context, context, need_weights=weights)
    found = found if module.batch_first else found.transpose(0, 1)
    return (found, shares) if weights else found


@op
def recur(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)[0]


# ---- functions with parameters of one's own -----------------------------------------------------


@op
def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **words: Any) -> Tensor:
    return F.conv2d(x, weight, bias, **words)


@op
def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **words: Any) -> Tensor:
    return F.conv1d(x, weight, bias, **words)


@op
def conv_transpose2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **words: Any) -> Tensor:
    return F.conv_transpose2d(x, weight, bias, **words)


@op
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


@op
def addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1.0) -> Tensor:
    return torch.addmm(bias, x, weight.t(), beta=beta)


@op
def matmul(x: Tensor, weight: Tensor, *, form: str) -> Tensor:
    if form == "@":
        return x @ weight.t()
    if form == "einsum":
        return torch.einsum("b...i,oi->b...o", x, weight)
    return torch.matmul(weight, x.transpose(-2, -1)).transpose(-2, -1)


@op
def linear_with_weight_of(x: Tensor, module: nn.Module, *, turned: bool) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return F.linear(x, weight.t() if turned else weight)


@op
def conv_with_weight_of(x: Tensor, module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return F.conv2d(x, module.weight * 0.5, padding=1)


@op
def scaled_by_weight_of(x: Tensor, module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return x * (module.weight.abs().mean() + 0.5)


@op
def shifted_by_bias_of(x: Tensor, module: nn.Module) -> Tensor:
    assert isinstance(module.bias, Tensor)
    return x + module.bias.mean()


@op
def batch_norm(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, False, 0.1, 1e-3)


@op
def group_norm(x: Tensor, weight: Tensor, bias: Tensor, *, groups: int) -> Tensor:
    return F.group_norm(x, groups, weight, bias)


@op
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


@op
def rms_norm(x: Tensor, weight: Tensor, *, form: str) -> Tensor:
    if form == "operator":
        return F.rms_norm(x, x.shape[-1:], weight, 1e-5)
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * scaled if form == "weight first" else scaled * weight


@op
def add_positions(x: Tensor, table: Tensor) -> Tensor:
    return x + table[:, : x.shape[1]]


@op
def pick(x: Tensor, order: Tensor, *, axis: int, form: str) -> Tensor:
    if form == "index_select":
        return x.index_select(axis, order)
    return x[(slice(None),) * axis + (order,)]


# ---- functions of values ------------------------------------------------------------------------

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "relu_method": lambda x: x.relu(), "torch.relu": torch.relu, "relu6": F.relu6,
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "hardtanh": F.hardtanh,
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "softplus": F.softplus, "elu": F.elu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2), "mish": F.mish, "abs": torch.abs,
    "square": torch.square, "root": lambda x: (x.abs() + 0.1).sqrt(), "neg": lambda x: -x,
    "clamp": lambda x: x.clamp(-0.5, 1.0), "clamp_min": lambda x: x.clamp(min=-0.25),
    "log1p": lambda x: x.abs().log1p(), "decay": lambda x: torch.exp(-x.abs()), "sin": torch.sin,
    "dropout": lambda x: F.dropout(x, 0.5, training=False), "softsign": F.softsign,
    "clone": torch.clone, "double": lambda x: (x.double() * 0.3).float(),
    "normalize": lambda x: F.normalize(x, dim=1, eps=0.5),
    "leaky_where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0), "logsigmoid": F.logsigmoid,
    "standardise": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 0.5),
}  # fmt: skip


@op
def unary(x: Tensor, *, name: str) -> Tensor:
    return UNARY[name](x)


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y,
    "/": lambda x, y: x / (1 + y.abs()), "maximum": torch.maximum, "minimum": torch.minimum,
    "add_alpha": lambda x, y: torch.add(x, y, alpha=0.5), "lerp": lambda x, y: x.lerp(y, 0.25),
    "sub_alpha": lambda x, y: x.sub(y, alpha=2),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.25),
    "where": lambda x, y: torch.where(x > y, x, y), "gate": lambda x, y: x * torch.sigmoid(y),
    "method_add": lambda x, y: x.add(y), "torch.add": torch.add,
}  # fmt: skip


@op
def binary(x: Tensor, y: Tensor, *, name: str) -> Tensor:
    return BINARY[name](x, y)


SCALAR: dict[str, Callable[[Tensor, float], Tensor]] = {
    "+": lambda x, s: x + s, "-": lambda x, s: x - s, "s-": lambda x, s: s - x,
    "*": lambda x, s: x * s, "s*": lambda x, s: s * x, "/": lambda x, s: x / s,
    "**": lambda x, s: x**2 * s, "add": lambda x, s: torch.add(x, s), "mul": lambda x, s: x.mul(s),
}  # fmt: skip


@op
def scalar(x: Tensor, *, name: str, value: float) -> Tensor:
    return SCALAR[name](x, value)


CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor": lambda x: x + torch.tensor(0.5),
    "listed": lambda x: x * torch.tensor([0.5, 1.5])[1],
    "ones": lambda x: x + 0.5 * torch.ones(x.shape[1:]),
    "batched": lambda x: torch.zeros(x.shape[0], *x.shape[1:]) + x,
    "arange": lambda x: x + torch.arange(x.shape[-1]) / x.shape[-1],
    "linspace": lambda x: x * torch.linspace(0.5, 1.0, x.shape[-1]),
    "full_like": lambda x: x - torch.full_like(x, 0.25),
    "new_tensor": lambda x: x * x.new_tensor(0.75),
    "new_full": lambda x: x + x.new_full((1, *x.shape[1:]), 0.25),
    "eye": lambda x: x @ (torch.eye(x.shape[-1]) * 0.5),
    "triangle": lambda x: x @ torch.ones(x.shape[-1], x.shape[-1]).tril() * 0.25,
}


@op
def constant(x: Tensor, *, name: str) -> Tensor:
    """A constant that is made in the forward."""
    return CONSTANTS[name](x)


@op
def softmax(x: Tensor, *, axis: int, log: bool) -> Tensor:
    return F.log_softmax(x, axis) if log else F.softmax(x, dim=axis)


@op
def softmax_masked(x: Tensor, mask: Tensor, *, fill: float) -> Tensor:
    """Softmax over tokens of which a mask says which count."""
    return x.transpose(1, 2).masked_fill(~mask[:, None, :], fill).softmax(-1).transpose(1, 2)


@op
def mask_out(x: Tensor, mask: Tensor) -> Tensor:
    return x * mask.unsqueeze(-1) if mask.dim() < x.dim() else torch.where(mask, x, 0.5)


@op
def reduce(x: Tensor, *, name: str, axes: tuple[int, ...], keep: bool) -> Tensor:
    return getattr(x, name)(axes, keepdim=keep)


@op
def concat(*values: Tensor, axis: int) -> Tensor:
    return torch.cat(values, dim=axis)


@op
def with_token(x: Tensor, token: Tensor, *, axis: int, form: str) -> Tensor:
    rows = token.expand(x.shape[0], *token.shape[1:])
    pieces = {"first": (rows, x), "last": (x, rows), "both": (rows, x, rows * 0.5)}
    if form == "zeros":
        return torch.cat([x, x.new_zeros(x.shape[0], *token.shape[1:])], axis)
    return torch.cat(pieces[form], axis)


@op
def stack(*values: Tensor, form: str) -> Tensor:
    found = torch.stack(values, dim=1)
    if form == "flatten":
        return found.flatten(1, 2)
    return found.sum(1) if form == "sum" else found.mean(dim=1)


@op
def pad(x: Tensor, *, sides: tuple[int, ...], mode: str, value: float) -> Tensor:
    if mode == "constant":
        return F.pad(x, sides, value=value)
    return F.pad(x, sides, mode=mode)


@op
def resize(x: Tensor, *, size: tuple[int, int] | None, scale: float | None, mode: str) -> Tensor:
    words = {"align_corners": False} if mode == "bilinear" else {}
    return F.interpolate(x, size, scale, mode, **words)


@op
def patches(x: Tensor, *, size: int, stride: int) -> Tensor:
    return F.unfold(x, size, stride=stride)


@op
def pool(x: Tensor, *, name: str, size: int) -> Tensor:
    return getattr(F, name)(x, size)


@op
def from_bytes(x: Tensor, *, form: str) -> Tensor:
    if form == "divide":
        return x / 255
    return (x.float() if form == "float" else x.to(torch.float32)).div(127.5).sub(1)
