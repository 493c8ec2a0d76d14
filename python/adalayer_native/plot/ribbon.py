"""The architecture ribbon: one picture of where a plan spends its parameters and bits."""

from __future__ import annotations

import os
from typing import Any

from ..errors import PlanError
from ..plan import LayerPlan, Plan
from .style import (
    FLOAT_COLOUR,
    INK,
    LINE,
    MANY,
    MUTED,
    PAPER,
    bits_bar,
    brackets,
    canvas,
    colour_of,
    finish,
    groups,
    heading,
    is_dark,
    shortened,
)

__all__ = ["ribbon"]

# Hatch by pruned per cent: denser lines, more pruned.
_HATCHES = ((5, ""), (20, "/"), (40, "//"), (60, "////"), (101, "///////"))
_LEFT, _WIDTH = 0.03, 0.88  # of the ribbon, in widths of the figure
# Share of the ribbon that one letter of a label takes; segments too narrow for theirs are
# labelled above the ribbon, with a line.
_LETTER = 0.0066
_FIGURE = 12.0  # inches


def ribbon(
    plan: Plan,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    dpi: int = 150,
) -> Any:
    """Draw the plan as a ribbon.

    Each segment is a layer: its width is proportional to the parameters that are left,
    params x (1 - P) x B / 32, its colour says the bits (viridis, readable with colour-blindness
    and in grey), and its hatching gets denser with pruning. Beyond 40 layers a second strip gives
    every layer the same width, because in the first one small layers cannot be seen, and names
    stand for groups of layers.

    Args:
        plan: what to draw.
        path: a PNG or SVG file, replaced as a whole; default: it is not saved.
        title: heading; default names the plan's method and average bits.
        dpi: dots per inch of the 12 inch wide picture.

    Returns:
        The matplotlib Figure.

    Raises:
        PlanError: a plan without layers or parameters.
        ValueError: another file name. OSError: it cannot be written.
    """
    layers = [layer for layer in plan.layers.values() if layer.params_after > 0]
    if not layers:
        raise PlanError("cannot draw a ribbon of a plan without parameters")
    before = sum(layer.params for layer in layers)
    total = sum(layer.params_after for layer in layers)
    many = len(layers) > MANY
    narrow = [] if many else _narrow(layers, total)
    # Slanted labels need room above the ribbon, the second strip below it; inches.
    above = 0.3 + 0.037 * max(map(len, (t for _, t in narrow))) if narrow else 0.0
    below = 1.75 if many else 0.0
    height = 0.75 + above + 1.2 + 1.05 + below
    figure = canvas(_FIGURE, height)
    axes = figure.add_axes((_LEFT, (1.05 + below) / height, _WIDTH, 1.2 / height))
    _segments(axes, layers, [layer.params_after / total for layer in layers], labels=not many)
    _label_narrow(axes, narrow)
    axes.set_ylim(-0.5, 0.5)
    axes.set_xlim(0, 1)
    _parameter_ticks(axes, total)
    if many:
        strip = figure.add_axes((_LEFT, 0.95 / height, _WIDTH, 0.85 / height))
        _segments(strip, layers, [1 / len(layers)] * len(layers), labels=False)
        strip.set_xlim(0, 1)
        strip.set_ylim(-0.5, 0.5)
        strip.set_xticks([])
        names = [layer.name for layer in layers]
        spans = [
            (label, first / len(names), (last + 1) / len(names))
            for label, first, last in groups(names)
        ]
        brackets(strip, spans, -0.08, 0.08)
        strip.set_title(
            f"the same {len(names)} layers, all equally wide", fontsize=8, color=INK, loc="left"
        )
    for each in figure.axes:
        each.set_yticks([])
        for side in ("top", "left", "right", "bottom"):
            each.spines[side].set_visible(False)
    bits_bar(figure, (0.94, (1.05 + below) / height, 0.012, 1.2 / height))
    _hatch_legend(figure, any(layer.bits is None for layer in layers), 0.28 / height)
    heading(
        figure,
        title or f"Architecture ribbon: {plan.method}, {plan.average_bits:.2f} bits per weight",
        f"width: parameters left ({_count(before)} → {_count(total)}); colour: bits; "
        f"hatching: pruned",
    )
    return finish(figure, path, dpi)


def _count(number: float) -> str:
    return f"{number / 1e6:,.2f} M" if number >= 1e6 else f"{number / 1e3:,.0f} K"


