"""What each output of a layer is a product with: rows of the input, one per output position."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adalayer_native.errors import CalibrationError
from adalayer_native.ops.geometry import conv_out_shape
from adalayer_native.padding import four_paddings

__all__ = ["columns", "groups_of"]


def groups_of(layer: nn.Module) -> int:
    """Groups of a convolution; a linear layer has one."""
    return 1 if isinstance(layer, nn.Linear) else int(layer.groups)  # type: ignore[arg-type]


def columns(
    layer: nn.Module, x: Tensor, per_image: int, generator: torch.Generator, *, name: str = ""
) -> Tensor:
    """Input rows of a layer: ``y[g, n] = W[g] @ rows[g, n]`` for every output position ``n``.

    The columns stand in the order of a flattened weight, output channels first
    (:func:`adalayer_native.rounding.conv_form`), so that one product with ``[G, O/G, K]`` is the
    layer, bias aside. Padding contributes zeros.

    Args:
        layer: ``nn.Conv2d``, ``nn.ConvTranspose2d`` or ``nn.Linear``.
        x: float input ``[N, C, H, W]``, for a linear layer ``[..., I]``.
        per_image: at most this many output positions per image are drawn, the same ones in all
            images of ``x`` and for the same state of ``generator``, whatever the values.
        generator: CPU generator of the draw.
        name: the layer's name, for messages.

    Returns:
        float tensor ``[G, n, K]``.

    Raises:
        CalibrationError: the input is not of the layer's rank.
    """
    if isinstance(layer, nn.Linear):
        flat = x.reshape(-1, x.shape[-1])
        most = per_image * (x.shape[0] if x.dim() > 1 else 1)
        if flat.shape[0] > most:
            chosen = torch.randperm(flat.shape[0], generator=generator)[:most].sort().values
            flat = flat[chosen.to(x.device)]
        return flat.unsqueeze(0)
    if x.dim() != 4:
        raise CalibrationError(
            f"layer {name!r}: expected an input [N, C, H, W], got shape {tuple(x.shape)}"
        )
    x, stride = _padded(layer, x)
    kernel, dilation = _pair(layer.kernel_size), _pair(layer.dilation)
    *_, rows, cols = conv_out_shape(x.shape, 1, kernel, stride, (0, 0, 0, 0), dilation)
    images, channels = x.shape[:2]
    drawn = min(rows * cols, per_image)
    if drawn < rows * cols:
        place = torch.randperm(rows * cols, generator=generator)[:drawn].sort().values
    else:
        place = torch.arange(rows * cols)
    place = place.to(x.device)

    groups, width, count = groups_of(layer), x.shape[3], images * drawn
    last = kernel[0] * kernel[1] - 1
    # Channels side by side, so that a position is one run of memory; then a kernel tap at a time.
    first = torch.arange(images, device=x.device).view(-1, 1) * (x.shape[2] * width)
    x = x.permute(0, 2, 3, 1).reshape(-1, channels)
    corner = (first + place // cols * stride[0] * width + place % cols * stride[1]).view(-1)
    if last == 0:
        return x[corner].reshape(count, groups, -1).transpose(0, 1)
    picked = x.new_empty(last + 1, count, channels)
    for tap in range(last + 1):
        down, along = divmod(tap, kernel[1])
        # A transposed convolution multiplies with the kernel turned round; the stored weight is
        # not turned.
        into = picked[last - tap if isinstance(layer, nn.ConvTranspose2d) else tap]
        place = corner + (down * dilation[0] * width + along * dilation[1])
        torch.index_select(x, 0, place, out=into)
    picked = picked.view(-1, channels).t().contiguous()
    return picked.reshape(groups, -1, count).transpose(1, 2)


def _padded(layer: nn.Module, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The input as a stride-``s`` convolution without padding reads it, and that stride."""
    if isinstance(layer, nn.Conv2d):
        top, left, bottom, right = four_paddings(layer)
        return F.pad(x, (left, right, top, bottom)), _pair(layer.stride)
    # A transposed convolution is a convolution of the input spread out with zeros.
    stride, padding, extra = (
        _pair(getattr(layer, key)) for key in ("stride", "padding", "output_padding")
    )
    kernel, dilation = _pair(layer.kernel_size), _pair(layer.dilation)
    images, channels, height, width = x.shape
    spread = x.new_zeros(
        images, channels, (height - 1) * stride[0] + 1, (width - 1) * stride[1] + 1
    )
    spread[:, :, :: stride[0], :: stride[1]] = x
    around = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    # Negative where the layer crops more than its kernel reaches; F.pad crops then.
    bounds = (around[1], around[1] + extra[1], around[0], around[0] + extra[0])
    return F.pad(spread, bounds), (1, 1)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
