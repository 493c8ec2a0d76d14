"""The frontier of file size against predicted loss."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from .style import INK, LINE, MUTED, canvas, finish, heading

if TYPE_CHECKING:
    from ..allocation import Frontier

__all__ = ["pareto"]


def pareto(
    frontier: Frontier | Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str] | None = None,
    *,
    chosen: Mapping[str, Any] | None = None,
    title: str | None = None,
    dpi: int = 150,
) -> Any:
    """Draw size against predicted loss increase; points are plans, coloured by average bits.

    Args:
        frontier: from ``ada.pareto``, or its ``as_dicts()``.
        path: a PNG or SVG file; default: it is not saved.
        chosen: ``{"name": …, "size": share of the float file}``: a plan to mark, by a vertical
            line, since its loss may not be known in the frontier's measure; with
            ``"predicted_loss"`` by a point.
        title: heading.
        dpi: dots per inch of the 7.5 x 4.6 inch picture.

    Returns:
        The matplotlib Figure.

    Raises:
        PlanError: a frontier without points.
        ValueError: another file name. OSError: it cannot be written.
    """
    from matplotlib.ticker import FuncFormatter

    rows = frontier.as_dicts() if hasattr(frontier, "as_dicts") else [dict(r) for r in frontier]
    if not rows:
        raise PlanError("cannot draw a frontier without points")
    sizes = [100 * row["size"] for row in rows]
    losses = [row["predicted_loss"] for row in rows]
    figure = canvas(7.5, 4.6)
    axes = figure.add_axes((0.115, 0.125, 0.735, 0.68))
    if min(losses) > 0 and max(losses) > 10 * min(losses):
        axes.set_yscale("log")
    if max(sizes) > 3 * min(sizes):
        axes.set_xscale("log")
    axes.plot(sizes, losses, color=MUTED, linewidth=1.2, zorder=2)
    points = axes.scatter(
        sizes, losses, c=[row["average_bits"] for row in rows], cmap="viridis", s=46, zorder=3,
        edgecolors=INK, linewidths=0.6, vmin=0, vmax=8,
    )  # fmt: skip
    if chosen is not None:
        x = 100 * chosen["size"]
        axes.axvline(x, color=INK, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        right = x < (min(sizes) * max(sizes)) ** 0.5
        axes.annotate(
            f"{chosen['name']}: {x:.1f} %", (x, 0.97), xycoords=("data", "axes fraction"),
            xytext=(5 if right else -5, 0), textcoords="offset points", fontsize=8.5, color=INK,
            va="top", ha="left" if right else "right",
        )  # fmt: skip
        if chosen.get("predicted_loss") is not None:
            axes.scatter(
                [x], [chosen["predicted_loss"]], marker="*", s=150, facecolors="#e69f00",
                edgecolors=INK, linewidths=0.7, zorder=4,
            )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    if axes.get_xscale() == "log":
        ticks = [t for t in (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 50, 70, 100)
                 if min(sizes) <= t <= max(sizes)]  # fmt: skip
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("saved file, % of the float file", fontsize=9, color=INK)
    axes.set_ylabel("predicted loss increase", fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK, which="both")
    axes.grid(color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_color(LINE)
    bar = figure.colorbar(points, cax=figure.add_axes((0.885, 0.125, 0.022, 0.68)))
    bar.set_label("mean bits per weight", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)
    heading(
        figure,
        title or "What a budget buys",
        f"{len(rows)} plans; none is beaten in both size and loss",
        left=0.04,
    )
    return finish(figure, path, dpi)
