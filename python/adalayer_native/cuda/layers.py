"""Single layers on GPU tensors: programs of one convolution, cached per layer and image size."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from ctypes import c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from adalayer_native import _C
from adalayer_native._recent import Recent
from adalayer_native.cuda.engine import CudaEngine
from adalayer_native.cuda.library import check, library, stream_number

__all__ = ["linear_float", "on_grid", "run_layer"]

# Engines of single layers; each holds its packed weights on the device.
_ENGINE_LIMIT = 512


def _number(t: Tensor) -> int:
    """Of the tensor's GPU. (Tests give tensors on the CPU to a GPU in software.)"""
    return t.device.index or 0


class _Identity:
    """What tells whether a tensor is still what it was: its memory and its version."""

    def __init__(self, t: Tensor) -> None:
        self.address = t.data_ptr()
        try:
            self.version = t._version
        except RuntimeError:  # inference tensors have none, and are not changed in place
            self.version = -1

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Identity)
            and self.address == other.address
            and self.version == other.version
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass
class _Known:
    """The parameters of a layer as they were when `key` was computed."""

    identities: list[_Identity]
    scale: weakref.ref[Tensor]
    bias: weakref.ref[Tensor]
    key: bytes


_lock = threading.Lock()
_known: Any = WeakIdKeyDictionary()  # weight_packed -> _Known
_engines: Recent[tuple[Any, ...], CudaEngine] = Recent(_ENGINE_LIMIT)


def _content(packed: Tensor, scale: Tensor, bias: Tensor) -> bytes:
    """What the parameters are, by content: looked at once per tensor, since that waits for the
    device."""
    identities = [_Identity(t) for t in (packed, scale, bias)]
    with _lock:
        known: _Known | None = _known.get(packed)
    if (
        known is not None
        and known.identities == identities
        and known.scale() is scale
        and known.bias() is bias
    ):
        return known.key
    header = packed[: _C.HEADER_BYTES].cpu().numpy().tobytes()  # holds a hash of the payload
    key = header + scale.cpu().numpy().tobytes() + bias.cpu().numpy().tobytes()
    with _lock:
        _known[packed] = _Known(identities, weakref.ref(scale), weakref.ref(bias), key)
    return key


_Parameters = tuple[Tensor, Tensor, Tensor]


def _engine(
    key: Hashable,
    program: Callable[[], _C.Program],
    grid: tuple[float, int, int] | None,
    parameters: _Parameters,
) -> CudaEngine:
    device = _number(parameters[0])
    whole = (_content(*parameters), device, key)
    levels = None if grid is None else (grid[0], grid[1], 2 ** grid[2] - 1)
    # Two launches: a graph would save nothing.
    return _engines.get_or(whole, lambda: CudaEngine(program(), device, graph=False, grid=levels))


def run_layer(
    key: Hashable,
    program: Callable[[], _C.Program],
    grid: tuple[float, int, int] | None,
    parameters: _Parameters,
    x: Tensor,
    residual: Tensor | None,
    out: Tensor,
    *,
    nhwc: bool,
) -> None:
    """Enqueues one layer on torch's current stream.

    Args:
        key: what the program depends on beside the content of the parameters.
        program: makes it, where no layer with such parameters and such a key has run yet.
        grid: scale, zero point and bits of results that are rounded onto one, else None.
        parameters: packed weights, scale and bias on the device of ``x``.
        x: float32 on a GPU, ``[N, C, H, W]`` in memory order, or channels_last with ``nhwc``.
        residual: float32 of the output's shape and order, or None. out: likewise, written.
    """
    _engine(key, program, grid, parameters).run_layer(
        x.data_ptr(),
        nhwc,
        x.shape[0],
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
        nhwc,
    )


def on_grid(
    x: Tensor, scale: float, zero_point: int, bits: int, out: Tensor, *, real: bool
) -> None:
    """Element-wise over ``x.numel()`` neighbouring float32 values: levels, or (``real``) the values
    that they stand for, to ``out``."""
    code = library().adalayer_cuda_quantize(
        x.data_ptr(),
        x.numel(),
        scale,
        zero_point,
        2**bits - 1,
        real,
        out.data_ptr(),
        _number(x),
        stream_number(_number(x)),
    )
    check(code, str(x.device))


# ----------------------------------------------------------------- float activations, b-bit weights


class _FloatLinear:
    """Weights of a linear layer on a GPU, for half and bfloat16 activations."""

    def __init__(self, packed: Tensor, scale: Tensor, bias: Tensor, device: int) -> None:
        weights = packed.detach().cpu().contiguous()
        steps = scale.detach().cpu().contiguous()
        offsets = bias.detach().cpu().contiguous()
        handle = c_void_p()
        found = library()
        check(
            found.adalayer_cuda_linear_create(
                weights.data_ptr(),
                weights.numel(),
                steps.data_ptr(),
                offsets.data_ptr(),
                device,
                ctypes.byref(handle),
            ),
            f"cuda:{device}",
        )
        self.handle = handle
        self.run = found.adalayer_cuda_linear_run
        self._finalizer = weakref.finalize(self, found.adalayer_cuda_linear_destroy, handle)


_linears: Recent[tuple[Any, ...], _FloatLinear] = Recent(_ENGINE_LIMIT)


def linear_float(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor, shape: Sequence[int]
) -> Tensor:
    """``y = x Wᵀ · scale + bias`` with half or bfloat16 ``x [rows, in]`` on a GPU; ``shape`` is the
    result's, whose last entry is the output features."""
    device = _number(x)
    key = (_content(packed, scale, bias), device)
    layer = _linears.get_or(key, lambda: _FloatLinear(packed, scale, bias, device))
    out = torch.empty(list(shape), dtype=x.dtype, device=x.device)
    rows = x.numel() // x.shape[-1]
    code = layer.run(
        layer.handle,
        x.data_ptr(),
        rows,
        x.dtype == torch.bfloat16,
        out.data_ptr(),
        stream_number(device),
    )
    check(code, str(x.device))
    return out
