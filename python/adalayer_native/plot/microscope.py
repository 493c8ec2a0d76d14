"""What quantization does to every layer: signal to noise, and what is clipped."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from .style import INK, LINE, MANY, MUTED, bits_bar, canvas, colour_of, finish, heading, names_below

if TYPE_CHECKING:
    from ..microscope import Comparison, Row

__all__ = ["microscope"]

EXACT = 90.0  # dB that stand for no error at all; float32 has little more


def microscope(
    comparison: Comparison,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    dpi: int = 150,
) -> Any:
    """Draw the layers and values of a comparison in the network's order.

    Above, signal to noise in dB: bars (colour by bits) with the float network's inputs, a line with
    the inputs that the compressed network has, and marks for rounding the weights or the inputs
    alone. Below, the share of values that the grid clips. Rows with a finding are named in ink, the
    others in grey.

    Args:
        comparison: from :func:`adalayer_native.compare`.
        path: a PNG or SVG file; default: it is not saved.
        title: heading.
        dpi: dots per inch of the 12 inch wide picture.

    Returns:
        The matplotlib Figure.

    Raises:
        ValueError: a comparison without rows, or another file name. OSError: it cannot be written.
    """
    rows = sorted(comparison.rows, key=lambda row: row.place)
    if not rows:
        raise ValueError("cannot draw a comparison without rows")
    names = [row.name.removeprefix("act_quant.") for row in rows]
    many = len(rows) > MANY
    below = 0.75 if many else 0.4 + 0.055 * min(28, max(map(len, names)))
    tall, flat, gap = 2.6, 0.9, 0.15
    height = 0.75 + tall + gap + flat + below
    figure = canvas(12, height)
    left, wide = 0.065, 0.845
    upper = figure.add_axes((left, (below + flat + gap) / height, wide, tall / height))
    lower = figure.add_axes((left, below / height, wide, flat / height))
    _errors(upper, rows)
    _clipped(lower, rows)
    names_below(upper, names)
    upper.set_xticks([])
    for text in upper.texts:  # groups are named once, below
        text.set_visible(False)
    names_below(lower, names)
    for label, row in zip(lower.get_xticklabels(), rows, strict=False):
        label.set_color(INK if row.finding else MUTED)
        label.set_weight("bold" if row.finding else "normal")
    bits_bar(figure, (0.94, (below + flat + gap) / height, 0.012, tall / height))
    found = sum(bool(row.finding) for row in rows)
    line = comparison.summary() + (f"; {found} finding{'s' if found != 1 else ''}" if found else "")
    heading(figure, title or "What quantization does to every layer", line, left=0.03)
    return finish(figure, path, dpi)


def _decibels(error: float | None) -> float:
    """Signal to noise within what the axis shows; NaN where there is none."""
    if error is None:
        return math.nan
    if error <= 0:
        return EXACT
    return min(EXACT, -10 * math.log10(error)) if error < math.inf else 0.0


def _errors(axes: Any, rows: list[Row]) -> None:
    places = range(len(rows))
    own = [_decibels(row.own) for row in rows]
    axes.bar(places, own, width=0.82, color=[colour_of(_shade(row)) for row in rows], label=None)
    marks = (
        ("weights", [row.weights for row in rows], "^"),
        ("inputs", [row.activations for row in rows], "v"),
    )
    size = 3 if len(rows) > MANY else 5
    for label, errors, mark in marks:
        axes.plot(
            places, [_decibels(error) for error in errors], mark, color=INK, markersize=size,
            markerfacecolor="none", markeredgewidth=0.8, label=f"{label} alone",
        )  # fmt: skip
    axes.plot(
        places, [_decibels(row.accumulated) for row in rows], "o-", color=MUTED, linewidth=1.2,
        markersize=size - 1, label="accumulated",
    )  # fmt: skip
    axes.set_ylabel("signal to noise, dB", fontsize=8.5, color=INK)
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), fontsize=8, frameon=False, ncol=3, labelcolor=INK
    )
    _plain(axes)


def _shade(row: Row) -> int | None:
    """Bits that a bar's colour stands for: of the weights, of a value those of its grid."""
    return row.input_bits if row.kind == "value" else row.bits


def _clipped(axes: Any, rows: list[Row]) -> None:
    shares = [100 * (row.clipped or 0.0) for row in rows]
    axes.bar(range(len(rows)), shares, width=0.82, color=MUTED)
    axes.set_ylim(0, max(1.0, 1.1 * max(shares)))
    axes.set_ylabel("clipped, %", fontsize=8.5, color=INK)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.tick_params(axis="y", labelsize=8, colors=INK, length=3)
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side == "bottom")
        axes.spines[side].set_color(LINE)
