"""Attention between values on grids, by the engine's own steps (csrc/reference/attention.hpp)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from adalayer_native import _C
from adalayer_native.ops.machine import get_num_threads

__all__ = [
    "additive_mask",
    "fake_attention",
    "fake_key_mask",
    "grid_attention",
    "key_mask",
    "score_scale",
    "total_scale",
]


def score_scale(query_scale: float, key_scale: float, scale: float) -> float:
    """What a sum of products of levels is multiplied with: rounded to float32 once."""
    return float(torch.tensor(query_scale * key_scale * scale, dtype=torch.float32))


def total_scale(scale: float, factor: Tensor | None) -> float:
    """Of a score: a number, and one that a parameter of the model decides."""
    return scale if factor is None else scale * float(factor)


def additive_mask(mask: Tensor) -> Tensor:
    """A mask as float32 numbers that are added to scores; of a bool one, False hides a key."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -math.inf)
    return mask.float()


@torch.no_grad()
def key_mask(keys: Tensor, constant: Tensor, zero: float, other: float, several: bool) -> Tensor:
    """The lower one of a constant mask and of a number per key: float32 ``[N, heads, Q, K]``.

    Args:
        keys: ``[N, ...]`` of K elements each. Of integers and bools 0 means ``zero``, 1 means
            ``other``; floats count as they are.
        constant: float32 ``[heads or 1, Q or 1, K]``.
        several: all other integers mean ``other``, too; else they are an error.
    """
    flat = keys.reshape(keys.shape[0], 1, 1, -1)
    if flat.is_floating_point():
        return torch.minimum(constant, flat.float())
    if not several and bool(((flat != 0) & (flat != 1)).any()):
        raise ValueError("expected a mask of zeros and ones")
    return torch.minimum(constant, torch.where(flat != 0, other, zero))


def fake_key_mask(
    keys: Tensor, constant: Tensor, zero: float, other: float, several: bool
) -> Tensor:
    """Shape of :func:`key_mask`."""
    return constant.new_empty((keys.shape[0], *constant.shape))


def _levels(x: Tensor, qparams: Tensor) -> Tensor:
    """uint8 ``[images, tokens, heads * depth]`` of a tensor ``[..., heads, tokens, depth]``."""
    scale, zero_point, bits = qparams.tolist()
    x = x.flatten(0, -4) if x.dim() > 3 else x.unsqueeze(0)
    rows = x.float().cpu().transpose(1, 2).flatten(2).contiguous()
    levels: Tensor = torch.ops.adalayer.quantize(rows, scale, int(zero_point), int(bits))
    return levels


def _mask(mask: Tensor, query: Tensor, keys: int) -> Tensor:
    """float32 ``[images or 1, heads or 1, queries, keys]``, contiguous."""
    mask, lead = additive_mask(mask).cpu(), query.shape[:-3]
    mask = mask.reshape((1,) * (query.dim() - mask.dim()) + mask.shape)
    if mask.dim() > 4:
        shared = all(size == 1 for size in mask.shape[:-3])
        mask = mask.expand(*(mask.shape[:-3] if shared else lead), *mask.shape[-3:])
        mask = mask.flatten(0, -4)
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    return mask.expand(-1, -1, query.shape[-2], keys).contiguous()


def _pitches(mask: Tensor) -> tuple[int, int]:
    """Elements from image to image and from head to head; 0 where all share one."""
    images, heads, *matrix = mask.shape
    size = math.prod(matrix)
    return (heads * size if images > 1 else 0), (size if heads > 1 else 0)


def _by_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    factor: Tensor,
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor],
) -> Tensor:
    """The heads one after the other, each with its own factor."""
    heads, shared = query.shape[-3], query.shape[-3] // key.shape[-3]
    found = []
    for head, own in enumerate(factor.reshape(-1)):
        keys = slice(head // shared, head // shared + 1)
        part = mask
        if mask is not None and mask.dim() > 2 and mask.shape[-3] == heads:
            part = mask[..., head : head + 1, :, :]
        items = (query[..., head : head + 1, :, :], key[..., keys, :, :], value[..., keys, :, :])
        found.append(attention(*items, part, own))
    return torch.cat(found, -3)


@torch.no_grad()
def grid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    query_qparams: Tensor,
    key_qparams: Tensor,
    value_qparams: Tensor,
    factor: Tensor | None = None,
) -> Tensor:
    """``F.scaled_dot_product_attention`` with weights that are levels beside their row's largest.

    Args:
        query: float ``[..., heads, tokens, depth]`` on a grid, as the other two.
        key, value: of the same leading sizes; they may have fewer heads (``enable_gqa``).
        attn_mask: broadcasts to ``[..., heads, queries, keys]``; bool, or added to scores.
        query_qparams, key_qparams, value_qparams: float32 ``[3]``: scale, zero point and bits.
        factor: one number that multiplies the scale, or one per head.
    """
    if factor is not None and factor.numel() > 1:
        rest = (is_causal, scale, query_qparams, key_qparams, value_qparams)

        def one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, own: Tensor) -> Tensor:
            found: Tensor = grid_attention(q, k, v, mask, *rest, own)
            return found

        return _by_head(query, key, value, attn_mask, factor, one)
    tokens, depth = query.shape[-2:]
    keys, width = value.shape[-2:]
    heads, key_heads = (1, 1) if query.dim() < 3 else (query.shape[-3], key.shape[-3])
    lead = query.shape[:-3]
    images = math.prod(lead)
    out = torch.empty(images, tokens, heads, width)
    if out.numel():
        grids = [item.tolist() for item in (query_qparams, key_qparams, value_qparams)]
        operands = [
            _levels(item if item.dim() > 2 else item.unsqueeze(0), grid)
            for item, grid in zip(
                (query, key, value), (query_qparams, key_qparams, value_qparams), strict=True
            )
        ]
        mask = None if attn_mask is None else _mask(attn_mask, query, keys)
        pitches = (0, 0) if mask is None else _pitches(mask)
        _C.attention(
            (images, tokens, keys, heads, key_heads, depth, width),
            (int(grids[0][1]), int(grids[1][1]), int(grids[2][1])),
            (score_scale(grids[0][0], grids[1][0], total_scale(scale, factor)), grids[2][0]),
            is_causal,
            (0 if mask is None else mask.data_ptr(), *pitches),
            [t.data_ptr() for t in (*operands, out)],
            get_num_threads(),
        )
    out = out.reshape(*lead, tokens, heads, width).transpose(-3, -2)
    return out.reshape(*query.shape[:-1], width).to(value)


def fake_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    query_qparams: Tensor,
    key_qparams: Tensor,
    value_qparams: Tensor,
    factor: Tensor | None = None,
) -> Tensor:
    """Shape of :func:`grid_attention`."""
    heads = query.shape[-3] if query.dim() > 2 else 1
    out = value.new_empty(*query.shape[:-3], query.shape[-2], heads, value.shape[-1])
    return out.transpose(-3, -2).reshape(*query.shape[:-1], value.shape[-1])
