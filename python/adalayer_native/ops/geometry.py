"""What a layer is but for its weights, built by name from the arguments of its operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adalayer_native.operations import geometry
from adalayer_native.ops.checks import FLOATS, check_input

__all__ = [
    "LAYER_OPERATORS",
    "LayerCall",
    "LayerGeometry",
    "call_of",
    "conv_out_shape",
    "transposed_out_size",
]

LAYER_OPERATORS = ("conv2d", "conv2d_u8", "conv_transpose2d", "linear")

_Pair = tuple[int, int]
_Four = tuple[int, int, int, int]


class LayerGeometry(NamedTuple):
    """The geometry of a layer, the grids at both ends and its clamp.

    A linear layer is a 1 x 1 convolution over images of one pixel.

    Attributes:
        operator: its name in ``torch.ops.adalayer``, which its errors begin with.
        padding: top, left, bottom, right.
        output_padding: bottom and right, of a transposed convolution; None for all others.
        lo, hi: bounds of the result, None for none.
        grid: scale, zero point and bits of a result that is rounded onto a grid, else None.
        levels: input and result are u8 levels rather than floats: the input's on a grid of step 1,
            the result's on `grid`, and lo and hi count from its zero point.
    """

    operator: str
    channels: int
    out_channels: int
    kernel_size: _Pair
    stride: _Pair
    padding: _Four
    dilation: _Pair
    groups: int
    input_scale: float
    input_zero_point: int
    input_bits: int
    lo: float | None
    hi: float | None
    output_padding: _Pair | None = None
    grid: tuple[float, int, int] | None = None
    levels: bool = False

    @classmethod
    def of(
        cls, operator: str, channels: int, out_channels: int, given: Mapping[str, Any]
    ) -> LayerGeometry:
        """From the arguments of a layer operator by name; those that are tensors do not matter.

        Raises:
            ValueError: bounds or a zero point of levels that are none, an output padding that is
                not smaller than the stride or the dilation, a stride below 1.
        """
        if operator == "linear":
            given = {**given, **_ONE_PIXEL}
        padding, extra = tuple(given["padding"]), None
        if operator == "conv_transpose2d":
            padding, extra = (*padding, *padding), tuple(given["output_padding"])
        levels = operator == "conv2d_u8"
        bits = given.get("output_bits", 0)
        found = cls(
            operator,
            channels,
            out_channels,
            tuple(given["kernel_size"]),
            tuple(given["stride"]),
            padding,
            tuple(given["dilation"]),
            given["groups"],
            given.get("input_scale", 1.0),
            given["input_zero_point"],
            given.get("input_bits", 8),
            given["lo"],
            given["hi"],
            extra,
            (given["output_scale"], given["output_zero_point"], bits) if bits else None,
            levels,
        )
        found._check_output_padding()
        return found._from_levels(given["output_zero_point"]) if levels else found

    def _from_levels(self, zero_point: int) -> LayerGeometry:
        lo, hi = self.lo, self.hi
        if lo is None or hi is None or not 0 <= lo <= hi <= 255 or not 0 <= zero_point <= 255:
            raise ValueError(
                f"adalayer::{self.operator}: expected 0 <= lo <= hi <= 255 and a zero point in "
                f"0…255, got lo={lo}, hi={hi}, output_zero_point={zero_point}"
            )
        return self._replace(
            lo=float(lo - zero_point), hi=float(hi - zero_point), grid=(1.0, zero_point, 8)
        )

    def _check_output_padding(self) -> None:
        if self.output_padding is None:
            return
        if min(self.stride) < 1 or min(self.dilation) < 1:
            raise ValueError(
                f"adalayer::{self.operator}: stride and dilation must be at least 1, "
                f"got {list(self.stride)} and {list(self.dilation)}"
            )
        for extra, *steps in zip(self.output_padding, self.stride, self.dilation, strict=True):
            if extra < 0 or extra >= max(steps):
                raise ValueError(
                    f"adalayer::{self.operator}: output_padding must be at least 0 and smaller "
                    f"than stride {list(self.stride)} or dilation {list(self.dilation)}, "
                    f"got {list(self.output_padding)}"
                )

    def out_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """The result's for an input ``[N, C, H, W]``.

        Raises:
            ValueError: there is none: the kernel is larger than the padded input.
        """
        if self.output_padding is None:
            return conv_out_shape(
                shape, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation
            )
        h, w = (
            size + extra
            for size, extra in zip(
                transposed_out_size(
                    shape[2:], self.kernel_size, self.stride, self.padding, self.dilation
                ),
                self.output_padding,
                strict=True,
            )
        )
        if h < 1 or w < 1:
            raise ValueError(
                f"adalayer::{self.operator}: an input of {list(shape)} with padding "
                f"{list(self.padding[:2])} leaves no output"
            )
        return shape[0], self.out_channels, h, w

    def by_name(self) -> dict[str, int]:
        """The geometry with the names of the engine's table of operations; not to be changed."""
        return _by_name(self.kernel_size, self.stride, self.padding, self.dilation, self.groups)

    def around(self) -> _Four:
        """Of a transposed convolution: the padding of the ordinary one that it is.

        That has the flipped kernel and goes over the input with its pixels `stride` apart. Of a
        negative padding so much of that input is cut off.
        """
        assert self.output_padding is not None
        top, left = (
            self.dilation[axis] * (self.kernel_size[axis] - 1) - self.padding[axis]
            for axis in range(2)
        )
        return top, left, top + self.output_padding[0], left + self.output_padding[1]

    def convolution(self, padding: _Four) -> LayerGeometry:
        """That ordinary convolution."""
        return self._replace(stride=(1, 1), padding=padding, output_padding=None)


