"""What every node of an engine runs on, how wide it is, and what it costs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["Coverage", "Row"]


@dataclass(frozen=True)
class Row:
    """One node.

    Attributes:
        name: the layer or node, as the model calls it.
        op: operation.
        kind: where it runs: ``"native"``, on the engine's integer kernels; ``"float"``, a layer on
            the engine's float kernels; ``"torch"``.
        kernel: what runs: the instruction set and, of a convolution, the algorithm.
        bits: of the weights; 0 without weights, 32 of floats.
        input_bits: of the input's grid, where there are weights; else 0.
        microseconds: of one run of the measured batch; 0.0 if it was not measured.
        bytes: of the stored weights.
        macs: multiply-accumulates per image.
        why: the reason for running in torch; of a native layer with zeros, how they are used and
            what was measured when the engine was made; else empty.
    """

    name: str
    op: str
    kind: str
    kernel: str
    bits: int
    microseconds: float
    bytes: int
    macs: int
    why: str = ""
    input_bits: int = 0


@dataclass(frozen=True)
class Coverage:
    """All rows in the order of execution; prints as a table.

    Attributes:
        rows: one per node.
        batch: images per measured run.
        threads: of the measured run.
    """

    rows: tuple[Row, ...]
    batch: int
    threads: int

    @property
    def native_share(self) -> float:
        """Share of the multiply-accumulates that run on integer kernels, 0 to 1."""
        return self._share("native") if any(row.macs for row in self.rows) else 1.0

    @property
    def float_share(self) -> float:
        """Share of the multiply-accumulates that run in float32 inside the engine, 0 to 1."""
        return self._share("float")

    def _share(self, kind: str) -> float:
        total = sum(row.macs for row in self.rows)
        part = sum(row.macs for row in self.rows if row.kind == kind)
        return part / total if total else 0.0

    @property
    def microseconds(self) -> float:
        """Sum over the nodes."""
        return sum(row.microseconds for row in self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __rich__(self) -> Table:
        share = self.float_share
        floats = f", {100 * share:.2f} % in the engine's float kernels" if share else ""
        table = Table(
            title=f"{100 * self.native_share:.2f} % of multiply-accumulates native{floats}, "
            f"batch {self.batch}, {self.threads} threads"
        )
        for heading in ("Node", "Operation", "Runs", "Kernel"):
            table.add_column(heading)
        for heading in ("Bits", "Input", "µs", "Bytes", "MACs per image"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(
                escape(row.name),
                row.op,
                row.kind,
                escape(row.kernel + (f" ({row.why})" if row.why else "")),
                str(row.bits or ""),
                str(row.input_bits or ""),
                f"{row.microseconds:.1f}" if row.microseconds else "",
                f"{row.bytes:,}" if row.bytes else "",
                f"{row.macs:,}" if row.macs else "",
            )
        table.add_section()
        total_bytes = sum(row.bytes for row in self.rows)
        total_macs = sum(row.macs for row in self.rows)
        table.add_row(
            "total", "", "", "", "", "", f"{self.microseconds:.1f}", f"{total_bytes:,}",
            f"{total_macs:,}",
        )  # fmt: skip
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=160, color_system=None).print(self)
        return text.getvalue()
