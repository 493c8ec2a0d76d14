"""Calibration pictures out of a network's own batch norms, where there are no others.

A batch norm remembers the mean and the variance that every channel had in training. Noise is
changed until it gives those statistics in all of them (ZeroQ: Cai et al. 2020). Such pictures look
like nothing, but their activations have the ranges and the directions of real ones, which is what
calibration and repair ask for.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from .._progress import ProgressBar
from ..capture import captured
from ..errors import CalibrationError, UnsupportedModelError

__all__ = ["distilled"]

TOGETHER = 32  # pictures whose statistics are compared
RATE = 0.1
SMOOTH = 2.5e-2  # of the difference of neighbouring pixels
NORMALISED = (-2.5, 2.75)  # darkest and brightest pixels by ImageNet's statistics
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def distilled(
    model: nn.Module,
    example: Tensor,
    *,
    limits: tuple[float, float] | None = None,
    samples: int = 128,
    steps: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> list[Tensor]:
    """Pictures for ``calibration`` of a model with batch norms, without any data.

    Args:
        model: float, with batch norms that were trained; not changed.
        example: one input ``[N, C, H, W]``, float32; of any picture, or none.
        limits: least and largest value of a picture. Default: 0 to 1 where the example has nothing
            below 0 and nothing above 1, 0 to 255 where it has nothing below 0, and else, as of
            normalised pictures, -2.5 to 2.75, and what the example has beyond. Zeros, which say
            nothing, are taken for normalised.
        samples: number of pictures.
        steps: of the optimisation, each of them forward and back.
        seed: of the noise.
        progress: show a progress bar.

    Returns:
        Batches of 32 pictures.

    Raises:
        CalibrationError: limits, samples or steps that are none.
        UnsupportedModelError: the model has no batch norm with statistics, or its input is not one
            tensor of floating point.
    """
    if not isinstance(example, Tensor) or not example.is_floating_point() or example.dim() < 2:
        raise UnsupportedModelError(
            "pictures can be distilled for a model of one floating point tensor only: expected an "
            f"example [N, C, ...], got {_named(example)}"
        )
    graph = copy.deepcopy(captured(model, example=example)).eval().requires_grad_(False)
    norms = [m for m in graph.modules() if isinstance(m, _NORMS) and m.running_mean is not None]
    if not norms:
        raise UnsupportedModelError(
            "pictures are distilled from the statistics of batch norms, and the model has none: "
            "give calibration data"
        )
    low, high = _limits(example) if limits is None else limits
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise CalibrationError(f"distilled: expected limits from low to high, got {limits}")
    if samples < 1 or steps < 1:
        raise CalibrationError(
            f"distilled: samples and steps must be at least 1, got {samples} and {steps}"
        )
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        axes = [axis for axis in range(x.dim()) if axis != 1]
        seen.append((x.mean(axes), x.var(axes, unbiased=False)))

    hooks = [norm.register_forward_pre_hook(keep) for norm in norms]
    generator = torch.Generator().manual_seed(seed)
    count = -(-samples // TOGETHER)
    batches: list[Tensor] = []
    bar = ProgressBar("Distilling pictures", count * steps, unit="step", enabled=progress)
    try:
        with bar:
            for _ in range(count):
                size = min(TOGETHER, samples - TOGETHER * len(batches))
                shape = (size, *example.shape[1:])
                x = torch.randn(shape, generator=generator) * (high - low) / 5 + (high + low) / 2
                x = x.to(example).requires_grad_(True)
                optimizer = torch.optim.Adam([x], lr=RATE * (high - low) / 5)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
                for _ in range(steps):
                    seen.clear()
                    optimizer.zero_grad()
                    with torch.enable_grad():
                        graph(x)
                        loss = sum(
                            (
                                _distance(norm, *found)
                                for norm, found in zip(norms, seen, strict=True)
                            ),
                            SMOOTH * _roughness(x) * len(norms),
                        )
                        loss.backward()
                    optimizer.step()
                    schedule.step()
                    with torch.no_grad():
                        x.clamp_(low, high)
                    bar.advance()
                batches.append(x.detach())
    finally:
        for hook in hooks:
            hook.remove()
    return batches


def _limits(example: Tensor) -> tuple[float, float]:
    low, high = (float(end) for end in example.aminmax())
    if low < 0.0 or low == high == 0.0:
        return min(low, NORMALISED[0]), max(high, NORMALISED[1])
    return 0.0, 1.0 if high <= 1.0 else 255.0


def _distance(norm: Any, mean: Tensor, variance: Tensor) -> Tensor:
    """Of a batch's statistics from those remembered, in deviations and their logarithm."""
    wanted = norm.running_var + norm.eps
    shift = (mean - norm.running_mean).square() / wanted
    spread = ((variance + norm.eps) / wanted).log().square() / 4
    return (shift + spread).mean()


def _roughness(x: Tensor) -> Tensor:
    """Mean square of the difference of neighbours, along every axis behind the channels."""
    parts = [x.diff(dim=axis).square().mean() for axis in range(2, x.dim()) if x.shape[axis] > 1]
    return sum(parts, x.new_zeros(()))


def _named(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
