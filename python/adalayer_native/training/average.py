"""Exponential moving average of a model's parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["Average"]


class Average:
    """Average of all trained parameters over roughly the last tenth of the steps so far.

    After ``n`` steps the decay is ``min(limit, (1 + n) / (10 + n))``, so that the span grows with
    the run, up to ``1 / (1 - limit)`` steps.

    Attributes:
        values: average by parameter name; empty before the first step.
        steps: how many went into it.
    """

    def __init__(self, model: nn.Module, limit: float) -> None:
        self.model, self.limit = model, limit
        self.values: dict[str, Tensor] = {}
        self.steps = 0

    def _parameters(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self) -> None:
        """Take the present parameters in."""
        current = self._parameters()
        if not self.values:
            self.values = {name: value.clone() for name, value in current.items()}
        else:
            decay = min(self.limit, (1 + self.steps) / (10 + self.steps))
            averages = [self.values[name] for name in current]
            torch._foreach_lerp_(averages, list(current.values()), 1.0 - decay)
        self.steps += 1

    def restart(self) -> None:
        """Forget everything."""
        self.values, self.steps = {}, 0

    @torch.no_grad()
    def use(self) -> None:
        """Put the averages into the model."""
        for name, parameter in self._parameters().items():
            if name in self.values:
                parameter.copy_(self.values[name])

    def load(self, values: Mapping[str, Tensor], steps: int) -> None:
        """Go on with averages that were saved."""
        current = self._parameters()
        self.values = {n: torch.empty_like(current[n]).copy_(v) for n, v in values.items()}
        self.steps = steps
