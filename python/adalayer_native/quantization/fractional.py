"""Weights and inputs between two neighbouring options, so that the choice itself can be trained.

A layer has a list of options, rich ones first, and a ``position`` in it that is a real number. At
``k + f`` its weight is ``(1 - f) * Q_k(W) + f * Q_{k+1}(W)``, where an option is a width and a
share of zeros (FracBits: Yang and Jin, AAAI 2021, which has widths alone). The gradient of the
position is ``<dL/dW, Q_{k+1}(W) - Q_k(W)>``, what the loss gains or loses by a step to the next
option, to first order; that of the weights passes straight through. Inputs are treated likewise,
their options being widths.

``sharpness`` takes the fraction to 0 or 1 in the end: it is ``(f - 1/2) * sharpness + 1/2``,
clamped. The gradient of the position is that of the whole step at any sharpness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native.pruning.masks import pruned_count
from adalayer_native.rounding import per_channel, quantize_weight, weight_range

__all__ = ["FractionalInput", "FractionalWeight"]


MEMORY = 100.0  # steps that running means span


class _Fractional(nn.Module):
    """A position among ``count`` options.

    Attributes:
        position: float32 scalar parameter, 0 to ``count - 1``.
        slope, power, curve: float64 scalar buffers, running means of what :meth:`observe` sees.
        seen: float64 scalar buffer: steps in these means.
        sharpness: at least 1.
        active: whether the owner's value is between options now; false: the choice is made.
    """

    position: nn.Parameter
    slope: Tensor
    power: Tensor
    curve: Tensor
    seen: Tensor

    def __init__(self, count: int, start: float) -> None:
        super().__init__()
        self.count = count
        self.position = nn.Parameter(torch.tensor(float(start)))
        for name in ("slope", "power", "curve", "seen"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.sharpness = 1.0
        self.active = True

    @property
    def place(self) -> tuple[int, float]:
        """The option before the position, and the fraction behind it, not sharpened."""
        value = float(self.position.detach())
        k = max(0, min(int(value), self.count - 2))
        return k, value - k

    @torch.no_grad()
    def observe(self, count: int, unit: float) -> None:
        """Take in the gradient of a batch of ``count`` samples, and forget it.

        Args:
            count: of samples, whose mean gradient it is.
            unit: growth of the squared error from the option before the position to the next.
        """
        gradient, self.position.grad = self.position.grad, None
        if gradient is None or unit <= 0.0:
            return
        value = float(gradient)
        share = max(1.0 / MEMORY, 1.0 / (float(self.seen) + 1.0))
        self.slope += share * (value / math.sqrt(unit) - float(self.slope))
        self.power += share * (value * value / unit - float(self.power))
        self.curve += share * (0.5 * count * value * value / unit - float(self.curve))
        self.seen += 1

    def sensitivity(self, unit: float) -> float:
        """What the loss grows by per unit of squared error, at least 0.

        ``n/2 <g, d>^2``, and ``<g, d>`` as far as its mean is beyond twice its standard error:
        weights that have found their minimum leave nothing of it but noise.
        """
        slope = float(self.slope)
        noise = 2.0 * math.sqrt(float(self.power) / min(max(float(self.seen), 1.0), MEMORY))
        first = math.copysign(max(abs(slope) - noise, 0.0), slope)
        return max(first / math.sqrt(unit) + float(self.curve), 0.0) if unit > 0 else 0.0

    def fraction(self) -> float:
        """The share of the next option."""
        return min(max((self.place[1] - 0.5) * self.sharpness + 0.5, 0.0), 1.0)


class FractionalWeight(_Fractional):
    """A weight between two ``(bits, sparsity)`` of a list.

    Masks are of magnitude, at thresholds that :meth:`refresh` chooses together with the scales;
    pruned weights get the gradient that they would have if they were kept, and may come back.

    Args:
        options: at least two, rich ones first.
        start: position.
        weight: float32 ``[O, ...]``, for the first scales.

    Attributes:
        scales: float32 ``[2, O]`` buffer, of the two options.
        thresholds: float32 ``[2]`` buffer; what is not larger is pruned.
    """

    scales: Tensor
    thresholds: Tensor

    def __init__(self, options: Sequence[tuple[int, float]], start: float, weight: Tensor) -> None:
        super().__init__(len(options), start)
        self.options = list(options)
        self.register_buffer("scales", weight.new_ones(2, weight.shape[0]))
        self.register_buffer("thresholds", weight.new_full((2,), -1.0))
        self.refresh(weight)

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Thresholds and scales of the two options for a weight as it is now."""
        k, _ = self.place
        magnitude = weight.detach().abs()
        for row, (bits, sparsity) in enumerate(self.options[k : k + 2]):
            count = pruned_count(weight.numel(), sparsity)
            limit = magnitude.flatten().kthvalue(count).values if count else -1.0
            self.thresholds[row] = limit
            mask = magnitude > limit if count else None
            self.scales[row] = quantize_weight(weight, bits, mask)[1]

    def forward(self, weight: Tensor) -> Tensor:
        """The value of a weight ``[O, ...]``."""
        k, _ = self.place
        bits = self.options[k][0], self.options[k + 1][0]
        found: Tensor = _Between.apply(
            weight, self.position, self.scales, self.thresholds, bits, self.fraction()
        )
        return found


