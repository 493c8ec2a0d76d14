"""Dropouts leave a mark while a model is exported: outside training they leave nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native.capture import vocabulary as table

__all__ = ["dropouts", "marking"]


def dropouts(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if table.is_dropout(m)}


@contextmanager
def marking(marks: dict[str, nn.Module]) -> Iterator[None]:
    """While a model is exported, its dropouts leave a mark: outside training they leave nothing."""
    before = {name: module.__dict__.get("forward") for name, module in marks.items()}
    try:
        for name, module in marks.items():
            module.__dict__["forward"] = _Mark(name)
        yield
    finally:
        for name, module in marks.items():
            if before[name] is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before[name]


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
