"""Floating-point operations of every layer, from the shapes that really occur."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["count_flops"]


@torch.no_grad()
def count_flops(model: nn.Module, layers: dict[str, Any], x: torch.Tensor) -> dict[str, float]:
    """FLOPs per sample and layer, a multiply-add counting 2; a layer called twice counts twice.

    Args:
        model: in eval mode.
        layers: conv2d and linear modules by name.
        x: one batch, ``[N, ...]`` with N at least 1.
    """
    flops = dict.fromkeys(layers, 0.0)
    handles = []

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            # Weights per output value: in_channels / groups * kh * kw, or in_features.
            fan_in = layers[name].weight[0].numel() if layers[name].weight.shape[0] else 0
            flops[name] += 2.0 * fan_in * output.numel() / x.shape[0]

        return hook

    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(hook_for(name)))
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return flops
