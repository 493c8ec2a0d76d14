"""Single layers on GPU tensors: programs of one convolution, cached per layer and image size."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from ctypes import c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from adalayer_native import _C
from adalayer_native._recent import Recent
from adalayer_native.cuda.engine import CudaEngine
from adalayer_native.cuda.library import check, library, stream_number
from adalayer_native.operations import geometry, parameters

__all__ = ["LayerGeometry", "linear_float", "on_grid", "run_layer"]

# Engines of single layers; each holds its packed weights on the device.
_ENGINE_LIMIT = 512
_INF = float("inf")


@dataclass(frozen=True)
class LayerGeometry:
    """A convolution over ``[channels, h, w]`` on the grid of its input.

    ``padding`` is (top, left, bottom, right); ``out_size`` (h, w). ``grid`` is (scale, zero point,
    bits) of the output, for layers whose results are rounded onto one, else None.
    """

    channels: int
    h: int
    w: int
    out_channels: int
    out_size: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    input_scale: float
    input_zero_point: int
    input_bits: int
    lo: float | None = None
    hi: float | None = None
    transposed: bool = False
    grid: tuple[float, int, int] | None = None


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
_engines: OrderedDict[tuple[Any, ...], CudaEngine] = OrderedDict()


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
    header = packed[:64].cpu().numpy().tobytes()  # holds a hash of the payload
    key = header + scale.cpu().numpy().tobytes() + bias.cpu().numpy().tobytes()
    with _lock:
        _known[packed] = _Known(identities, weakref.ref(scale), weakref.ref(bias), key)
    return key


def _program(g: LayerGeometry, packed: Tensor, scale: Tensor, bias: Tensor) -> _C.Program:
    program = _C.Program()
    x = program.add_value("x", "f32", g.channels, g.h, g.w)
    levels = program.add_value(
        "levels",
        "u8",
        g.channels,
        g.h,
        g.w,
        g.input_scale,
        g.input_zero_point,
        2**g.input_bits - 1,
    )
    y = program.add_value("y", "f32", g.out_channels, *g.out_size)
    weights = packed.detach().cpu().contiguous()
    # One product in float32, as everywhere.
    steps = scale.detach().cpu().numpy() * np.float32(g.input_scale)
    steps = np.ascontiguousarray(steps, dtype=np.float32)
    offsets = np.ascontiguousarray(bias.detach().cpu().numpy(), dtype=np.float32)
    op = "conv_transpose" if g.transposed else "conv"
    lists = parameters(
        op,
        **geometry(g.kernel_size, g.stride, g.padding, g.dilation, g.groups),
        clamp_lo=-_INF if g.lo is None else g.lo,
        clamp_hi=_INF if g.hi is None else g.hi,
        weights=program.add_constant_weights(weights.data_ptr(), weights.numel()),
        scale=program.add_constant_f32(steps.ctypes.data, steps.size),
        bias=program.add_constant_f32(offsets.ctypes.data, offsets.size),
    )
    program.add_node("quantize", "quantize", [x], levels)
    program.add_node(op, op, [levels], y, *lists)
    program.set_inputs([x])
    program.set_outputs([y])
    return program


def _engine(g: LayerGeometry, packed: Tensor, scale: Tensor, bias: Tensor) -> CudaEngine:
    device = _number(packed)
    key = (_content(packed, scale, bias), device, g)
    with _lock:
        found = _engines.get(key)
        if found is not None:
            _engines.move_to_end(key)
            return found
    grid = None if g.grid is None else (g.grid[0], g.grid[1], 2 ** g.grid[2] - 1)
    # Two launches: a graph would save nothing.
    made = CudaEngine(_program(g, packed, scale, bias), device, graph=False, grid=grid)
    with _lock:
        _engines[key] = made
        while len(_engines) > _ENGINE_LIMIT:
            _engines.popitem(last=False)
    return made


def run_layer(
    g: LayerGeometry,
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    out: Tensor,
    *,
    nhwc: bool,
) -> None:
    """Enqueues one layer on torch's current stream.

    Args:
        x: float32 on a GPU, ``[N, channels, h, w]`` in memory order, or channels_last with
            ``nhwc``. packed, scale, bias: the layer's parameters on the same device.
        residual: float32 of the output's shape and order, or None. out: likewise, written.
    """
    _engine(g, packed, scale, bias).run_layer(
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
