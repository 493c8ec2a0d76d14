"""Canonical packed weights: device-neutral bytes with a header of 64."""

from __future__ import annotations

import torch
from torch import Tensor

from adalayer_native import _C
from adalayer_native.errors import FileFormatError

__all__ = ["HEADER_BYTES", "pack_weight", "packed_info", "unpack_weight"]

HEADER_BYTES: int = _C.HEADER_BYTES


def pack_weight(weight: Tensor, bits: int) -> Tensor:
    """Packs integer weights into the canonical form.

    Args:
        weight: int8, ``[O, I/groups, KH, KW]`` or ``[O, I]``, in -2^(bits-1) … 2^(bits-1)-1.
        bits: 2 to 8.

    Returns:
        uint8 ``[64 + payload]``: header and bit-planes of all weights, of the 16 x 64 blocks that
        are not zero behind a mask of blocks, or of the nonzeros behind a bitmask: whichever is
        smallest.

    Raises:
        TypeError: if ``weight`` is not int8. ValueError: shape, bits or a value out of range.
    """
    if weight.dtype != torch.int8:
        raise TypeError(f"pack_weight expects int8 weights, got {weight.dtype}")
    if weight.dim() not in (2, 4):
        raise ValueError(f"pack_weight expects [O, I] or [O, I, KH, KW], got {list(weight.shape)}")
    w = weight.detach().cpu().resolve_neg().contiguous()
    shape = tuple(w.shape) if w.dim() == 4 else (w.shape[0], w.shape[1], 1, 1)
    packed = _C.pack(w.data_ptr(), w.numel(), bits, *shape)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def unpack_weight(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_weight`: int8 ``[O, I/groups, KH, KW]``.

    Raises:
        FileFormatError: if the bytes are damaged, saying how.
    """
    packed = _packed_bytes(packed)
    shape = packed_info(packed)["shape"]
    try:
        raw = _C.unpack(packed.data_ptr(), packed.numel())
    except ValueError as error:
        raise FileFormatError(str(error)) from None
    return torch.frombuffer(bytearray(raw), dtype=torch.int8).reshape(shape)


def packed_info(packed: Tensor) -> dict:
    """Header of packed weights: bits, encoding, shape, stored (weights), payload_bytes.

    Raises:
        FileFormatError: if the header does not describe the buffer.
    """
    packed = _packed_bytes(packed)
    try:
        return dict(_C.header(packed.data_ptr(), packed.numel()))
    except ValueError as error:
        raise FileFormatError(str(error)) from None


def _packed_bytes(packed: Tensor) -> Tensor:
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise FileFormatError(
            f"packed weights are uint8 of one dimension, got {packed.dtype} {list(packed.shape)}"
        )
    return packed.detach().cpu().resolve_neg().contiguous()
