"""Layers on a CPU as values: checked once, then called with a tensor."""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch import Tensor

from adalayer_native import _C
from adalayer_native.ops.checks import FLOATS, channels_last, check_input, check_parameters
from adalayer_native.ops.geometry import LayerCall, LayerGeometry
from adalayer_native.ops.machine import get_num_threads
from adalayer_native.ops.packing import HEADER_BYTES, pack_weight, packed_info, unpack_weight

__all__ = ["Layer", "prepare", "run_cpu"]

_INF = float("inf")


class Layer:
    """A convolution with its parameters, which are read where they lie.

    Values that are written to them count from the next call on. Safe from many threads.
    """

    __slots__ = ("_held", "_native", "_shapes", "_type", "addresses", "geometry")

    def __init__(
        self, geometry: LayerGeometry, packed: Tensor, scale: Tensor, bias: Tensor
    ) -> None:
        """
        Raises:
            TypeError, ValueError: parameters of another dtype or shape, or a geometry or grid that
                is none.
        """
        check_parameters(geometry.operator, packed, scale, bias)
        # Aliases: the memory stays, whatever becomes of the tensors.
        self._held = packed.detach(), scale.detach(), bias.detach()
        self.addresses = packed.data_ptr(), scale.data_ptr(), bias.data_ptr()
        self.geometry = g = geometry
        self._type = torch.uint8 if g.levels else torch.float32
        self._native = _C.Layer(
            g.channels,
            g.out_channels,
            g.by_name(),
            (self.addresses[0], packed.numel(), *self.addresses[1:]),
            (g.input_scale, g.input_zero_point, g.input_bits),
            (-_INF if g.lo is None else g.lo, _INF if g.hi is None else g.hi),
            g.grid,
            g.levels,
        )
        # Of the last call, input and output: nearly always those of the next one.
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] = (), ()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The operator's result for an input of the right dtype and channels, [N, C, H, W]."""
        dtype = x.dtype
        if dtype is not self._type:
            x = self._converted(x)
        nhwc = False
        if not x.is_contiguous():
            nhwc = x.is_contiguous(memory_format=torch.channels_last)
            if not nhwc:
                x = x.contiguous()
        shape, out_shape = self._shapes
        if x.shape != shape:
            shape, out_shape = tuple(x.shape), self.geometry.out_shape(x.shape)
            self._shapes = shape, out_shape
        layout = torch.channels_last if nhwc else torch.contiguous_format
        out = torch.empty(out_shape, dtype=self._type, memory_format=layout)
        added = 0
        if residual is not None:
            residual = self._addend(residual, out_shape, nhwc)
            added = residual.data_ptr()
        n, _, h, w = shape
        self._native.run(x.data_ptr(), n, h, w, nhwc, added, out.data_ptr(), get_num_threads())
        return out if dtype is self._type else out.to(dtype)

    def _converted(self, x: Tensor) -> Tensor:
        types = (torch.uint8,) if self.geometry.levels else FLOATS
        check_input(self.geometry.operator, x, types, None)
        return x.to(self._type)

    def _addend(self, residual: Tensor, shape: tuple[int, ...], nhwc: bool) -> Tensor:
        if residual.shape != shape:
            raise ValueError(
                f"adalayer::{self.geometry.operator}: expected a residual of shape {list(shape)}, "
                f"got {list(residual.shape)}"
            )
        layout = torch.channels_last if nhwc else torch.contiguous_format
        return residual.float().resolve_neg().contiguous(memory_format=layout)


class _Linear(Layer):
    """Over the last axis of a tensor of at least one."""

    __slots__ = ()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        dtype = x.dtype
        if dtype is not self._type:
            x = self._converted(x)
        x = x.contiguous()
        *rows, features = x.shape
        out = torch.empty((*rows, self.geometry.out_channels), dtype=self._type)
        count = x.numel() // features
        self._native.run(x.data_ptr(), count, 1, 1, True, 0, out.data_ptr(), get_num_threads())
        return out if dtype is self._type else out.to(dtype)


# Weights of transposed convolutions with their kernels flipped, by their canonical header, which
# holds a hash of the content. Small next to the layouts that the kernels derive from them.
_FLIPPED_LIMIT = 64
_flipped: OrderedDict[bytes, Tensor] = OrderedDict()
_flipped_lock = threading.Lock()


def _flipped_weight(packed: Tensor) -> Tensor:
    key = packed[:HEADER_BYTES].numpy().tobytes()
    with _flipped_lock:
        found = _flipped.get(key)
        if found is not None:
            _flipped.move_to_end(key)
            return found
    flipped = pack_weight(unpack_weight(packed).flip(2, 3), packed_info(packed)["bits"])
    with _flipped_lock:
        _flipped[key] = flipped
        while len(_flipped) > _FLIPPED_LIMIT:
            _flipped.popitem(last=False)
    return flipped


class _Transposed(Layer):
    """A convolution with the flipped kernel over the input, its pixels ``stride`` apart.

    The 0.0 between them is a level of every grid and adds nothing to the integer sums.
    """

    __slots__ = ("_around", "_inner")

    def __init__(
        self, geometry: LayerGeometry, packed: Tensor, scale: Tensor, bias: Tensor
    ) -> None:
        check_parameters(geometry.operator, packed, scale, bias)
        self._held = packed.detach(), scale.detach(), bias.detach()
        self.addresses = packed.data_ptr(), scale.data_ptr(), bias.data_ptr()
        self.geometry = geometry
        self._around = geometry.around()
        self._inner: tuple[Tensor, Layer] | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self.geometry.out_shape(x.shape)  # or an error that names the input, not what it becomes
        return self._convolution()(self._spread(x))

    def _convolution(self) -> Layer:
        packed, scale, bias = self._held
        flipped, inner = _flipped_weight(packed), self._inner
        if inner is None or inner[0] is not flipped:  # other weights have been loaded
            padding = tuple(max(p, 0) for p in self._around)
            inner = flipped, Layer(self.geometry.convolution(padding), flipped, scale, bias)
            self._inner = inner
        return inner[1]

    def _spread(self, x: Tensor) -> Tensor:
        layout = torch.channels_last if channels_last(x) else torch.contiguous_format
        n, channels, h, w = x.shape
        down, right = self.geometry.stride
        size = n, channels, (h - 1) * down + 1, (w - 1) * right + 1
        spread = torch.empty(size, dtype=x.dtype, memory_format=layout).zero_()
        spread[:, :, ::down, ::right] = x
        if min(self._around) >= 0:
            return spread
        top, left, bottom, right = (max(-p, 0) for p in self._around)
        spread = spread[:, :, top : spread.shape[2] - bottom, left : spread.shape[3] - right]
        return spread.contiguous(memory_format=layout)


def prepare(geometry: LayerGeometry, packed: Tensor, scale: Tensor, bias: Tensor) -> Layer:
    """A layer of any kind; errors as :class:`Layer`."""
    kind = {"linear": _Linear, "conv_transpose2d": _Transposed}.get(geometry.operator, Layer)
    return kind(geometry, packed, scale, bias)


def run_cpu(call: LayerCall) -> Tensor:
    """The result of an operator on CPU tensors."""
    return prepare(call.layer, call.packed, call.scale, call.bias)(call.x, call.residual)
