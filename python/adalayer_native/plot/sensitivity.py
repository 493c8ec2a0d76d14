"""How much each layer suffers: at every width, or by every criterion."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import PlanError
from ..importance.registry import criterion_of
from ..importance.scores import LayerScores
from ..plan import Plan
from .style import INK, MANY, canvas, finish, heading, names_below

if TYPE_CHECKING:
    from ..allocation import LayerTable

__all__ = ["sensitivity"]


def sensitivity(
    what: LayerTable | LayerScores,
    path: str | os.PathLike[str] | None = None,
    *,
    plan: Plan | None = None,
    title: str | None = None,
    dpi: int = 150,
) -> Any:
    """Draw a map of layers: errors by width, or contributions by criterion.

    Args:
        what: an error table (``ada.pareto(...).errors``): rows are widths, colours the predicted
            loss unpruned, in the logarithm; or scores: rows are the criteria that were measured,
            colours A of eq. (1) by each.
        path: a PNG or SVG file; default: it is not saved.
        plan: marks the width that each layer got (error tables only).
        title: heading.
        dpi: dots per inch of the 12 inch wide picture.

    Returns:
        The matplotlib Figure.

    Raises:
        PlanError: nothing to draw, or a plan of other layers.
        ValueError: another file name. OSError: it cannot be written.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patches import Rectangle

    norm: Any
    if isinstance(what, LayerScores):
        names, rows, values = _by_criterion(what)
        norm, label = Normalize(0, 1), "A: over the largest layer"
        line = "rows: criteria; brighter: the layer matters more"
    else:
        names, rows, values = _by_width(what)
        positive = values[np.isfinite(values) & (values > 0)]
        low, high = (positive.min(), positive.max()) if positive.size else (1e-6, 1.0)
        # Five powers of ten are enough to look at; below, nothing is lost.
        norm = LogNorm(max(low, high * 1e-5), max(high, low * 1.001), clip=True)
        label = f"{what.what}, {what.unit}"
        line = "rows: bits, unpruned; brighter: more is lost"
    many = len(names) > MANY
    below = 0.75 if many else 0.4 + 0.055 * min(28, max(map(len, names)))
    tall = 0.3 * len(rows)
    height = 0.8 + tall + below
    figure = canvas(12, height)
    left = 0.03 + 0.0058 * max(map(len, rows)) + 0.015
    axes = figure.add_axes((left, below / height, 0.91 - left, tall / height))
    image = axes.imshow(
        np.where(np.isfinite(values), np.maximum(values, norm.vmin), np.nan).T,
        aspect="auto", cmap="cividis", norm=norm, interpolation="nearest",
    )  # fmt: skip
    axes.set_yticks(range(len(rows)), rows, fontsize=8, color=INK)
    axes.tick_params(axis="y", length=0)
    if not many:
        axes.set_xticks(np.arange(-0.5, len(names)), minor=True)
        axes.set_yticks(np.arange(-0.5, len(rows)), minor=True)
        axes.grid(which="minor", color="#ffffff", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    if plan is not None and not isinstance(what, LayerScores):
        for column, name in enumerate(names):
            bits = plan[name].bits
            if bits in what.bits:
                axes.add_patch(
                    Rectangle(
                        (column - 0.5, what.bits.index(bits) - 0.5),
                        1,
                        1,
                        fill=False,
                        edgecolor="#d55e00",
                        linewidth=1.0 if many else 1.8,
                        zorder=5,
                    )
                )
        line += "; orange: what the plan gives the layer"
    names_below(axes, names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    bar = figure.colorbar(image, cax=figure.add_axes((0.935, below / height, 0.012, tall / height)))
    bar.set_label(label, fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7.5, colors=INK, which="both")
    bar.outline.set_visible(False)
    heading(figure, title or "Sensitivity of the layers", line)
    return finish(figure, path, dpi)


def _by_criterion(scores: LayerScores) -> tuple[list[str], list[str], np.ndarray]:
    names = list(scores)
    rows = [c for c in scores.criteria if all(c in s.criteria for s in scores.layers.values())]
    if not names or not rows:
        raise PlanError("cannot draw scores without layers or criteria")
    columns = [
        criterion_of(row).contribution({n: scores[n].criteria[row] for n in names}) for row in rows
    ]
    return names, rows, np.array([[column[name] for column in columns] for name in names])


def _by_width(table: LayerTable) -> tuple[list[str], list[str], np.ndarray]:
    if not table.layers or not table.bits:
        raise PlanError("cannot draw a table without layers or widths")
    least = int(np.argmin(table.sparsities))
    return list(table.layers), [f"{bits} bits" for bits in table.bits], table.values[..., least]
