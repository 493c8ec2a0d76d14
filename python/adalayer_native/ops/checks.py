"""Checks of arguments, and the shapes of results, for all devices."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "FLOATS",
    "channels_last",
    "check_input",
    "check_parameters",
    "dense",
    "plain_eager",
    "untraced",
    "weight_only_shape",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def channels_last(x: Tensor) -> bool:
    """Whether the result should be channels_last: the input is, and not just ambiguously so."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


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
    grouped = op == "linear" and scale.dim() == 2
    expected = {"scale": scale.shape, "bias": scale.shape[:1] if grouped else scale.shape}
    for name, t in (("scale", scale), ("bias", bias)):
        if t.dtype != torch.float32 or t.shape != expected[name] or not t.is_contiguous():
            raise TypeError(
                f"adalayer::{op}: {name} must be contiguous float32 {list(expected[name])}, "
                f"got {t.dtype} {list(t.shape)}"
            )


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
