"""Bits of weights and activations that change while a model trains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import nn

from adalayer_native.errors import PlanError
from adalayer_native.plan import MAX_BITS, MIN_BITS
from adalayer_native.quantization.fake_quant import ActivationQuantizer, QuantLayer
from adalayer_native.quantization.graph import layers_of, metadata, quantizers_of
from adalayer_native.quantization.lsq import StepSize

__all__ = ["WidthSchedule", "change_input", "change_weight", "narrow_for_ranges"]


def narrow_for_ranges(prepared: nn.Module, widths: Sequence[int]) -> nn.Module:
    """Set the fewest bits that training with ``widths`` goes through, so that ranges suit them.

    To be called between ``prepare`` and ``calibrate``. Signals shrink from layer to layer where
    weights have few bits, so that the ranges of more bits may be far too wide; the other way round
    they are a little too narrow, which learned steps mend. :func:`finetune` with the same widths
    ends at the plan's bits; until then the model has others.

    Args:
        prepared: from :func:`prepare` with the last width; changed in place.
        widths: as for :func:`finetune`.

    Returns:
        ``prepared``.

    Raises:
        PlanError: as :class:`WidthSchedule`.
    """
    WidthSchedule(prepared, widths).resume(widths.index(min(widths)))
    return prepared


class WidthSchedule:
    """Takes every quantized layer and its activations through some widths, in equal times.

    Only activation quantizers that a quantized layer reads change; the others keep their bits.

    Args:
        prepared: the model, calibrated, its bits one of the widths (:func:`narrow_for_ranges`).
        widths: bits, first to last; ``None`` changes nothing.

    Raises:
        PlanError: no widths, one out of range, or a last one that is not the plan's.
    """

    def __init__(self, prepared: nn.Module, widths: Sequence[int] | None) -> None:
        self.widths = [] if widths is None else list(widths)
        self.position = -1
        self.layers = layers_of(prepared)
        self.quantizers = {}
        if widths is None:
            return
        if not self.widths:
            raise PlanError("finetune: widths must name at least one width")
        for width in self.widths:
            if isinstance(width, bool) or not isinstance(width, int):
                raise PlanError(f"finetune: widths must be whole numbers, got {width!r}")
            if not MIN_BITS <= width <= MAX_BITS:
                raise PlanError(
                    f"finetune: widths must be from {MIN_BITS} to {MAX_BITS}, got {width}"
                )
        last = self.widths[-1]
        known = quantizers_of(prepared)
        for name, entry in metadata(prepared, "layers").items():
            quantizer = known[entry["input"]]
            self.quantizers[entry["input"]] = quantizer
            if entry["bits"] != last or quantizer.bits not in self.widths:
                raise PlanError(
                    f"finetune: widths end at {last} bits, but layer {name!r} has "
                    f"{entry['bits']} bits and its input {quantizer.bits}"
                )

    @property
    def done(self) -> bool:
        """Whether the last width is reached."""
        return not self.widths or self.position >= len(self.widths) - 1

    def resume(self, position: int) -> None:
        """Go on at a position whose scales have been loaded: bits are all that lacks."""
        self.position = position
        if self.widths and position >= 0:
            for owner in (*self.layers.values(), *self.quantizers.values()):
                owner.bits = self.widths[position]

    def update(self, time: float) -> list[StepSize]:
        """Go to where the run should be; returns learned scales that begin anew."""
        if not self.widths:
            return []
        position = min(int(time * len(self.widths)), len(self.widths) - 1)
        if position <= self.position:
            return []
        self.position = position
        return list(self._change(self.widths[position]))

    def finish(self) -> list[StepSize]:
        """Reach the last width now, however far the run came."""
        return self.update(1.0)

    def _change(self, width: int) -> Iterator[StepSize]:
        for layer in self.layers.values():
            yield from change_weight(layer, width)
        for quantizer in self.quantizers.values():
            yield from change_input(quantizer, width)


def change_weight(layer: QuantLayer, width: int) -> Iterator[StepSize]:
    """Give a weight other bits; yields its learned scale, if any, which begins anew."""
    layer.bits = width
    layer.refresh_scales()
    if layer.step is not None:
        layer.step.restart(layer.weight_scale)
        yield layer.step


def change_input(quantizer: ActivationQuantizer, width: int) -> Iterator[StepSize]:
    """Give a stored tensor other bits; yields its learned scale, if any, which begins anew.

    Fewer levels cover a smaller range: steps go with the square root of their number, as those that
    learned step sizes start from do. With the range kept, two bits would leave most activations at
    zero, and training from scratch goes astray.
    """
    share = math.sqrt((2**width - 1) / (2**quantizer.bits - 1))
    low, high = (quantizer.scale * level * share for level in quantizer.constants()[2:])
    quantizer.bits = width
    quantizer.set_range(low, high)
    if quantizer.step is not None:
        quantizer.step.restart(quantizer.qparams[:1])
        yield quantizer.step
