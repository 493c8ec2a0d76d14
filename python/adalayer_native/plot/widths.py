"""Bits of every layer over the epochs of a run that changed them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PlanError
from .style import INK, LINE, canvas, finish, heading

__all__ = ["widths"]

_PANELS = (
    ("widths", "bits of weights", "bits"),
    ("input_widths", "bits of inputs", "bits"),
    ("snr_db", "gradient, signal to noise", "dB"),
    ("entropy", "entropy of inputs", "bits"),
)


def widths(
    epochs: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    dpi: int = 110,
) -> Any:
    """Draw what a run notes of its layers' widths, a line per layer, early layers dark.

    Args:
        epochs: ``History.epochs`` of ``finetune(widths=DynamicWidths(...))``, with the statistics
            that the widths follow, or of ``allocate="learned"``.
        path: a PNG or SVG file; default: it is not saved.
        title: heading.
        dpi: dots per inch of the picture, 4.6 inches high.

    Returns:
        The matplotlib Figure.

    Raises:
        PlanError: a history without widths.
        ValueError: another file name. OSError: it cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    found = [(key, words, unit) for key, words, unit in _PANELS if epochs and epochs[-1].get(key)]
    if not found:
        raise PlanError("cannot draw widths of a run that did not change any")
    count = len(found)
    figure = canvas(3.6 * count + 1.0, 4.6)
    colours = colormaps["viridis"]
    for column, (key, words, unit) in enumerate(found):
        left = (0.6 + 3.6 * column) / (3.6 * count + 1.0)
        axes = figure.add_axes((left, 0.12, 2.85 / (3.6 * count + 1.0), 0.66))
        names = list(epochs[-1][key])
        for row, name in enumerate(names):
            line = [(e["epoch"], e[key][name]) for e in epochs if name in e.get(key, {})]
            axes.plot(
                *zip(*line, strict=True), color=colours(0.9 * row / max(len(names) - 1, 1)),
                linewidth=1.2, marker="o" if len(line) == 1 else None, markersize=3,
                drawstyle="steps-post" if key == "input_widths" else "default",
            )  # fmt: skip
        axes.set_title(f"{words}, {unit}", fontsize=9, color=INK, loc="left")
        axes.set_xlabel("epoch", fontsize=9, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelsize=8, colors=INK)
        axes.grid(color=LINE, linewidth=0.5)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_color(LINE)
    layers = len(epochs[-1][found[0][0]])
    heading(
        figure,
        title or "Widths over the epochs",
        f"{layers} layers, the first dark, the last light",
    )
    return finish(figure, path, dpi)
