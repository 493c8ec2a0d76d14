"""What can be decided for one layer: bits, sparsity, where the zeros lie, bits of its input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..plan import LayerPlan

__all__ = ["Choice", "Choices", "Option", "option_of"]

UNSTRUCTURED = "unstructured"


class Option(NamedTuple):
    """One option of a layer.

    Attributes:
        bits: 2 to 8; ``None`` stays float.
        sparsity: share of zeros.
        pattern: one of ``adalayer_native.plan.PATTERNS``; without zeros ``"unstructured"``.
        activation_bits: of the layer's input; ``None``: as of all layers.
    """

    bits: int | None
    sparsity: float = 0.0
    pattern: str = UNSTRUCTURED
    activation_bits: int | None = None

    @property
    def name(self) -> str:
        """What it goes by in files of measurements."""
        text = f"{self.bits} {self.sparsity:g}"
        if self.pattern != UNSTRUCTURED:
            text += f" {self.pattern}"
        return text if self.activation_bits is None else f"{text} a{self.activation_bits}"

    @property
    def values(self) -> list[Any]:
        """As JSON values; pattern and bits of the input only where they say something."""
        start: list[Any] = [self.bits, round(self.sparsity, 6)]
        if self.activation_bits is not None:
            return [*start, self.pattern, self.activation_bits]
        return start if self.pattern == UNSTRUCTURED else [*start, self.pattern]

    @property
    def weight(self) -> Option:
        """The same weight with an input as of all layers."""
        return self._replace(activation_bits=None)

    def arguments(self) -> tuple[Any, ...]:
        """What functions of the caller's own get: bits and sparsity, and a pattern if any."""
        return self[:2] if self.pattern == UNSTRUCTURED else self[:3]


# A decision for every layer; a pair of bits and sparsity will do where one is asked for.
Choice = dict[str, Option]
Choices = Mapping[str, "Option | tuple[int | None, float]"]


def option_of(entry: LayerPlan, activation_bits: int = 8) -> Option:
    """What a plan says about a layer, where the inputs of all have ``activation_bits``."""
    own = None if entry.activation_bits == activation_bits else entry.activation_bits
    return Option(entry.bits, entry.sparsity, entry.pattern, own)
