"""Work of every layer for one image, from the shapes that really occur."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..capture import Inputs

__all__ = ["Work", "count_flops", "layer_work"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Work:
    """What a layer does for one image, all of its calls together.

    Attributes:
        macs: multiply-accumulates.
        activations: values that enter and leave it.
    """

    macs: float = 0.0
    activations: float = 0.0


@torch.no_grad()
def layer_work(
    model: nn.Module, layers: dict[str, Any], x: Inputs | torch.Tensor
) -> dict[str, Work]:
    """Work per sample and layer; a layer called twice counts twice.

    Args:
        model: in eval mode.
        layers: convolutions, transposed or not, and linear modules by name.
        x: one batch of at least one sample.
    """
    work = {name: Work() for name in layers}
    batch = Inputs.of(x)
    count = batch.count
    handles = []

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            # Weights per value: in_channels / groups * kh * kw or in_features per output value;
            # a transposed convolution has out_channels / groups * kh * kw per input value.
            transposed = isinstance(module, _TRANSPOSED)
            values = inputs[0].numel() if transposed else output.numel()
            per_value = layers[name].weight[0].numel() if layers[name].weight.shape[0] else 0
            work[name].macs += per_value * values / count
            work[name].activations += (inputs[0].numel() + output.numel()) / count

        return hook

    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(hook_for(name)))
        batch(model)
    finally:
        for handle in handles:
            handle.remove()
    return work


def count_flops(
    model: nn.Module, layers: dict[str, Any], x: Inputs | torch.Tensor
) -> dict[str, float]:
    """FLOPs per sample and layer, a multiply-add counting 2; see :func:`layer_work`."""
    return {name: 2.0 * work.macs for name, work in layer_work(model, layers, x).items()}
