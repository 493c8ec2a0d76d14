"""Gradients as integers of few bits: unbiased, packed, and back.

A gradient is cut into blocks, each with the largest of its magnitudes as its scale, and rounded to
``2^(bits - 1) - 1`` levels on either side of zero, up or down by chance, so that the expected value
is the gradient itself (QSGD: Alistarh et al. 2017, with layer-wise widths as in QODA: Nguyen et al.
2024). The integers are packed as weights are: bit-planes, or the nonzeros behind a mask, whichever
is smaller, with a checksum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adalayer_native import ops
from adalayer_native.errors import FileFormatError

__all__ = ["BLOCK", "decoded", "encoded", "levels_of", "rounding_variance"]

BLOCK = 1024  # values of a scale
_WORD = 8  # bytes of the length in front of the packed integers


def levels_of(bits: int) -> int:
    """The largest level; the smallest is its negative, so that the grid has a zero."""
    return 2 ** (bits - 1) - 1


def _blocks(values: Tensor) -> Tensor:
    """Rows of a block each, zeros behind the last value."""
    flat = values.reshape(-1)
    short = -len(flat) % BLOCK
    return torch.nn.functional.pad(flat, (0, short)).view(-1, BLOCK)


def encoded(
    values: Tensor,
    bits: int,
    generator: torch.Generator | None = None,
    *,
    nearest: bool = False,
) -> Tensor:
    """The bytes of a gradient.

    Args:
        values: float32, any shape, finite.
        bits: 2 to 8.
        generator: of the rounding.
        nearest: round to the nearest level instead, which is biased, and loses less.

    Returns:
        uint8: length of what is packed, a float32 scale per block of 1,024, packed integers.
    """
    rows = _blocks(values)
    scales = rows.abs().amax(1) / levels_of(bits)
    steps = rows / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    chance = torch.full_like(rows, 0.5) if nearest else torch.rand(rows.shape, generator=generator)
    levels = (steps + chance).floor_().clamp_(-levels_of(bits), levels_of(bits))
    packed = ops.pack_weight(levels.to(torch.int8), bits)
    length = torch.tensor([len(packed)], dtype=torch.int64)
    return torch.cat([length.view(torch.uint8), scales.view(torch.uint8), packed])


def decoded(data: Tensor, count: int) -> tuple[Tensor, int]:
    """The values that bytes begin with, float32 ``[count]``, and how many bytes they take.

    Raises:
        FileFormatError: the bytes are not those of so many values.
    """
    rows = -(-count // BLOCK)
    head = _WORD + 4 * rows
    if len(data) < head:
        raise FileFormatError(f"a gradient of {count} values: {len(data)} bytes are too few")
    length = int(data[:_WORD].clone().view(torch.int64))
    if not 0 < length <= len(data) - head:
        raise FileFormatError(f"a gradient of {count} values: no {length} bytes follow")
    scales = data[_WORD:head].clone().view(torch.float32)
    levels = ops.unpack_weight(data[head : head + length]).flatten(1)
    if levels.shape != (rows, BLOCK):
        raise FileFormatError(
            f"a gradient of {count} values: expected {rows} blocks, got {list(levels.shape)}"
        )
    values = levels.float() * scales.unsqueeze(1)
    return values.flatten()[:count], head + length


def rounding_variance(values: Tensor) -> float:
    """What rounding to one level on either side adds to the variance, summed over the values.

    Between two levels that are ``s`` apart it is at most ``s^2 / 4``, and ``s^2 / 6`` on average.
    With L levels on either side ``s`` is the block's largest magnitude over L: what is returned is
    for one level, and L of them have this over L squared.
    """
    rows = _blocks(values.float())
    return float(rows.abs().amax(1).square().double().sum()) * BLOCK / 6
