"""Tables of one number per layer and option: errors and latencies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .._progress import ProgressBar
from ..errors import CalibrationError, PlanError
from ..plan import MAX_BITS, MIN_BITS, unknown_layer
from .options import UNSTRUCTURED, Option
from .store import Store

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["BITS", "SPARSITIES", "LayerTable", "Measured"]

BITS = tuple(range(MIN_BITS, MAX_BITS + 1))
# Below 30 % a bitmask saves nothing at 2 and 3 bits and little at more; in between, the file
# grows almost linearly, and errors slowly.
SPARSITIES = (0.0, 0.3, 0.45, 0.6, 0.75, 0.9)
_LEAST = 1e-12  # nats: what stands for an error of nothing in a logarithm


@dataclass
class LayerTable:
    """One number per layer, width and sparsity, per pattern of zeros and bits of the input.

    Attributes:
        what: ``"error"`` or ``"latency"``.
        unit: of the numbers.
        layers: names.
        bits: widths.
        sparsities: shares of zeros.
        values: float64 ``[layers, widths, sparsities]``; NaN where an option saves nothing that
            the budget counts and was therefore not measured.
        constant: what is there whatever the layers do (operations that are no layers).
        about: how it was measured.
        pattern: where the zeros lie.
        activation_bits: of the layers' inputs; ``None``: as of all layers, whatever is chosen here.
        others: tables of other patterns and bits of the input, of the same layers and widths. Of
            patterns, sparsity 0 is that of the unstructured table with the same input.
    """

    what: str
    unit: str
    layers: tuple[str, ...]
    bits: tuple[int, ...]
    sparsities: tuple[float, ...]
    values: np.ndarray
    constant: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)
    pattern: str = UNSTRUCTURED
    others: tuple[LayerTable, ...] = ()
    activation_bits: int | None = None

    @property
    def parts(self) -> tuple[LayerTable, ...]:
        """The table itself, and those of other patterns and inputs."""
        return (self, *self.others)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns that it knows."""
        return tuple(dict.fromkeys(part.pattern for part in self.parts))

    def of(self, pattern: str, activation_bits: int | None = None) -> LayerTable:
        """The part of one pattern and one input.

        Raises:
            PlanError: one that the table lacks.
        """
        for part in self.parts:
            if part.pattern == pattern and part.activation_bits == activation_bits:
                return part
        if activation_bits is not None and pattern in self.patterns:
            known = sorted({p.activation_bits for p in self.parts if p.activation_bits is not None})
            raise PlanError(
                f"the {self.what} table holds inputs of {known} bits, not {activation_bits}"
            )
        raise PlanError(f"the {self.what} table holds patterns {self.patterns}, not {pattern!r}")

    def value(
        self,
        layer: str,
        bits: int,
        sparsity: float = 0.0,
        pattern: str = UNSTRUCTURED,
        activation_bits: int | None = None,
    ) -> float:
        """One entry.

        Raises:
            PlanError: an unknown layer, or an option that the table lacks.
        """
        if (pattern, activation_bits) != (self.pattern, self.activation_bits):
            part = self.of(pattern, activation_bits)
            return part.value(layer, bits, sparsity, pattern, activation_bits)
        if layer not in self.layers:
            raise PlanError(unknown_layer(layer, list(self.layers)))
        if bits not in self.bits or sparsity not in self.sparsities:
            raise PlanError(
                f"the {self.what} table holds widths {self.bits} and sparsities "
                f"{self.sparsities}, not {bits} and {sparsity}"
            )
        position = (
            self.layers.index(layer), self.bits.index(bits), self.sparsities.index(sparsity),
        )  # fmt: skip
        return float(self.values[position])

    def options(self) -> list[Option]:
        """The columns of :meth:`flat`; unpruned weights are there once."""
        return [
            Option(b, s, part.pattern if s > 0 else UNSTRUCTURED, part.activation_bits)
            for part in self.parts
            for b in part.bits
            for s, used in zip(part.sparsities, part._columns(), strict=True)
            if used
        ]

    def _columns(self) -> list[bool]:
        """Sparsities that are options of this part."""
        return [s > 0 or self.pattern == UNSTRUCTURED for s in self.sparsities]

    def flat(self) -> np.ndarray:
        """The values as ``[layers, options]``."""
        count = len(self.layers)
        parts = [part.values[..., part._columns()].reshape(count, -1) for part in self.parts]
        return np.concatenate(parts, axis=1)

    def mapped(self, function: Callable[[np.ndarray], np.ndarray]) -> LayerTable:
        """The table with a function of the values ``[layers, widths, sparsities]``."""
        others = tuple(other.mapped(function) for other in self.others)
        return replace(self, values=function(self.values), others=others)

    def finer(self, step: float, *, logarithmic: bool, extra: Sequence[float] = ()) -> LayerTable:
        """The table with sparsities in steps of ``step`` added, interpolated between neighbours.

        ``extra`` are further sparsities to add.

        Linear in the sparsity, of the values or of their logarithms. What lies beyond the last
        measured sparsity of a width stays out. Other patterns stay as they are: blocks go one by
        one, and a layer may have few of them, so that there is nothing in between.
        """
        others = tuple(
            other.finer(step, logarithmic=logarithmic, extra=extra)
            if other.pattern == UNSTRUCTURED
            else other
            for other in self.others
        )
        top = max(self.sparsities)
        steps = [round(k * step, 6) for k in range(int(top / step + 1e-9) + 1)]
        sparsities = tuple(sorted({*self.sparsities, *steps, *extra}))
        values = np.full((*self.values.shape[:2], len(sparsities)), np.nan)
        order = np.argsort(self.sparsities)
        points = np.array(self.sparsities)[order]
        for row, layer in enumerate(self.values):
            for column, line in enumerate(layer):
                known = np.isfinite(line[order])
                y = line[order][known]
                if logarithmic:
                    y = np.log(np.maximum(y, _LEAST))
                at = np.array(sparsities)
                found = np.interp(at, points[known], y)
                found = np.exp(found) if logarithmic else found
                values[row, column] = np.where(at <= points[known].max(), found, np.nan)
                for position, sparsity in enumerate(self.sparsities):  # what was measured stays
                    if np.isfinite(line[position]):
                        values[row, column, sparsities.index(sparsity)] = line[position]
        return replace(self, sparsities=sparsities, values=values, others=others)

    def as_dict(self) -> dict[str, Any]:
        """JSON values; entries that were not measured are ``None``."""
        values = [
            [[None if np.isnan(v) else float(v) for v in row] for row in layer]
            for layer in self.values
        ]
        return {
            "what": self.what,
            "unit": self.unit,
            "layers": list(self.layers),
            "bits": list(self.bits),
            "sparsities": list(self.sparsities),
            "values": values,
            "constant": self.constant,
            "about": self.about,
            "pattern": self.pattern,
            "activation_bits": self.activation_bits,
            "others": [other.as_dict() for other in self.others],
        }

    def table(self, sparsity: float = 0.0) -> Table:
        """The entries at one sparsity as a rich table, a row per layer."""
        from rich.table import Table

        title = f"{self.what.capitalize()} in {self.unit}, {100 * sparsity:g} % pruned"
        if sparsity > 0 and self.pattern != UNSTRUCTURED:
            title += f" ({self.pattern})"
        if self.activation_bits is not None:
            title += f", inputs of {self.activation_bits} bits"
        rest = f"besides the layers: {self.constant:.3g}" if self.constant else None
        table = Table(title=title, caption=rest)
        table.add_column("Layer")
        for bits in self.bits:
            table.add_column(f"{bits} bits", justify="right")
        column = self.sparsities.index(sparsity)
        for name, rows in zip(self.layers, self.values, strict=True):
            cells = ("" if np.isnan(v) else f"{v:.3g}" for v in rows[:, column])
            table.add_row(name, *cells)
        return table

    def __rich__(self) -> Table:
        return self.table(self.sparsities[0])


