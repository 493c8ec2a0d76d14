"""What can be decided for one layer: bits, sparsity, and where the zeros lie."""

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
    """

    bits: int | None
    sparsity: float = 0.0
    pattern: str = UNSTRUCTURED

    @property
    def name(self) -> str:
        """What it goes by in files of measurements."""
        text = f"{self.bits} {self.sparsity:g}"
        return text if self.pattern == UNSTRUCTURED else f"{text} {self.pattern}"

    @property
    def values(self) -> list[Any]:
        """As JSON values; the pattern only where there is one."""
        start: list[Any] = [self.bits, round(self.sparsity, 6)]
        return start if self.pattern == UNSTRUCTURED else [*start, self.pattern]

    def arguments(self) -> tuple[Any, ...]:
        """What functions of the caller's own get: bits and sparsity, and a pattern if any."""
        return self[:2] if self.pattern == UNSTRUCTURED else tuple(self)


# A decision for every layer; a pair of bits and sparsity will do where one is asked for.
Choice = dict[str, Option]
Choices = Mapping[str, "Option | tuple[int | None, float]"]


def option_of(entry: LayerPlan) -> Option:
    """What a plan says about a layer."""
    return Option(entry.bits, entry.sparsity, entry.pattern)
