"""Criterion "accuracy": how much the loss grows when one layer alone is quantized to few bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .batches import Batch, loss_of
from .registry import Probe, criterion
from .replay import Replay

__all__ = ["accuracy", "one_layer_quantized"]


def one_layer_quantized(probe: Probe, batch: Batch) -> Iterator[tuple[str, Any]]:
    """For every layer in turn, its name and the model's output with that layer alone quantized."""
    missing = {n: weight for n, weight in probe.quantized.items() if n not in probe.done}
    if missing:
        replay = Replay(probe.model, probe.layers, batch.x)
        for name, weight in missing.items():
            yield name, replay.run(name, weight)


@criterion("accuracy", unit="loss")
@torch.no_grad()
def accuracy(probe: Probe, batch: Batch) -> None:
    """``L(Q(W_l)) - L(W)``: loss with one layer quantized minus loss of the float model.

    The smooth form of what Gluska and Grobman (arXiv 2012.08420) do with the accuracy itself,
    which is criterion "accuracy_drop".
    """
    for name, output in one_layer_quantized(probe, batch):
        loss = loss_of(
            output, probe.output, batch.target, probe.loss_fn, pick=probe.pick, tokens=batch.tokens
        )
        probe.report(name, loss - probe.loss)