_by_name = lru_cache(maxsize=1024)(geometry)

_ONE_PIXEL: dict[str, Any] = {
    "kernel_size": (1, 1),
    "stride": (1, 1),
    "padding": (0, 0, 0, 0),
    "dilation": (1, 1),
    "groups": 1,
}


def conv_out_shape(
    shape: Sequence[int],
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """``[N, O, H, W]`` of a convolution over ``[N, C, H, W]``; `padding`: top, left, bottom, right.

    Python's one place for the formula that C++ has in ``ConvShape`` (csrc/reference/spec.hpp).

    Raises:
        ValueError: a stride below 1, or a kernel larger than the padded input.
    """
    if min(stride) < 1:
        raise ValueError(f"adalayer::conv2d: stride must be at least 1, got {list(stride)}")
    top, left, bottom, right = padding
    h = (shape[2] + top + bottom - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
    w = (shape[3] + left + right - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1
    if h < 1 or w < 1:
        raise ValueError(
            f"adalayer::conv2d: an input of {list(shape)} with padding {list(padding)} is "
            f"smaller than the dilated kernel {list(kernel_size)}, dilation {list(dilation)}"
        )
    return shape[0], out_channels, h, w


def transposed_out_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> _Pair:
    """Height and width of a transposed convolution's result for an input of `size`, without output
    padding; below 1 there is none."""
    h, w = (
        (size[axis] - 1) * stride[axis]
        - 2 * padding[axis]
        + dilation[axis] * (kernel_size[axis] - 1)
        + 1
        for axis in range(2)
    )
    return h, w


class LayerCall(NamedTuple):
    """A call of a layer operator, its arguments told apart."""

    x: Tensor
    layer: LayerGeometry
    packed: Tensor
    scale: Tensor
    bias: Tensor
    residual: Tensor | None


@cache
def _schema(operator: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of an operator's arguments in their order, and the values of those that may be left
    out."""
    arguments = getattr(torch.ops.adalayer, operator).default._schema.arguments
    usual = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return tuple(a.name for a in arguments), usual


def _named(operator: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names, usual = _schema(operator)
    return {**usual, **dict(zip(names, args, strict=False)), **kwargs}


@lru_cache(maxsize=4096)
def _known(operator: str, channels: int, out_channels: int, *rest: Any) -> LayerGeometry:
    given = _named(operator, (None, None, None, None, *rest), {})
    return LayerGeometry.of(operator, channels, out_channels, given)


def _geometry_of(operator: str, channels: int, out_channels: int, rest: list[Any]) -> LayerGeometry:
    """Of a call, by what follows its four tensors in the schema's order."""
    key = [tuple(a) if type(a) is list else a for a in rest]
    try:
        return _known(operator, channels, out_channels, *key)
    except TypeError:  # sizes that stand for any number cannot be looked up
        return _known.__wrapped__(operator, channels, out_channels, *key)


_RESIDUAL = 14  # its place among the arguments of conv2d


def call_of(operator: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LayerCall:
    """The call that an operator's arguments are.

    Raises:
        TypeError, ValueError: the input's dtype or dimensions; see also :meth:`LayerGeometry.of`.
    """
    given, residual = None, None
    if kwargs or (len(args) > _RESIDUAL and operator == "conv2d"):
        given = _named(operator, args, kwargs)
        x, packed, scale, bias = (given[name] for name in _schema(operator)[0][:4])
        residual = given.get("residual")
    else:
        x, packed, scale, bias, *rest = args
    linear = operator == "linear"
    types = (torch.uint8,) if operator == "conv2d_u8" else FLOATS
    check_input(operator, x, types, None if linear else 4)
    if linear and x.dim() == 0:
        raise ValueError("adalayer::linear: expected an input of at least one dimension")
    channels, out_channels = x.shape[-1 if linear else 1], scale.shape[0]
    if given is None:
        geometry = _geometry_of(operator, channels, out_channels, rest)
    else:
        geometry = LayerGeometry.of(operator, channels, out_channels, given)
    return LayerCall(x, geometry, packed, scale, bias, residual)
