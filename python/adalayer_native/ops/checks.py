"""Checks of arguments, and the shapes of results, for all devices."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "FLOATS",
    "channels_last",
    "check_input",
    "check_parameters",
    "conv_out_shape",
    "conv_transpose_out_shape",
    "dense",
    "geometry_of",
    "plain_eager",
    "untraced",
    "weight_only_shape",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def channels_last(x: Tensor) -> bool:
    """Whether the result should be channels_last: the input is, and not just ambiguously so."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def geometry_of(
    channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    top, left, bottom, right = padding
    return (
        channels,
        out_channels,
        *kernel_size,
        *stride,
        top,
        left,
        bottom,
        right,
        *dilation,
        groups,
    )


def _out_size(size: int, before: int, after: int, kernel: int, stride: int, dilation: int) -> int:
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def conv_out_shape(
    x: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    top, left, bottom, right = padding
    if min(stride) < 1:
        raise ValueError(f"adalayer::conv2d: stride must be at least 1, got {list(stride)}")
    h = _out_size(x.shape[2], top, bottom, kernel_size[0], stride[0], dilation[0])
    w = _out_size(x.shape[3], left, right, kernel_size[1], stride[1], dilation[1])
    if h < 1 or w < 1:
        raise ValueError(
            f"adalayer::conv2d: an input of {list(x.shape)} with padding {list(padding)} is "
            f"smaller than the dilated kernel {list(kernel_size)}, dilation {list(dilation)}"
        )
    return x.shape[0], out_channels, h, w


def check_input(op: str, x: Tensor, dtypes: tuple[torch.dtype, ...], dims: int | None) -> None:
    if x.dtype not in dtypes:
        wanted = " or ".join(str(d) for d in dtypes)
        raise TypeError(f"adalayer::{op}: expected an input of {wanted}, got {x.dtype}")
    if dims is not None and x.dim() != dims:
        raise ValueError(
            f"adalayer::{op}: expected an input of {dims} dimensions, got shape {list(x.shape)}"
        )


def check_parameters(op: str, packed: Tensor, scale: Tensor, bias: Tensor) -> None:
    if packed.dtype != torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
        raise TypeError(
            f"adalayer::{op}: weight_packed must be contiguous uint8 of one dimension, "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    for name, t in (("scale", scale), ("bias", bias)):
        if t.dtype != torch.float32 or t.shape != scale.shape or not t.is_contiguous():
            raise TypeError(
                f"adalayer::{op}: {name} must be contiguous float32 {list(scale.shape)}, "
                f"got {t.dtype} {list(t.shape)}"
            )


def conv_transpose_out_shape(
    x: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    check_input("conv_transpose2d", x, FLOATS, 4)
    if min(stride) < 1 or min(dilation) < 1:
        raise ValueError(
            "adalayer::conv_transpose2d: stride and dilation must be at least 1, "
            f"got {list(stride)} and {list(dilation)}"
        )
    sizes = []
    for axis in range(2):
        extra = output_padding[axis]
        if extra < 0 or extra >= max(stride[axis], dilation[axis]):
            raise ValueError(
                "adalayer::conv_transpose2d: output_padding must be at least 0 and smaller than "
                f"stride {list(stride)} or dilation {list(dilation)}, got {list(output_padding)}"
            )
        reach = dilation[axis] * (kernel_size[axis] - 1) + 1
        sizes.append((x.shape[2 + axis] - 1) * stride[axis] - 2 * padding[axis] + reach + extra)
        if sizes[axis] < 1:
            raise ValueError(
                f"adalayer::conv_transpose2d: an input of {list(x.shape)} with padding "
                f"{list(padding)} leaves no output"
            )
    return x.shape[0], out_channels, sizes[0], sizes[1]


def weight_only_shape(x: Tensor, weight_scale: Tensor) -> list[int]:
    check_input("linear_weight_only", x, (torch.float16, torch.bfloat16), None)
    if x.dim() == 0:
        raise ValueError(
            "adalayer::linear_weight_only: expected an input of at least one dimension"
        )
    return [*x.shape[:-1], weight_scale.shape[0]]


def dense(x: Tensor) -> Tensor:
    """x itself where its elements fill its memory in some order, else a contiguous copy."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


try:
    _dispatch_modes = torch._C._len_torch_dispatch_stack
    _functorch_active = torch._C._are_functorch_transforms_active
except AttributeError:  # private functions: where they are missing, always use the dispatcher
    _dispatch_modes = _functorch_active = None  # type: ignore[assignment]


def untraced(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel that ``torch.compile`` calls as it is.

    Behind a break of the graph operators run one by one, and the compiler looks into their Python,
    too: it would keep addresses of tensors that it no longer holds.
    """
    closed: Callable[..., Tensor] | None = None

    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal closed
        if "torch._dynamo" not in sys.modules:  # (loading it takes a second)
            return kernel(*args, **kwargs)
        if closed is None:
            closed = torch.compiler.disable(kernel)
        return closed(*args, **kwargs)

    return run


def plain_eager(x: Tensor) -> bool:
    """Whether nobody watches the operators: no compiler, tracer, mode or tensor subclass.

    Nor is ``x`` lazily negative: the dispatcher negates, and memory alone does not say it.
    """
    return (
        _dispatch_modes is not None
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not _functorch_active()
        and _dispatch_modes() == 0
        and not torch.autograd.profiler._is_profiler_enabled
        and not x.is_neg()
    )