class _Between(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        position: Tensor,
        scales: Tensor,
        thresholds: Tensor,
        bits: tuple[int, int],
        fraction: float,
    ) -> Tensor:
        values = []
        for scale, threshold, width in zip(scales, thresholds, bits, strict=True):
            low, high = weight_range(width)
            step = per_channel(scale, weight.shape)
            value = torch.div(weight, step).round_().clamp_(low, high).mul_(step)
            values.append(value.mul_(weight.abs() > threshold))
        first, difference = values[0], values[1] - values[0]
        ctx.save_for_backward(weight, scales, difference)
        ctx.bits, ctx.share = bits, fraction
        return first.add_(difference, alpha=fraction)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales, difference = ctx.saved_tensors
        passed = torch.zeros_like(grad)
        for scale, width, share in zip(scales, ctx.bits, (1.0 - ctx.share, ctx.share), strict=True):
            if share == 0.0:
                continue
            low, high = weight_range(width)
            step = per_channel(scale, weight.shape)
            above, below = weight > (high + 0.5) * step, weight < (low - 0.5) * step
            # A clipped weight only moves when the step (against the gradient) leads back.
            free = ~(above | below) | (above & (grad >= 0)) | (below & (grad <= 0))
            passed.add_(grad * free, alpha=share)
        along = torch.dot(grad.flatten(), difference.flatten()).to(torch.float32)
        return passed, along, None, None, None, None


class FractionalInput(_Fractional):
    """A stored tensor between two widths of a list.

    Args:
        widths: bits, most first, at least two.
        grids: scale and zero point of each.
        start: position.

    Attributes:
        grids: float32 ``[widths, 2]`` buffer.
    """

    grids: Tensor

    def __init__(
        self, widths: Sequence[int], grids: Sequence[tuple[float, int]], start: float
    ) -> None:
        super().__init__(len(widths), start)
        self.widths = list(widths)
        self.register_buffer("grids", torch.tensor([[s, float(z)] for s, z in grids]))

    def forward(self, x: Tensor) -> Tensor:
        """The value of ``x`` ``[N, ...]``."""
        k, _ = self.place
        grids = tuple(
            (scale, -zero, (1 << bits) - 1 - zero)
            for (scale, zero), bits in zip(
                self.grids[k : k + 2].tolist(), self.widths[k : k + 2], strict=True
            )
        )
        found: Tensor = _BetweenGrids.apply(x, self.position, grids, self.fraction())
        return found


class _BetweenGrids(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        position: Tensor,
        grids: tuple[tuple[float, float, float], ...],
        fraction: float,
    ) -> Tensor:
        first, second = (
            torch.mul(x, 1.0 / scale).nan_to_num_(low, high, low).clamp_(low, high).round_() * scale
            for scale, low, high in grids
        )
        difference = second - first
        ctx.save_for_backward(x, difference)
        ctx.grids, ctx.share = grids, fraction
        return torch.add(first, difference, alpha=fraction)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, difference = ctx.saved_tensors
        passed = torch.zeros_like(grad)
        for (scale, low, high), share in zip(ctx.grids, (1.0 - ctx.share, ctx.share), strict=True):
            if share:
                part = torch.ops.aten.hardtanh_backward(
                    grad, x, (low - 0.5) * scale, (high + 0.5) * scale
                )
                passed.add_(part, alpha=share)
        along = (grad * difference).sum(dtype=torch.float32)
        return passed, along, None, None
