"""Float operations whose bits torch does not promise: fused multiply-add, softmax, functions."""

from __future__ import annotations

import torch
from torch import Tensor

from adalayer_native import _C
from adalayer_native.ops.machine import get_num_threads
from adalayer_native.rounding import fma_float32

__all__ = ["FLOAT_FUNCTIONS", "SIXTH", "exact_function", "exact_softmax", "fake_softmax", "fma"]

# Numbers of what the engine computes behind the last quantized layer (FloatFunction in
# csrc/reference/float_kinds.hpp).
FLOAT_FUNCTIONS = {"clamp": 0, "multiply": 1, "plus": 2, "sigmoid": 3, "tanh": 4, "silu": 5}


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` rounded once, for float32 tensors of which the latter two broadcast to the
    first: :func:`~adalayer_native.rounding.fma_float32`, many times as fast on a CPU."""
    if a.device.type != "cpu":
        return fma_float32(a, b, c)
    # All three in the order in memory that the result has.
    out = torch.empty_like(a)
    expanded = (item.resolve_neg().expand(a.shape) for item in (a, b, c))
    x, y, z = (
        item if item.stride() == out.stride() else torch.empty_like(out).copy_(item)
        for item in expanded
    )
    addresses = x.data_ptr(), y.data_ptr(), z.data_ptr()
    _C.fma(*addresses, out.numel(), out.data_ptr(), get_num_threads())
    return out


@torch.no_grad()
def exact_softmax(input: Tensor) -> Tensor:
    """Softmax of ``[N, C, ...]`` over the channels, as the engine has it at a network's end
    (csrc/reference/image_spec.hpp)."""
    x = input.float().cpu().resolve_neg().contiguous()
    out = torch.empty_like(x)
    images, channels = x.shape[:2]
    positions = x[:1, :1].numel()
    if x.numel():
        _C.softmax(x.data_ptr(), images, channels, positions, out.data_ptr(), get_num_threads())
    return out.to(input)


SIXTH = float(torch.tensor(1.0 / 6.0, dtype=torch.float32))


@torch.no_grad()
def exact_function(input: Tensor, kind: str) -> Tensor:
    """ "sigmoid", "tanh", "silu", "hardsigmoid" or "hardswish" of every element, as the engine has
    it at a network's end (csrc/reference/image_spec.hpp; the latter two step by step)."""
    x = input.float().cpu().contiguous()
    if kind.startswith("hard"):
        part = (x + 3.0).clamp(0.0, 6.0)
        return ((x * part if kind == "hardswish" else part) * SIXTH).to(input)
    out = torch.empty_like(x)
    number = FLOAT_FUNCTIONS[kind]
    _C.float_function(number, x.data_ptr(), x.numel(), out.data_ptr(), get_num_threads())
    return out.to(input)


def fake_function(input: Tensor, kind: str) -> Tensor:
    """Shape of :func:`exact_function`."""
    return input.new_empty(input.shape)


def fake_softmax(input: Tensor) -> Tensor:
    """Shape of :func:`exact_softmax`."""
    return input.new_empty(input.shape)
