"""Python around tensors: branches and loops over sizes, containers, optional arguments."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import op


@op
def branch_on_size(x: Tensor, *, limit: int) -> Tensor:
    if x.shape[-1] > limit:
        return F.relu(x)
    return torch.sigmoid(x) * 2


@op
def branch_on_rank(x: Tensor) -> Tensor:
    if x.ndim == 4:
        return x * 0.5
    elif x.dim() == 3 and isinstance(x, Tensor):
        return x + 1
    return -x


@op
def loop_over_axis(x: Tensor) -> Tensor:
    parts = []
    for index in range(x.shape[1]):
        parts.append(x[:, index : index + 1] * (1 + index / x.shape[1]))
    return torch.cat(parts, 1)


@op
def loop_over_sizes(x: Tensor) -> Tensor:
    for size in x.shape[1:]:
        x = x + 1 / size
    return x


@op
def divide_by_size(x: Tensor) -> Tensor:
    return x * 2 / math.sqrt(x.size(-1) + x.shape[1])


@op
def while_wide(x: Tensor) -> Tensor:
    while x.shape[-1] > 3:
        x = F.avg_pool1d(x.flatten(1, -2), 2).reshape(*x.shape[:-1], -1)
    return x


@op
def optional(x: Tensor, y: Tensor | None) -> Tensor:
    if y is not None:
        x = x + y.mean(dim=tuple(range(1, y.dim()))).view(-1, *[1] * (x.dim() - 1))
    return x


@op
def by_number(x: Tensor, number: float) -> Tensor:
    return x * number


@op
def by_flag(x: Tensor, flag: bool) -> Tensor:
    return F.relu(x) if flag else x


@op
def by_training(x: Tensor, module: nn.Module) -> Tensor:
    return x * 4.0 if module.training else x * 0.5


@op
def through_dict(x: Tensor, y: Tensor) -> Tensor:
    state = {"x": x, "y": y}
    state["sum"] = state.pop("y") + 1
    state.update(x=state["x"] * 0.5)
    return sum(state.values())  # type: ignore[return-value]


@dataclass
class State:
    value: Tensor
    scale: float = 0.5

    @property
    def scaled(self) -> Tensor:
        return self.value * self.scale


@op
def through_object(x: Tensor) -> Tensor:
    state = State(x)
    state.value = state.scaled + 1
    return state.scaled


def _pieces(x: Tensor) -> Iterator[Tensor]:
    for index, piece in enumerate(x.unbind(1)):
        yield piece * (index + 1) if index % 2 else piece


@op
def through_generator(x: Tensor) -> Tensor:
    return torch.stack(list(_pieces(x)), dim=1) * (1 / x.shape[1])


@op
def fold_list(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return functools.reduce(torch.add, itertools.islice([x, y * 0.5, z], 3))


@op
def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 0.5
    return x + y


@op
def without_autocast(x: Tensor, module: nn.Module) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return module(x.float())


@op
def last_of_pyramid(module: nn.Module, x: Tensor) -> Tensor:
    """Features of several sizes in a list, joined at the size of the first."""
    pyramid = [x]
    for _ in range(2):
        pyramid.append(F.max_pool2d(module(pyramid[-1]), 2, ceil_mode=True))
    size = pyramid[0].shape[-2:]
    return torch.cat([F.interpolate(item, size=size) for item in pyramid], dim=1)


# ---- what may be refused, but not be wrong ------------------------------------------------------


@op
def branch_on_value(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x - 1


@op
def read_value(x: Tensor) -> Tensor:
    return x * (1 + abs(x.flatten()[0].item()))


@op
def through_numpy(x: Tensor) -> Tensor:
    return x + float(x.numpy().max())


@op
def centre_batch(x: Tensor) -> Tensor:
    return x - x.mean(0, keepdim=True)


@op
def turn_batch(x: Tensor, *, form: str) -> Tensor:
    return x.flip(0) if form == "flip" else x + torch.roll(x, 1, 0)


@op
def branch_on_batch(x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] > 2 else x - 1


@op
def divide_by_batch(x: Tensor) -> Tensor:
    return x / x.shape[0]
