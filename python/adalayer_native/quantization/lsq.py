"""Learned step sizes (LSQ, Esser et al. 2020): scales of weights and activations that train.

A scale is ``start * exp(log)`` with a trained ``log`` that begins at 0: positive whatever the
optimizer does, and exactly the calibrated scale before the first step. The scale in use stays where
it always is, in ``weight_scale`` or ``qparams``; :func:`apply_scales` writes it there after every
step, so a forward pass, :func:`~adalayer_native.quantization.simulate` and
:func:`~adalayer_native.quantization.convert` read the same float32 number. Zero points do not move,
and zero stays exactly on every grid.

The gradient of a scale ``s`` is the paper's: ``sum dL/dy * (q - x/s)`` over values inside the range
and ``sum dL/dy * q`` over clipped ones, times ``1/sqrt(N * Qp)``. A step of size ``lr`` along it
would change the scale by ``lr * gradient / s`` of itself; that quotient is what ``log`` gets as its
gradient, so that learning rates mean what they mean in the paper.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native.rounding import group_size_of, per_channel, weight_range

__all__ = ["StepSize", "learned_activation", "learned_weight"]

# One number is learned per tensor; a quarter of the samples says as much about it, and the passes
# over all of them would cost a third of the whole step.
_SHARE = 4
# A learned scale stays within a factor of 16 of where it began.
_LIMIT = math.log(16.0)


class StepSize(nn.Module):
    """One scale per element of ``start``: ``start * exp(log)``.

    Attributes:
        start: float32 buffer, positive: ``[C]``, or ``[C, groups]``.
        log: float32 parameter of that shape.
    """

    start: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start.detach().clone())
        self.log = nn.Parameter(torch.zeros_like(self.start))

    @torch.no_grad()
    def value(self) -> Tensor:
        """The scales, float32 ``[C]``; ``log`` is first put back into its bounds."""
        return self.start * self.log.clamp_(-_LIMIT, _LIMIT).exp()

    @torch.no_grad()
    def restart(self, start: Tensor) -> None:
        """Begin again at other scales."""
        self.start.copy_(start)
        self.log.zero_()


def _per_scale(values: Tensor, scale: Tensor) -> Tensor:
    """Sums over the weights ``[O, ...]`` that share each scale, ``[O]`` or ``[O, groups]``."""
    if scale.dim() == 1:
        return values.flatten(1).sum(dim=1)
    size = group_size_of(values.shape[1], scale.shape[1])
    return torch.stack([part.sum(dim=1) for part in values.split(size, dim=1)], dim=1)


class _LearnedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        log: Tensor,
        scale: Tensor,
        mask: Tensor | None,
        bits: int,
        dense: bool,
    ) -> Tensor:
        low, high = weight_range(bits)
        levels = torch.div(weight, per_channel(scale, weight.shape))
        ctx.save_for_backward(levels, scale, mask)
        ctx.bits, ctx.dense = bits, dense
        out = levels.round().clamp_(low, high)
        if mask is not None:
            out.mul_(mask)
        return out.mul_(per_channel(scale, weight.shape))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        levels, scale, mask = ctx.saved_tensors
        low, high = weight_range(ctx.bits)
        above, below = levels > high + 0.5, levels < low - 0.5
        kept = grad if mask is None else grad * mask
        inside = ~(above | below)
        error = levels.round().clamp_(low, high).sub_(levels * inside)
        count = _per_scale(torch.ones_like(levels) if mask is None else mask.float(), scale)
        total = _per_scale(kept * error, scale)
        count.clamp_(min=1)
        log_grad = total / (scale * (count * high) ** 0.5)
        # A clipped weight only moves when the step (against the gradient) leads back into range.
        free = inside | (above & (grad >= 0)) | (below & (grad <= 0))
        return (grad if ctx.dense else kept) * free, log_grad, None, None, None, None


def learned_weight(
    weight: Tensor, step: StepSize, scale: Tensor, mask: Tensor | None, bits: int, *, dense: bool
) -> Tensor:
    """``mask * clamp(rne(w / s)) * s``, differentiable in the weight and the step size.

    Args:
        weight: float32 ``[O, ...]``.
        step: of the ``O`` channels; gets the gradient.
        scale: float32 ``[O]`` or ``[O, groups]``: the step's present value.
        mask: bool, of the weight's shape, or ``None``.
        bits: 2 to 8.
        dense: pruned weights get the gradient that they would have if they were kept, so that one
            can come back when the mask is chosen again.
    """
    out: Tensor = _LearnedWeight.apply(weight, step.log, scale, mask, bits, dense)
    return out


class _LearnedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log: Tensor, scale: float, inverse: float, low: float, high: float
    ) -> Tensor:
        out = torch.mul(x, inverse).clamp_(low, high).round_().mul_(scale)
        ctx.save_for_backward(x, out)
        ctx.constants = scale, low, high
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, out = ctx.saved_tensors
        scale, low, high = ctx.constants
        passed = torch.ops.aten.hardtanh_backward(
            grad, x, (low - 0.5) * scale, (high + 0.5) * scale
        )
        part = -(-len(x) // _SHARE)
        x, out, some, kept = x[:part], out[:part], grad[:part], passed[:part]
        total = _dot(kept, out - x) + _dot(some - kept, out)
        gain = math.sqrt(max(x[0].numel(), 1) * (high - low)) * part / len(grad)
        log_grad = (total / (scale * scale * gain)).reshape(1)
        return passed if ctx.needs_input_grad[0] else None, log_grad, None, None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products in float32; tensors of one memory layout are not copied."""
    if a.dim() == 4:
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.reshape(-1).to(b.dtype), b.reshape(-1)).float()


def learned_activation(
    x: Tensor, step: StepSize, constants: tuple[float, float, float, float]
) -> Tensor:
    """``x`` ``[N, ...]`` rounded to its grid, differentiable in ``x`` and the step size.

    Args:
        constants: ``(scale, 1 / scale, lowest, highest level)`` of the present scale.
    """
    out: Tensor = _LearnedActivation.apply(x, step.log, *constants)
    return out