def _labels(layer: LayerPlan) -> tuple[str, ...]:
    bits = "float" if layer.bits is None else f"{layer.bits} bit"
    return shortened(layer.name, 60), bits, f"{100 * layer.sparsity:.0f} % pruned"


def _fits(layer: LayerPlan, width: float) -> bool:
    return width >= (max(map(len, _labels(layer))) + 2) * _LETTER


def _narrow(layers: list[LayerPlan], total: float) -> list[tuple[float, str]]:
    """Where the segments that cannot hold their label have their middle, and what it says."""
    found, left = [], 0.0
    for layer in layers:
        width = layer.params_after / total
        if not _fits(layer, width):
            bits = "float" if layer.bits is None else f"{layer.bits} bit"
            percent = f", {100 * layer.sparsity:.0f} %" if layer.sparsity >= 0.005 else ""
            found.append((left + width / 2, f"{shortened(layer.name, 26)}: {bits}{percent}"))
        left += width
    return found


def _segments(axes: Any, layers: list[LayerPlan], widths: list[float], *, labels: bool) -> None:
    left = 0.0
    for layer, width in zip(layers, widths, strict=True):
        colour, dark = colour_of(layer.bits), is_dark(layer.bits)
        percent = 100 * layer.sparsity
        axes.barh(
            0,
            width,
            left=left,
            height=1,
            color=colour,
            # Constant inks: they stand on the segment's colour, not on the page.
            edgecolor="#ffffff" if dark else "#303030",
            hatch=next(hatch for limit, hatch in _HATCHES if percent < limit),
            linewidth=0,
        )
        if left > 0:
            thin = min(1.2, 200 * width)
            axes.plot([left, left], [-0.5, 0.5], color=PAPER, linewidth=thin)
        if labels and _fits(layer, width):
            axes.text(
                left + width / 2,
                0,
                "\n".join(_labels(layer)),
                ha="center",
                va="center",
                fontsize=8,
                color="#ffffff" if dark else "#101010",
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 2.0},
            )
        left += width


def _parameter_ticks(axes: Any, total: float) -> None:
    from matplotlib.ticker import MaxNLocator

    unit, name = (1e6, "millions") if total >= 2e6 else (1e3, "thousands")
    values = [v for v in MaxNLocator(6).tick_values(0, total / unit) if 0 <= v <= total / unit]
    axes.set_xticks([v * unit / total for v in values], [f"{v:g}" for v in values], fontsize=8)
    axes.tick_params(axis="x", colors=INK, length=3)
    axes.set_xlabel(
        f"{name} of parameters left: before × (1 − pruned) × bits / 32", fontsize=8, color=INK
    )


def _label_narrow(axes: Any, labels: list[tuple[float, str]]) -> None:
    """Slanted labels above the ribbon, spread so that they do not overlap."""
    gap = min(0.021, 0.93 / max(1, len(labels)))
    places: list[float] = []
    for centre, _ in labels:
        places.append(max(centre, places[-1] + gap) if places else centre)
    # Pushed over the right end? Then push back from there.
    limit = 0.95
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    for (centre, text), place in zip(labels, places, strict=True):
        axes.plot(
            [centre, place, place],
            [0.5, 0.63, 0.67],
            color=MUTED,
            linewidth=0.6,
            clip_on=False,
        )
        axes.text(
            place,
            0.7,
            text,
            ha="left",
            va="center",
            rotation=40,
            rotation_mode="anchor",
            fontsize=7.5 if len(labels) <= 30 else 6,
            color=INK,
        )


def _hatch_legend(figure: Any, with_float: bool, y: float) -> None:
    from matplotlib.patches import Patch

    names = ("< 5 %", "5–20 %", "20–40 %", "40–60 %", "≥ 60 %")
    handles = [
        Patch(facecolor="none", edgecolor=MUTED, hatch=hatch, label=name, linewidth=0.5)
        for (_, hatch), name in zip(_HATCHES, names, strict=True)
    ]
    if with_float:
        handles.append(Patch(facecolor=FLOAT_COLOUR, edgecolor=LINE, label="float layer"))
    figure.text(_LEFT, y, "pruned:", fontsize=8, va="center", color=INK)
    figure.legend(
        handles=handles,
        loc="center left",
        bbox_to_anchor=(0.068, y),
        ncol=len(handles),
        fontsize=8,
        frameon=False,
        handlelength=3,
        handleheight=1.6,
        labelcolor=INK,
    )
