"""The registry of criteria. A criterion is one file that registers one function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .batches import Batch, LossFn

__all__ = ["CRITERIA", "Probe", "criterion"]


@dataclass
class Probe:
    """What a criterion is given for each batch.

    Attributes:
        model: the float model, in eval mode, on its own device.
        layers: supported layers by name.
        quantized: per layer the dequantized weight at ``probe_bits``.
        loss_fn: the user's loss, or ``None``.
        done: results of this batch that a cache already holds, ``{layer: value}``; a criterion
            need not compute them again.
        report: to be called as ``report(layer, value)`` with every result of this batch; values
            are means over the batch.
    """

    model: nn.Module
    layers: dict[str, Any]
    quantized: dict[str, torch.Tensor]
    loss_fn: LossFn | None
    done: dict[str, float]
    report: Callable[[str, float], None]


# A criterion measures one batch and returns the float model's loss on it.
Criterion = Callable[[Probe, Batch], float]
CRITERIA: dict[str, Criterion] = {}


def criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Register a function as the criterion ``name``."""

    def register(function: Criterion) -> Criterion:
        CRITERIA[name] = function
        return function

    return register
