"""What enters and leaves the layers of the float model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import Inputs

__all__ = ["entropy_bits", "observe"]

BINS = 256  # of a histogram: as many as an 8-bit tensor has levels


def observe(
    model: nn.Module,
    layers: dict[str, Any],
    x: Inputs,
    visit: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Run the model once and call ``visit(name, input, output)`` at every call of a layer.

    Args:
        model: in eval mode.
        layers: the layers of interest by name; ``visit`` may call them, too.
        x: one batch.
        visit: sees the tensors before anything works on them in place.
    """
    busy = False

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            nonlocal busy
            if busy:  # the visitor itself calls the layer
                return
            busy = True
            try:
                visit(name, inputs[0], output)
            finally:
                busy = False

        return hook

    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            x(model)
    finally:
        for handle in handles:
            handle.remove()


def entropy_bits(values: Tensor, bins: int = BINS) -> float:
    """``-sum p_k log2 p_k`` over equal bins from the smallest to the largest value, in bits.

    0 for an empty or constant tensor, 8 for values that fill all of 256 bins alike.
    """
    flat = values.detach().float().reshape(-1)
    if flat.numel() == 0:
        return 0.0
    low, high = float(flat.min()), float(flat.max())
    if not high > low:
        return 0.0
    counts = torch.histc(flat.cpu(), bins, low, high).double()
    share = counts[counts > 0] / counts.sum()
    return float(-(share * share.log2()).sum()) + 0.0
