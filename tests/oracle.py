"""Independent oracles for the kernels: numpy int64 sums and exact rational requantization."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Conv:
    """One convolution: the geometry that the tests draw."""

    n: int = 1
    c: int = 3
    h: int = 5
    w: int = 5
    o: int = 4
    kh: int = 3
    kw: int = 3
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def out_hw(self) -> tuple[int, int]:
        top, left, bottom, right = self.padding
        return (
            (self.h + top + bottom - self.dilation[0] * (self.kh - 1) - 1) // self.stride[0] + 1,
            (self.w + left + right - self.dilation[1] * (self.kw - 1) - 1) // self.stride[1] + 1,
        )

    @property
    def valid(self) -> bool:
        top, left, bottom, right = self.padding
        return (
            self.h + top + bottom >= self.dilation[0] * (self.kh - 1) + 1
            and self.w + left + right >= self.dilation[1] * (self.kw - 1) + 1
        )


def accumulate(conv: Conv, q: np.ndarray, w: np.ndarray, zero_point: int) -> np.ndarray:
    """int64 sums of w * (q - z) with padding at the zero point, [N, O, OH, OW]."""
    top, left, bottom, right = conv.padding
    a = q.astype(np.int64) - zero_point
    a = np.pad(a, ((0, 0), (0, 0), (top, bottom), (left, right)))
    oh, ow = conv.out_hw
    cg, og = conv.c // conv.groups, conv.o // conv.groups
    out = np.zeros((conv.n, conv.o, oh, ow), np.int64)
    for g in range(conv.groups):
        for ky in range(conv.kh):
            for kx in range(conv.kw):
                y0, x0 = ky * conv.dilation[0], kx * conv.dilation[1]
                window = a[
                    :,
                    g * cg : (g + 1) * cg,
                    y0 : y0 + (oh - 1) * conv.stride[0] + 1 : conv.stride[0],
                    x0 : x0 + (ow - 1) * conv.stride[1] + 1 : conv.stride[1],
                ]
                out[:, g * og : (g + 1) * og] += np.einsum(
                    "nchw,oc->nohw",
                    window,
                    w[g * og : (g + 1) * og, :, ky, kx].astype(np.int64),
                )
    return out


def fma32(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """a * b + c rounded once to float32: exact rational arithmetic, then one conversion."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    return round_to_float32(exact)


def round_to_float32(value: Fraction) -> np.float32:
    """Nearest float32, ties to even (values in the normal range, or zero)."""
    if value == 0:
        return np.float32(0)
    magnitude = abs(value)
    exponent = 0
    while magnitude >= 2:
        magnitude /= 2
        exponent += 1
    while magnitude < 1:
        magnitude *= 2
        exponent -= 1
    mantissa = round(magnitude * 2**23)  # Python rounds ties to even
    result = np.float32(np.ldexp(float(mantissa), exponent - 23))
    return -result if value < 0 else result


def requantize(
    acc: np.ndarray, scale: np.ndarray, bias: np.ndarray, lo: int, hi: int, zero_point: int
) -> np.ndarray:
    """Law 1: q = rne(clamp(fma(acc, scale, bias), lo - z, hi - z)) + z, channel axis 1."""
    out = np.empty(acc.shape, np.uint8)
    for index, value in np.ndenumerate(acc):
        c = index[1]
        y = fma32(np.float32(value), scale[c], bias[c])
        y = min(max(y, np.float32(lo - zero_point)), np.float32(hi - zero_point))
        out[index] = round(Fraction(float(y))) + zero_point
    return out
