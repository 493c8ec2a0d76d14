"""Tables for people: the comparison of variants, and the paper's Figure 6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ..errors import PlanError
from ..importance.scores import LayerScores
from ..plan import Plan

__all__ = ["Result", "comparison_table", "error_table", "figure6_table"]


@dataclass
class Result:
    """One variant of a model, measured.

    Attributes:
        name: what the row is called.
        accuracy: right answers in per cent, 0 to 100.
        bytes: size of the saved file.
        ms: milliseconds per image.
    """

    name: str
    accuracy: float
    bytes: int
    ms: float | None = None


def comparison_table(
    results: Sequence[Result | Mapping[str, Any]], *, title: str = "Comparison"
) -> Table:
    """Accuracy, bytes, times smaller, ms per image, times faster; the first row is the base.

    A row is a :class:`Result` or a mapping with its fields.
    """
    rows = [row if isinstance(row, Result) else Result(**row) for row in results]
    headings = (
        "Variant", "Accuracy %", "Change", "Bytes on disk", "Times smaller", "ms per image",
        "Times faster",
    )  # fmt: skip
    lines = []
    for position, row in enumerate(rows):
        base = rows[0]
        lines.append(
            (
                row.name,
                f"{row.accuracy:.2f}",
                "" if position == 0 else f"{row.accuracy - base.accuracy:+.2f}",
                f"{row.bytes:,}",
                f"{base.bytes / row.bytes:.2f}" if row.bytes else "",
                "" if row.ms is None else f"{row.ms:.3f}",
                f"{base.ms / row.ms:.2f}" if row.ms and base.ms else "",
            )
        )
    table = Table(title=title)
    for i, heading in enumerate(headings):
        # As wide as its values: the headings wrap, so that the table fits 80 columns uncut.
        needed = max(len(text) for text in (*heading.split(), *(line[i] for line in lines)))
        table.add_column(heading, justify="right" if i else "left", width=needed)
    for line in lines:
        table.add_row(*line)
    return table


def figure6_table(plan: Plan, scores: LayerScores | None = None, *, title: str = "") -> Table:
    """The paper's Figure 6: parameters before and after, pruning, bits, accuracy contribution.

    "After" is before x (1 - P) x B / 32, as in the paper. The contribution is A, the drop of
    the layer over the largest drop.
    """
    table = Table(title=title or f"Layer by layer ({plan.method})")
    table.add_column("Layer")
    headings = ("Params K before", "Params K after", "Prune pct", "QuantBits", "AccContrib")
    for heading in headings:
        table.add_column(heading, justify="right")
    known = {name: s.A for name, s in scores.layers.items()} if scores is not None else {}
    if scores is None and plan.scores is not None:
        known = {name: values["A"] for name, values in plan.scores.items() if "A" in values}
    for name, layer in plan.layers.items():
        table.add_row(
            name,
            f"{layer.params / 1e3:.5g}",
            f"{layer.params_after / 1e3:.5g}",
            f"{100 * layer.sparsity:.2f}",
            "float" if layer.bits is None else str(layer.bits),
            f"{known[name]:.3f}" if name in known else "",
        )
    before = sum(layer.params for layer in plan.layers.values())
    after = sum(layer.params_after for layer in plan.layers.values())
    table.add_section()
    table.add_row("total", f"{before / 1e3:.5g}", f"{after / 1e3:.5g}", "", "", "")
    return table


def error_table(plan: Plan, *, title: str = "") -> Table:
    """Which layer loses the accuracy: the predicted loss increase of every layer, and its share.

    Raises:
        PlanError: the plan says nothing about errors (method ``"optimal"`` writes them).
    """
    errors = {n: s["E"] for n, s in (plan.scores or {}).items() if "E" in s}
    if not errors:
        raise PlanError(f"a plan by method {plan.method!r} does not know its layers' errors")
    total = sum(errors.values())
    table = Table(title=title or f"Predicted loss increase, layer by layer ({plan.method})")
    table.add_column("Layer")
    for heading in ("Bits", "Pruned %", "Loss", "Share %"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for name, layer in plan.layers.items():
        error = errors.get(name)
        share = error / total if error is not None and total > 0 else 0.0
        table.add_row(
            name,
            "float" if layer.bits is None else str(layer.bits),
            f"{100 * layer.sparsity:.0f}",
            "" if error is None else f"{error:.2g}",
            "" if error is None else f"{100 * share:.1f}",
            "█" * round(20 * share),
        )
    table.add_section()
    table.add_row("total", f"{plan.average_bits:.2f}", "", f"{total:.2g}", "", "")
    return table
