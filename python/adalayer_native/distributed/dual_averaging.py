"""Optimistic dual averaging, for gradients that come with noise (QODA: Nguyen et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from adalayer_native.errors import PlanError

__all__ = ["OptimisticDualAveraging"]


class OptimisticDualAveraging(torch.optim.Optimizer):
    """One gradient per step, taken where the last gradient says that the next point will be.

    With the gradient ``g_t`` of the point ahead,

        y_(t+1) = y_t - g_t,  x_(t+1) = x_1 + eta_(t+1) y_(t+1),  ahead = x_(t+1) - eta_(t+1) g_t,

    and ``eta_t = lr / sqrt(1 + sum |g_s - g_(s-1)|^2)`` where the rate is adaptive: noise, that of
    rounded gradients too, makes it fall. The parameters hold the point ahead. Finds the saddle
    points of games that a gradient method circles.

    Args:
        params: as for any optimizer.
        lr: ``lr`` above.
        adaptive: false keeps ``eta`` at ``lr``.

    Raises:
        PlanError: the rate is not above 0.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.1, *, adaptive: bool = True) -> None:
        if not lr > 0.0:
            raise PlanError(f"dual averaging: the rate must be above 0, got {lr}")
        super().__init__(params, {"lr": lr, "adaptive": adaptive})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Go on by the gradients that the parameters have."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            for p in moved:
                state = self.state[p]
                if not state:
                    state["start"] = p.detach().clone()
                    state["dual"] = torch.zeros_like(p)
                    state["last"] = torch.zeros_like(p)
                    state["changed"] = torch.zeros((), dtype=torch.float64)
                gradient = p.grad
                assert gradient is not None
                state["changed"] += (gradient - state["last"]).double().square().sum()
                state["last"].copy_(gradient)
                state["dual"] -= gradient
            # One rate for a group: all of it is one point.
            changed = sum(float(self.state[p]["changed"]) for p in moved)
            rate = group["lr"] / (1.0 + changed) ** 0.5 if group["adaptive"] else group["lr"]
            for p in moved:
                state = self.state[p]
                p.copy_(state["start"] + rate * (state["dual"] - state["last"]))
        return loss
