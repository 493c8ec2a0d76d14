"""What a run changes with time: learning rate, sparsity, bits.

Time runs from 0 at the first step to 1 at the end of the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from adalayer_native.plan import MAX_BITS
from adalayer_native.pruning.masks import magnitude_mask
from adalayer_native.quantization.fake_quant import QuantLayer
from adalayer_native.quantization.graph import layers_of, metadata

__all__ = ["CompressionSchedule", "cubic_sparsity", "half_cosine", "lowered_bits"]

# Changes of the masks on the way to the plan.
_STAGES = 50


def half_cosine(time: float) -> float:
    """1 at the start, 0 at the end."""
    return 0.5 * (1.0 + math.cos(math.pi * min(max(time, 0.0), 1.0)))


def cubic_sparsity(final: float, time: float) -> float:
    """Zhu and Gupta (2017): ``final * (1 - (1 - time)^3)``; the most is pruned early on."""
    return final * (1.0 - (1.0 - min(max(time, 0.0), 1.0)) ** 3)


def lowered_bits(final: int, extra: int, time: float) -> int:
    """From ``final + extra`` bits (8 at most) down to ``final`` in equal spans of time.

    With ``extra = 2`` the first third has two bits more, the second one more.
    """
    rest = extra - math.floor(min(max(time, 0.0), 1.0) * (extra + 1))
    return min(final + max(rest, 0), MAX_BITS)


@dataclass
class _Target:
    layer: QuantLayer
    bits: int
    sparsity: float  # 0 where the mask is not the schedule's business


class CompressionSchedule:
    """Takes sparsity and bits of a prepared model to those of its plan, and ends exactly there.

    Only unstructured magnitude masks grow gradually; a layer whose pruned weights are zero already
    (a repaired one) or whose mask has a pattern keeps its mask.

    Args:
        prepared: the model, at its plan.
        ramp: share of the run after which the plan is reached; 0 does nothing.
        extra_bits: of every weight at the start, above the plan's.
        gradual: whether masks grow.
    """

    def __init__(self, prepared: nn.Module, *, ramp: float, extra_bits: int, gradual: bool) -> None:
        self.ramp, self.extra_bits = ramp, extra_bits
        self.stage = -1
        self.targets: list[_Target] = []
        entries = metadata(prepared, "layers")
        if ramp <= 0.0:
            return
        for name, layer in layers_of(prepared).items():
            sparsity = entries[name]["sparsity"]
            free = entries[name].get("pattern", "unstructured") == "unstructured"
            grows = (
                gradual
                and free
                and layer.mask is not None
                and sparsity > 0.0
                and bool((layer.weight.detach() * ~layer.mask).any())
            )
            if grows or extra_bits:
                self.targets.append(_Target(layer, layer.bits, sparsity if grows else 0.0))

    @property
    def done(self) -> bool:
        """Whether the plan is reached."""
        return not self.targets or self.stage >= _STAGES

    def resume(self, stage: int) -> None:
        """Go on at a stage whose masks and scales have been loaded: bits are all that lacks."""
        self.stage = stage
        for target in self.targets:
            target.layer.bits = self._bits(target)
            target.layer.dense_gradient = bool(target.sparsity) and not self.done

    def update(self, time: float) -> list[QuantLayer]:
        """Go to where the run should be; returns the layers whose scales were chosen anew."""
        if self.done:
            return []
        stage = min(int(time / self.ramp * _STAGES), _STAGES)
        if stage <= self.stage:
            return []
        self.stage = stage
        changed = []
        for target in self.targets:
            layer = target.layer
            if target.sparsity:
                share = cubic_sparsity(target.sparsity, stage / _STAGES)
                mask = magnitude_mask(layer.weight.detach(), share)
                layer.mask = torch.empty_like(layer.weight, dtype=torch.bool).copy_(mask)
                layer.dense_gradient = not self.done
            bits = self._bits(target)
            if bits != layer.bits or (stage == 0 and self.extra_bits):
                layer.bits = bits
                _choose_scales(layer)
                changed.append(layer)
        return changed

    def finish(self) -> list[QuantLayer]:
        """Reach the plan now, however far the run came."""
        return self.update(self.ramp)

    def _bits(self, target: _Target) -> int:
        return lowered_bits(target.bits, self.extra_bits, max(self.stage, 0) / _STAGES)


def _choose_scales(layer: QuantLayer) -> None:
    layer.refresh_scales()
    if layer.step is not None:
        layer.step.restart(layer.weight_scale)
