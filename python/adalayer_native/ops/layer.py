"""Layers on a CPU as values: checked once, then called with a tensor."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from adalayer_native import _C
from adalayer_native._recent import Recent
from adalayer_native.ops.checks import FLOATS, channels_last, check_input, check_parameters
from adalayer_native.ops.geometry import LayerCall, LayerGeometry
from adalayer_native.ops.machine import get_num_threads
from adalayer_native.ops.packing import HEADER_BYTES, pack_weight, packed_info, unpack_weight
from adalayer_native.rounding import group_size_of

__all__ = ["Layer", "run_cpu"]

_INF = float("inf")


class _Parameters:
    """Packed weights, scale and bias of a layer, checked."""

    __slots__ = ("addresses", "bias", "packed", "scale")

    def __init__(self, operator: str, packed: Tensor, scale: Tensor, bias: Tensor) -> None:
        check_parameters(operator, packed, scale, bias)
        self.packed, self.scale, self.bias = packed, scale, bias
        self.addresses = packed.data_ptr(), packed.numel(), scale.data_ptr(), bias.data_ptr()

    def group_size(self, features: int) -> int:
        """Of scales in groups."""
        try:
            return group_size_of(features, self.scale.shape[1])
        except ValueError as error:
            raise ValueError(f"adalayer::linear: {error}") from None


class _Kernel:
    """A geometry that runs with any parameters."""

    def __init__(self, geometry: LayerGeometry) -> None:
        self.geometry = g = geometry
        self.type = torch.uint8 if g.levels else torch.float32
        self.native = _C.Layer(
            g.channels,
            g.out_channels,
            g.by_name(),
            (g.input_scale, g.input_zero_point, g.input_bits),
            (-_INF if g.lo is None else g.lo, _INF if g.hi is None else g.hi),
            g.grid,
            g.levels,
        )
        # Of the last call, input and output: nearly always those of the next one.
        self.shapes: tuple[tuple[int, ...], tuple[int, ...]] = (), ()

    def run(self, x: Tensor, held: _Parameters, residual: Tensor | None) -> Tensor:
        dtype = x.dtype
        if dtype is not self.type:
            x = self.converted(x)
        nhwc = False
        if not x.is_contiguous():
            nhwc = x.is_contiguous(memory_format=torch.channels_last)
            if not nhwc:
                x = x.contiguous()
        shape, out_shape = self.shapes
        if x.shape != shape:
            shape, out_shape = tuple(x.shape), self.geometry.out_shape(x.shape)
            self.shapes = shape, out_shape
        layout = torch.channels_last if nhwc else torch.contiguous_format
        out = torch.empty(out_shape, dtype=self.type, memory_format=layout)
        added = 0
        if residual is not None:
            residual = self.addend(residual, out_shape, layout)
            added = residual.data_ptr()
        size = shape[0], shape[2], shape[3]
        addresses = held.addresses
        self.native.run(
            addresses, x.data_ptr(), size, nhwc, added, out.data_ptr(), get_num_threads()
        )
        return out if dtype is self.type else out.to(dtype)

    def converted(self, x: Tensor) -> Tensor:
        types = (torch.uint8,) if self.geometry.levels else FLOATS
        check_input(self.geometry.operator, x, types, None)
        return x.to(self.type)

    def addend(
        self, residual: Tensor, shape: tuple[int, ...], layout: torch.memory_format
    ) -> Tensor:
        if residual.shape != shape:
            raise ValueError(
                f"adalayer::{self.geometry.operator}: expected a residual of shape {list(shape)}, "
                f"got {list(residual.shape)}"
            )
        return residual.float().resolve_neg().contiguous(memory_format=layout)


class _Linear(_Kernel):
    """Over the last axis of a tensor of at least one."""

    def run(self, x: Tensor, held: _Parameters, residual: Tensor | None) -> Tensor:
        dtype = x.dtype
        if dtype is not self.type:
            x = self.converted(x)
        x = x.contiguous()
        *rows, features = x.shape
        out = torch.empty((*rows, self.geometry.out_channels), dtype=self.type)
        size = x.numel() // features, 1, 1
        addresses = held.addresses
        self.native.run(addresses, x.data_ptr(), size, True, 0, out.data_ptr(), get_num_threads())
        return out if dtype is self.type else out.to(dtype)


class _LinearInGroups(_Linear):
    """A linear layer whose scales are ``[out_features, groups]``."""

    def __init__(self, geometry: LayerGeometry) -> None:
        self.geometry, self.type = geometry, torch.float32

    def run(self, x: Tensor, held: _Parameters, residual: Tensor | None) -> Tensor:
        dtype, g = x.dtype, self.geometry
        if dtype is not self.type:
            x = self.converted(x)
        x = x.contiguous()
        *rows, features = x.shape
        out = torch.empty((*rows, g.out_channels))
        if out.numel():
            packed, size, scale, bias = held.addresses
            _C.linear(
                (x.numel() // features, features, g.out_channels, held.group_size(features)),
                (packed, size),
                (scale, bias),
                (g.input_scale, g.input_zero_point, g.input_bits),
                (-_INF if g.lo is None else g.lo, _INF if g.hi is None else g.hi),
                (x.data_ptr(), out.data_ptr()),
                get_num_threads(),
            )
        return out if dtype is self.type else out.to(dtype)


# Weights of transposed convolutions with their kernels flipped, by their canonical header, which
# holds a hash of the content. Small next to the layouts that the kernels derive from them.
_flipped: Recent[bytes, Tensor] = Recent(64)


def _flipped_weight(packed: Tensor) -> Tensor:
    def flipped() -> Tensor:
        return pack_weight(unpack_weight(packed).flip(2, 3), packed_info(packed)["bits"])

    return _flipped.get_or(packed[:HEADER_BYTES].numpy().tobytes(), flipped)


class _Transposed(_Kernel):
    """A convolution with the flipped kernel over the input, its pixels ``stride`` apart.

    The 0.0 between them is a level of every grid and adds nothing to the integer sums.
    """

    def __init__(self, geometry: LayerGeometry) -> None:
        self.geometry = geometry
        around = geometry.around()
        top, left, bottom, right = (max(p, 0) for p in around)
        self.inner = _Kernel(geometry.convolution((top, left, bottom, right)))
        self.cut = [max(-p, 0) for p in around]

    def run(self, x: Tensor, held: _Parameters, residual: Tensor | None) -> Tensor:
        self.geometry.out_shape(x.shape)  # or an error that names the input, not what it becomes
        flipped = _flipped_weight(held.packed)
        turned = _Parameters(self.geometry.operator, flipped, held.scale, held.bias)
        return self.inner.run(self._spread(x), turned, None)

    def _spread(self, x: Tensor) -> Tensor:
        layout = torch.channels_last if channels_last(x) else torch.contiguous_format
        n, channels, h, w = x.shape
        down, along = self.geometry.stride
        size = n, channels, (h - 1) * down + 1, (w - 1) * along + 1
        spread = torch.empty(size, dtype=x.dtype, memory_format=layout).zero_()
        spread[:, :, ::down, ::along] = x
        if not any(self.cut):
            return spread
        top, left, bottom, right = self.cut
        spread = spread[:, :, top : spread.shape[2] - bottom, left : spread.shape[3] - right]
        return spread.contiguous(memory_format=layout)


@lru_cache(maxsize=4096)
def _kernel(geometry: LayerGeometry, in_groups: bool = False) -> _Kernel:
    if in_groups:
        return _LinearInGroups(geometry)
    kind = {"linear": _Linear, "conv_transpose2d": _Transposed}.get(geometry.operator, _Kernel)
    return kind(geometry)


class Layer:
    """A geometry and the parameters that it runs with, which are read where they lie.

    Values that are written to them count from the next call on. Safe from many threads.
    """

    __slots__ = ("_held", "_kernel", "geometry")

    def __init__(
        self, geometry: LayerGeometry, packed: Tensor, scale: Tensor, bias: Tensor
    ) -> None:
        """
        Raises:
            TypeError, ValueError: parameters of another dtype or shape, or a geometry or grid that
                is none.
        """
        self.geometry = geometry
        # Aliases: the memory stays, whatever becomes of the tensors.
        tensors = packed.detach(), scale.detach(), bias.detach()
        self._held = _Parameters(geometry.operator, *tensors)
        self._kernel = _kernel(geometry, scale.dim() == 2)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The operator's result for an input of the right dimensions and channels."""
        return self._kernel.run(x, self._held, residual)

    def holds(self, packed: Tensor, scale: Tensor, bias: Tensor) -> bool:
        """Whether its parameters lie where these tensors have theirs."""
        _, size, *_ = addresses = self._held.addresses
        return addresses == (packed.data_ptr(), size, scale.data_ptr(), bias.data_ptr())


def run_cpu(call: LayerCall) -> Tensor:
    """The result of an operator on CPU tensors."""
    held = _Parameters(call.layer.operator, call.packed, call.scale, call.bias)
    return _kernel(call.layer, call.scale.dim() == 2).run(call.x, held, call.residual)