@dataclass(frozen=True)
class Measured:
    """What a table holds, and how an entry of it is measured.

    Attributes:
        what, unit, layers: see :class:`LayerTable`.
        measure: ``(layer, option) -> number``.
        store: entries that are there already are not measured again.
    """

    what: str
    unit: str
    layers: Sequence[str]
    measure: Callable[[str, Option], float]
    store: Store

    def value(self, layer: str, option: Option) -> float:
        """One entry, measured now or before.

        Raises:
            CalibrationError: a number that is not finite.
        """
        entry = f"{layer} {option.name}"
        if entry not in self.store:
            value = float(self.measure(layer, option))
            if not np.isfinite(value):
                raise CalibrationError(
                    f"layer {layer!r} at {option.bits} bits and sparsity {option.sparsity:g}: the "
                    f"{self.what} is {value}; expected a finite number"
                )
            self.store[entry] = value
        return self.store[entry]

    def title(self, pattern: str, activation_bits: int | None) -> str:
        """What is being done, for a progress bar."""
        name = "measuring latencies" if self.what == "latency" else f"measuring {self.what}s"
        if pattern != UNSTRUCTURED:
            name += f", {pattern}"
        return name if activation_bits is None else f"{name}, {activation_bits}-bit inputs"

    def table(
        self,
        bits: Sequence[int],
        sparsities: Sequence[float],
        pattern: str,
        activation_bits: int | None,
        wanted: np.ndarray | None = None,
        *,
        progress: bool = True,
    ) -> LayerTable:
        """One table, its entries measured one after the other.

        Args:
            bits, sparsities, pattern, activation_bits: of the table.
            wanted: bool ``[layers, widths, sparsities]``; the others become NaN. Default: all.
            progress: show a progress bar.
        """
        shape = (len(self.layers), len(bits), len(sparsities))
        wanted = np.ones(shape, dtype=bool) if wanted is None else wanted
        values = np.full(shape, np.nan)
        title, total = self.title(pattern, activation_bits), int(wanted.sum())
        with self.store, ProgressBar(title, total, unit="option", enabled=progress) as bar:
            for row, i, j in np.argwhere(wanted).tolist():
                sparsity, layer = sparsities[j], self.layers[row]
                where = pattern if sparsity > 0 else UNSTRUCTURED
                option = Option(bits[i], sparsity, where, activation_bits)
                values[row, i, j] = self.value(layer, option)
                bar.advance(1, layer)
        return LayerTable(
            self.what,
            self.unit,
            tuple(self.layers),
            tuple(bits),
            tuple(sparsities),
            values,
            pattern=pattern,
            activation_bits=activation_bits,
        )

    def tables(
        self,
        bits: Sequence[int],
        sparsities_of: Callable[[str], Sequence[float]],
        patterns: Sequence[str],
        *,
        wanted: Mapping[str, np.ndarray] | None = None,
        inputs: Sequence[int | None] = (None,),
        progress: bool = True,
    ) -> LayerTable:
        """One table of the parts of all patterns and bits of inputs.

        ``sparsities_of`` and ``wanted`` are by pattern.
        """
        parts = [
            self.table(
                bits,
                sparsities_of(pattern),
                pattern,
                activation_bits,
                None if wanted is None else wanted[pattern],
                progress=progress,
            )
            for activation_bits in inputs
            for pattern in patterns
        ]
        parts[0].others = tuple(parts[1:])
        return parts[0]
