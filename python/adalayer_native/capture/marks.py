"""Dropouts leave a mark while a model is exported: outside training they leave nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native.capture import vocabulary as table

__all__ = ["dropouts", "marking", "standing_in"]


def dropouts(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if table.is_dropout(m)}


@contextmanager
def marking(marks: dict[str, nn.Module]) -> Iterator[None]:
    """While a model is exported, its dropouts leave a mark: outside training they leave nothing."""
    with standing_in(marks, "forward", lambda name, _: _Mark(name)):
        yield


@contextmanager
def standing_in(
    modules: dict[str, nn.Module], place: str, make: Callable[[str, nn.Module], Any]
) -> Iterator[None]:
    """Something else as an attribute of modules for a while."""
    new = {name: make(name, module) for name, module in modules.items()}
    before = {name: module.__dict__.get(place) for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.__dict__[place] = new[name]
        yield
    finally:
        for name, module in modules.items():
            module.__dict__.pop(place, None)
            if before[name] is not None:
                module.__dict__[place] = before[name]


class _Mark:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        result: Tensor = torch.ops.adalayer.mark(x, self.name)
        return result


@torch.library.custom_op("adalayer::mark", mutates_args=())
def _mark(x: Tensor, name: str) -> Tensor:
    """Stands for a module that does nothing outside training, while a model is captured."""
    return x.clone()


@_mark.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)
