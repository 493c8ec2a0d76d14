"""Operations of several layers, as networks have them: attention, windows, squeeze and excite."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import op


@op
def merge_tokens(module: nn.Module, x: Tensor) -> Tensor:
    """All tokens of all images as one batch."""
    return module(x.reshape(-1, x.shape[-1])).view(x.shape[0], x.shape[1], -1)


@op
def windows(module: nn.Module, x: Tensor, *, size: int) -> Tensor:
    """A layer over windows of an image, as in Swin: they join the batch and leave it again."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // size, size, w // size, size).permute(0, 2, 4, 3, 5, 1)
    x = module(x.reshape(-1, size * size, c)).reshape(b, h // size, w // size, size, size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h, w)


@op
def channels_last_layer(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@op
def heads(module: nn.Module, x: Tensor, *, count: int, form: str) -> Tensor:
    """Self-attention by hand; the layer gives queries, keys and values."""
    b, t, _ = x.shape
    q, k, v = module(x).reshape(b, t, 3, count, -1).permute(2, 0, 3, 1, 4)
    if form == "sdpa":
        x = F.scaled_dot_product_attention(q, k, v)
    else:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if form == "causal":
            allowed = torch.ones(t, t, dtype=torch.bool).tril()
            scores = scores.masked_fill(~allowed, float("-inf"))
        x = scores.softmax(-1) @ v
    return x.transpose(1, 2).reshape(b, t, -1)


@op
def excite(squeeze: nn.Module, expand: nn.Module, x: Tensor) -> Tensor:
    s = F.adaptive_avg_pool2d(x, 1)
    return x * torch.sigmoid(expand(F.relu(squeeze(s), inplace=True)))


@op
def both(first: nn.Module, second: nn.Module, x: Tensor, *, factors: tuple[float, ...]) -> Tensor:
    results = []
    for module, factor in zip([first, second], factors, strict=True):
        results.append(module(x) * factor)
    return sum(results)  # type: ignore[return-value]
