"""The columns of a run's table, shared by the page and the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..plan import float_text, protected_text
from .run import Layer, Run

__all__ = ["COLUMNS", "Column", "notes", "run_table", "summary", "total_of"]


@dataclass(frozen=True)
class Column:
    """A heading, the value to sort by, and the text to show.

    Attributes:
        heading: a few words.
        value: a number, text, or ``None`` where it is not known.
        show: the value in words.
        total: whether the values add up.
    """

    heading: str
    value: Callable[[Layer], float | int | str | None]
    show: Callable[[Layer], str]
    total: bool = False

    @property
    def number(self) -> bool:
        """Whether it is sorted as numbers."""
        return self.heading not in ("layer", "kind", "pattern", "kernel")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


COLUMNS = (
    Column("layer", lambda e: e.name, lambda e: e.name),
    Column("kind", lambda e: e.kind, lambda e: e.kind),
    Column("weights", lambda e: e.params, lambda e: f"{e.params:,}", total=True),
    Column(
        "bits",
        lambda e: 32 if e.bits is None else e.bits,
        lambda e: "float" if e.bits is None else str(e.bits),
    ),
    Column(
        "input bits",
        lambda e: 32 if e.bits is None else e.input_bits,
        lambda e: "float" if e.bits is None else str(e.input_bits),
    ),
    Column("pruned %", lambda e: 100 * e.sparsity, lambda e: f"{100 * e.sparsity:.1f}"),
    Column(
        "pattern",
        lambda e: e.pattern if e.sparsity else "",
        lambda e: e.pattern if e.sparsity else "",
    ),
    Column("error", lambda e: e.error, lambda e: _short(e.error)),
    Column(
        "µs",
        lambda e: e.microseconds,
        lambda e: "" if e.microseconds is None else f"{e.microseconds:.1f}",
        total=True,
    ),
    Column("bytes", lambda e: e.bytes, lambda e: f"{e.bytes:,}", total=True),
    Column(
        "energy nJ",
        lambda e: e.energy_nj,
        lambda e: f"{e.energy_nj:,.1f}" + ("*" if e.extrapolated else ""),
        total=True,
    ),
    Column("kernel", lambda e: e.kernel, lambda e: e.kernel),
)


def _figures(value: float) -> str:
    """Three digits, and never a power of ten in the middle of a sentence."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def summary(run: Run) -> list[tuple[str, str, str]]:
    """``(figure, what it is, against what)`` of the run; what is not known is left out."""
    data = run.data
    found = []
    if data.get("accuracy") is not None:
        before = data.get("float_accuracy")
        change = "" if before is None else f"float {before:.2f} %, {data['accuracy'] - before:+.2f}"
        found.append((f"{data['accuracy']:.2f} %", "test accuracy", change))
    share = data["bytes"] / data["float_bytes"]
    found.append(
        (f"{data['bytes']:,} B", "saved file", f"{100 * share:.2f} % of {data['float_bytes']:,} B")
    )
    found.append(
        (f"{data['average_bits']:.2f}", "bits per weight", "of 32; pruned weights count 0")
    )
    # Measured in turn with the float network; a run without that has the sum of the operations.
    whole = data.get("engine_ms")
    timed = data.get("engine", {}).get("microseconds")
    if whole:
        found.append((f"{whole:.3g} ms", "per image in the engine", _against(data, whole)))
    elif timed:
        found.append((f"{timed / 1000:.3g} ms", "per image in the engine", "sum of its operations"))
    native = data.get("native_ms")
    if native:
        found.append((f"{native:.3g} ms", "per image as torch module", _against(data, native)))
    energy, before = data.get("modelled_energy_uj"), data.get("modelled_float_energy_uj")
    if energy and before:
        against = f"float {_figures(before)} µJ, × {before / energy:.1f}"
        found.append((f"{_figures(energy)} µJ", "modelled energy per image", against))
    for key, words in (("compression", "for the compression"), ("native", "per 1,000 images")):
        use = (data.get("energy") or {}).get(key)
        if use:
            co2 = use.get("co2_grams")
            more = use["label"] + ("" if co2 is None else f", {co2:.2g} g CO2")
            found.append((f"{_figures(use['joules'])} J", f"energy {words}", more))
    return found


def _against(data: dict[str, Any], milliseconds: float) -> str:
    before = data.get("float_ms")
    return f"float {before:.3g} ms, × {before / milliseconds:.2f}" if before else ""


def run_table(run: Run) -> Table:
    """The same rows in a terminal, with the summary above and the notes below."""
    title = ", ".join(f"{figure} {what}" for figure, what, _ in summary(run))
    table = Table(title=escape(f"{run.data['model']}, {run.data['method']}: {title}"))
    for column in COLUMNS:
        table.add_column(
            column.heading, justify="right" if column.number else "left", overflow="fold"
        )
    for layer in run.layers:
        table.add_row(*(escape(column.show(layer)) for column in COLUMNS))
    table.add_section()
    table.add_row("total", *(total_of(column, run) for column in COLUMNS[1:]))
    rest = run.data.get("float_rest") or []
    lines = [notes(run)]
    if rest:
        parts = {part["name"]: part for part in rest}
        lines.append(f"stays in float: {float_text(parts)}")
    protected = protected_text(run.plan)
    if protected:
        lines.append(f"protected: {protected}")
    fitted = fitted_text(run.data)
    if fitted:
        lines.append(f"model fitted to the layers, {fitted}")
    table.caption = escape("\n".join(lines))
    return table


def fitted_text(data: dict[str, Any]) -> str:
    """How far the energy model is off that was fitted to the layers as they were measured."""
    fit = data.get("fitted_model")
    if not fit:
        return ""
    rows = sorted(fit["rows"], key=lambda row: -abs(row["residual"]))
    worst = ", ".join(f"{row['name']} {100 * row['residual']:+.0f} %" for row in rows[:3])
    terms = ", ".join(
        f"{name} {value:.3g}" for name, value in fit["coefficients"].items() if value > 0
    )
    return (
        f"in {fit['unit']}: {terms}; residuals of {100 * fit['error']:.0f} % (root mean square), "
        f"largest {worst}"
    )


def total_of(column: Column, run: Run) -> str:
    """The sum of a column over the layers; empty where there is none."""
    if not column.total:
        return ""
    values = [v for v in map(column.value, run.layers) if isinstance(v, (int, float))]
    if not values:
        return ""
    whole = isinstance(values[0], int)
    return f"{sum(values):,}" if whole else f"{sum(values):,.1f}"


def notes(run: Run) -> str:
    """What the columns mean."""
    data = run.data
    return (
        f"error: {run.error_name}; µs: one image, {data['threads']} thread"
        f"{'s' if data['threads'] != 1 else ''}, {data['isa']}; energy: a model per operation in "
        f"nanojoules per image, * scaled to widths below those published"
    )
