"""Operations that look at memory in another way, and those that write into it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import op

# ---- views --------------------------------------------------------------------------------------


@op
def permute(x: Tensor, *, order: tuple[int, ...]) -> Tensor:
    return x.permute(order)


@op
def transpose(x: Tensor, *, axes: tuple[int, int]) -> Tensor:
    return x.transpose(*axes)


@op
def reshape(x: Tensor, *, shape: tuple[int, ...], form: str) -> Tensor:
    if form == "view":
        return x.view(x.size(0), *shape)
    return x.reshape(-1, *shape) if form == "reshape" else x.unflatten(1, shape)


@op
def flatten(x: Tensor, *, start: int) -> Tensor:
    return torch.flatten(x, start)


@op
def unsqueeze_squeeze(x: Tensor) -> Tensor:
    return F.relu(x.unsqueeze(1)).squeeze(1)


@op
def flip(x: Tensor, *, axis: int) -> Tensor:
    return x.flip(axis)


@op
def roll(x: Tensor, *, axis: int, by: int) -> Tensor:
    return torch.roll(x, by, axis)


@op
def expand(x: Tensor, *, axis: int, size: int) -> Tensor:
    sizes = [-1] * x.dim()
    sizes[axis] = size
    return x.expand(*sizes)


@op
def repeat(x: Tensor, *, axis: int) -> Tensor:
    return x.repeat_interleave(2, dim=axis)


@op
def cut(x: Tensor, *, axis: int, start: int, stop: int, step: int) -> Tensor:
    return x[(slice(None),) * axis + (slice(start, stop, step),)]


@op
def narrow(x: Tensor, *, axis: int, start: int, length: int) -> Tensor:
    return x.narrow(axis, start, length)


@op
def select(x: Tensor, *, axis: int, index: int) -> Tensor:
    return x.select(axis, index)


@op
def contiguous(x: Tensor, *, form: str) -> Tensor:
    if form == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous() if form == "plain" else x.to(torch.float32)


@op
def chunk(x: Tensor, *, count: int, axis: int) -> tuple[Tensor, ...]:
    return x.chunk(count, dim=axis)


@op
def split(x: Tensor, *, sizes: tuple[int, ...], axis: int) -> tuple[Tensor, ...]:
    return torch.split(x, sizes, dim=axis)


@op
def unbind(x: Tensor, *, axis: int) -> tuple[Tensor, ...]:
    return x.unbind(axis)


@op
def detach(x: Tensor) -> Tensor:
    return x.detach()


# ---- writing ------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda x: x.add_(0.5), "mul_": lambda x: x.mul_(0.5), "relu_": lambda x: x.relu_(),
    "F.relu": lambda x: F.relu(x, inplace=True), "torch.relu_": lambda x: torch.relu_(x),
    "clamp_": lambda x: x.clamp_(-0.5, 0.75), "neg_": lambda x: x.neg_(),
    "sigmoid_": lambda x: x.sigmoid_(), "hardtanh": lambda x: F.hardtanh(x, inplace=True),
    "silu": lambda x: F.silu(x, inplace=True), "leaky": lambda x: F.leaky_relu_(x, 0.1),
    "sub_": lambda x: torch.Tensor.sub_(x, 0.25), "div_": lambda x: x.div_(2.0),
    "masked_fill_": lambda x: x.masked_fill_(x < 0.25, 0.25), "fill_": lambda x: x.fill_(0.5),
    "set_masked": lambda x: x.__setitem__(x > 0.5, 0.5),
}  # fmt: skip


@op
def write(x: Tensor, *, name: str) -> None:
    WRITES[name](x)


@op
def write_and_return(x: Tensor, *, name: str) -> object:
    return WRITES[name](x)


@op
def write_tensor(x: Tensor, y: Tensor, *, name: str) -> None:
    if name == "+=":
        x += y
    elif name == "*=":
        x *= y
    elif name == "-=":
        x -= y
    elif name == "copy_":
        x.copy_(y)
    else:
        x.add_(y, alpha=0.5)


@op
def assign(x: Tensor, y: Tensor | None = None, *, axis: int, start: int, stop: int) -> None:
    where = (slice(None),) * axis + (slice(start, stop),)
    x[where] = 0.5 if y is None else y[where]


@op
def assign_ends(x: Tensor, *, form: str) -> None:
    if form == "last":
        x[..., -1] = 0.25
    elif form == "every second":
        x[:, ::2] *= 0.5
    elif form == "ellipsis":
        x[..., 0] += 1
    else:
        x[:] = x * 0.5


# A view, and what is written through it: the value itself changes.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: x.flatten(1),
    "view": lambda x: x.view(x.shape[0], -1),
    "transpose": lambda x: x.transpose(1, -1),
    "select": lambda x: x[:, 0],
    "slice": lambda x: x[:, :1],
    "chunk": lambda x: x.chunk(2, 1)[0],
    "last": lambda x: x[..., -1:],
    "permute": lambda x: x.movedim(1, -1),
    "unsqueeze": lambda x: x.unsqueeze(0)[0],
    "view_of_view": lambda x: x[:, :1].transpose(1, -1)[..., 0],
    "detach": lambda x: x.detach(),
    "expand_none": lambda x: x.expand_as(x),
    "narrow": lambda x: x.narrow(1, 0, 1),
}


@op
def write_through(x: Tensor, *, view: str, name: str) -> None:
    WRITES[name](VIEWS[view](x))


@op
def read_around_write(x: Tensor, *, name: str) -> Tensor:
    """A view that was taken before the write shows what was written; the product does not."""
    view = x[:, :1]
    product = view * 2.0
    WRITES[name](x)
    return product + view


@op
def accumulate(x: Tensor, module: nn.Module, *, times: int) -> Tensor:
    """A loop that adds into one tensor."""
    total = torch.zeros_like(x)
    for _ in range(times):
        total += module(x) * 0.5
    return total


@op
def fill_canvas(x: Tensor) -> Tensor:
    """Writes into fresh memory, as padding by hand does."""
    canvas = x.new_zeros(x.shape[0], x.shape[1], x.shape[2] + 1, *x.shape[3:])
    canvas[:, :, 1:] = x
    return canvas
