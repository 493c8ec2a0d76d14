"""Parameters of every layer before and after, the paper's Figures 4 and 5 in one."""

from __future__ import annotations

import os
from typing import Any

from ..plan import Plan
from .style import (
    FLOAT_COLOUR,
    INK,
    LINE,
    MANY,
    MUTED,
    bits_bar,
    canvas,
    colour_of,
    finish,
    heading,
    layers_of,
    names_below,
)

__all__ = ["bars"]


def bars(
    plan: Plan,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    dpi: int = 150,
) -> Any:
    """Draw two bars per layer: parameters before (outline), and after (filled, colour by bits).

    After is params x (1 - P) x B / 32, as the paper counts. The axis is logarithmic where the
    layers differ by more than a factor of 30.

    Args:
        plan: what to draw.
        path: a PNG or SVG file; default: it is not saved.
        title: heading.
        dpi: dots per inch of the 12 inch wide picture.

    Returns:
        The matplotlib Figure.

    Raises:
        PlanError: a plan without parameters.
        ValueError: another file name. OSError: it cannot be written.
    """
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter

    layers = layers_of(plan, "bars")
    names = [layer.name for layer in layers]
    many = len(layers) > MANY
    below = 0.75 if many else 0.4 + 0.055 * min(28, max(map(len, names)))
    height = 0.75 + 3.0 + below
    figure = canvas(12, height)
    axes = figure.add_axes((0.065, below / height, 0.845, 3.0 / height))
    places = range(len(layers))
    before = [layer.params / 1e3 for layer in layers]
    after = [layer.params_after / 1e3 for layer in layers]
    axes.bar(
        places, before, width=0.82, facecolor="none", edgecolor=MUTED, linewidth=0.5 if many else 1
    )
    axes.bar(places, after, width=0.82, color=[colour_of(layer.bits) for layer in layers])
    positive = [value for value in after if value > 0]
    if positive and max(before) > 30 * min(positive):
        axes.set_yscale("log")
        axes.set_ylim(min(positive) / 2, 2 * max(before))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("thousands of parameters", fontsize=8.5, color=INK)
    axes.tick_params(axis="y", labelsize=8, colors=INK, length=3)
    axes.grid(axis="y", color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side == "bottom")
        axes.spines[side].set_color(LINE)
    names_below(axes, names)
    handles = [Patch(facecolor="none", edgecolor=MUTED, label="before")]
    if any(layer.bits is None for layer in layers):
        handles.append(Patch(facecolor=FLOAT_COLOUR, label="float layer"))
    axes.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        fontsize=8,
        frameon=False,
        ncol=2,
        labelcolor=INK,
    )
    bits_bar(figure, (0.94, below / height, 0.012, 3.0 / height))
    total, left = sum(before), sum(after)
    heading(
        figure,
        title or f"Parameters per layer: {plan.method}",
        f"{total:,.0f} K before, {left:,.1f} K after: {100 * (1 - left / total):.1f} % less",
        left=0.03,
    )
    return finish(figure, path, dpi)
