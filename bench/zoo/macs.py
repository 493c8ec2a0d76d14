"""Multiply-accumulates of a network, and of the layers that were quantized."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.zoo.entry import Example, call


def all_macs(model: nn.Module, example: Example) -> float:
    """Multiply-accumulates of everything that torch counts: convolutions and matrix products.

    oneDNN's fused recurrent layer, the fused encoder layer of ``nn.TransformerEncoder`` and fused
    attention are one operator each, of which nothing is counted; they are switched off meanwhile.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    counter = FlopCounterMode(display=False)
    try:
        with warnings.catch_warnings():
            # Switching it also touches options of devices that this torch may lack, and says so.
            warnings.simplefilter("ignore", UserWarning)
            with (
                torch.backends.mkldnn.flags(enabled=False),
                sdpa_kernel(SDPBackend.MATH),
                counter,
            ):
                call(model, example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2


def layer_macs(
    model: nn.Module, layers: Mapping[str, nn.Module], example: Example
) -> dict[str, float]:
    """Multiply-accumulates of single layers; one that is called twice counts twice.

    Args:
        model: what calls the layers.
        layers: some of its modules, by any name; each has a ``weight``.
        example: inputs of the model.
    """
    total = dict.fromkeys(layers, 0.0)

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            # One product per weight of an output channel and output value; a transposed
            # convolution spreads every input value over the weights of its input channel.
            spread = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d))
            values = inputs[0].numel() if spread else output.numel()
            total[name] += weight[0].numel() * values

        return hook

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return total
