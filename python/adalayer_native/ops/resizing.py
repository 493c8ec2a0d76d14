"""Resizing by tables, and bilinear resizing with the engine's roundings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adalayer_native.ops.fused import fma
from adalayer_native.ops.grids import levels

__all__ = ["exact_bilinear", "fake_bilinear", "linear_tables", "nearest_tables"]

_Whole = npt.NDArray[np.int32]
_Float = npt.NDArray[np.float32]


def _steps(n_in: int, n_out: int, factor: float | None, align: bool) -> np.float32:
    """Input pixels per output pixel, as torch has it: float32."""
    if align:
        return np.float32(n_in - 1) / np.float32(n_out - 1) if n_out > 1 else np.float32(0)
    if factor is not None and factor > 0:
        return np.float32(1.0 / factor)
    return np.float32(n_in) / np.float32(n_out)


def linear_tables(
    n_in: int, n_out: int, factor: float | None, align: bool
) -> tuple[_Whole, _Whole, _Float]:
    """The two inputs that each output along an axis lies between, and the second one's share."""
    step = _steps(n_in, n_out, factor, align)
    index = np.arange(n_out, dtype=np.float32)
    if align:
        position = step * index
    else:
        half = np.float32(0.5)
        position = np.maximum(step * (index + half) - half, np.float32(0))
    low = np.minimum(position.astype(np.int32), n_in - 1).astype(np.int32)
    high = np.minimum(low + 1, n_in - 1).astype(np.int32)
    part = np.clip(position - low.astype(np.float32), np.float32(0), np.float32(1))
    return low, high, part.astype(np.float32)


def nearest_tables(
    n_in: int, n_out: int, factor: float | None, exact: bool
) -> tuple[_Whole, _Whole, _Float]:
    """The input that each output along an axis repeats, in the form of :func:`linear_tables`."""
    step = _steps(n_in, n_out, factor, False)
    index = np.arange(n_out, dtype=np.float32) + np.float32(0.5 if exact else 0.0)
    low = np.minimum(np.floor(index * step).astype(np.int32), n_in - 1).astype(np.int32)
    return low, low, np.zeros(n_out, dtype=np.float32)


def _sizes(
    x: Tensor, output_size: Sequence[int] | None, factors: Sequence[float] | None
) -> list[int]:
    if output_size is not None:
        return list(output_size)
    assert factors is not None
    return [int(size * factor) for size, factor in zip(x.shape[-2:], factors, strict=True)]


def _blend(first: Tensor, second: Tensor, part: Tensor) -> Tensor:
    return fma(second - first, part, first)


@torch.no_grad()
def exact_bilinear(
    input: Tensor,
    output_size: Sequence[int] | None,
    align_corners: bool,
    scale_factors: Sequence[float] | None,
    qparams: Tensor | None,
) -> Tensor:
    """``F.interpolate`` in bilinear mode, of ``[N, C, H, W]``: along rows, then between them.

    Args:
        output_size, scale_factors: height first; one of them may be None.
        qparams: float32 ``[3]``: scale, zero point and bits of the grid that the input lies on;
            None for any float input.
    """
    values = input.float() if qparams is None else levels(input, qparams)
    factors = scale_factors or (None, None)
    sizes = _sizes(input, output_size, scale_factors)
    rows, columns = (
        [
            torch.from_numpy(t).to(values.device)
            for t in linear_tables(values.shape[axis], out, factor, align_corners)
        ]
        for axis, out, factor in zip((-2, -1), sizes, factors, strict=True)
    )
    low, high, part = columns
    wide = _blend(values[..., low], values[..., high], part)
    low, high, part = rows
    y = _blend(wide[..., low, :], wide[..., high, :], part[:, None])
    if qparams is not None:
        scale, zero_point = qparams[0], float(qparams[1])
        y = fma(y, scale, (-zero_point * scale.double()).float())
    return y.to(input.dtype)


def fake_bilinear(
    input: Tensor,
    output_size: Sequence[int] | None,
    align_corners: bool,
    scale_factors: Sequence[float] | None,
    qparams: Tensor | None,
) -> Tensor:
    """Shape of :func:`exact_bilinear`."""
    return input.new_empty([*input.shape[:-2], *_sizes(input, output_size, scale_factors)])
