"""The architecture ribbon: one picture of where a plan spends its parameters and bits."""

from __future__ import annotations

import os
from typing import Any

from .._files import replacing
from ..errors import PlanError
from ..plan import MAX_BITS, MIN_BITS, Plan

__all__ = ["ribbon"]

# Hatch by pruned per cent: denser lines, more pruned.
_HATCHES = ((5, ""), (20, "/"), (40, "//"), (60, "////"), (101, "///////"))
_FLOAT_COLOUR = "#c8c8c8"
# Share of the ribbon that one letter of a label takes; segments too narrow for theirs are
# labelled above the ribbon, with a line.
_LETTER = 0.0066


def ribbon(
    plan: Plan, path: str | os.PathLike[str], *, title: str | None = None, dpi: int = 150
) -> None:
    """Draw the plan as a ribbon and save it as PNG.

    Each segment is a layer: its width is proportional to the parameters that are left,
    params x (1 - P) x B / 32, its colour says the bits (viridis, readable with colour-blindness
    and in grey), and its hatching gets denser with pruning.

    Args:
        plan: what to draw.
        path: the PNG file; replaced as a whole.
        title: heading; default names the plan's method and average bits.
        dpi: dots per inch of the 12 x 4.6 inch picture.

    Raises:
        PlanError: a plan without layers or parameters.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = [layer for layer in plan.layers.values() if layer.params_after > 0]
    total = sum(layer.params_after for layer in layers)
    if not layers:
        raise PlanError("cannot draw a ribbon of a plan without parameters")
    # A Figure of its own: pyplot would choose a backend and keep global state.
    figure = Figure(figsize=(12, 4.6), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.03, 0.25, 0.86, 0.27))
    colours, norm = _colours()
    left = 0.0
    narrow: list[tuple[float, str]] = []
    for layer in layers:
        width = layer.params_after / total
        colour = _FLOAT_COLOUR if layer.bits is None else colours(norm(layer.bits))
        dark = layer.bits is not None and layer.bits <= 5
        percent = 100 * layer.sparsity
        axes.barh(
            0,
            width,
            left=left,
            height=1,
            color=colour,
            edgecolor="white" if dark else "#303030",
            hatch=next(hatch for limit, hatch in _HATCHES if percent < limit),
            linewidth=0,
        )
        if width > 0.004:
            axes.plot([left, left], [-0.5, 0.5], color="white", linewidth=1.2)
        bits = "float" if layer.bits is None else f"{layer.bits} bit"
        lines = (layer.name, bits, f"{percent:.0f} % pruned")
        if width >= (max(map(len, lines)) + 2) * _LETTER:
            text = "\n".join(lines)
            axes.text(
                left + width / 2,
                0,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 2.0},
            )
        else:
            short = "float" if layer.bits is None else f"{layer.bits}b"
            narrow.append((left + width / 2, f"{layer.name}  {short} {percent:.0f}%"))
        left += width
    _label_narrow(axes, narrow)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, 0.5)
    axes.set_yticks([])
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    axes.set_xticks(ticks, [f"{tick * total / 1e3:,.1f}" for tick in ticks], fontsize=8)
    axes.set_xlabel("thousands of parameters left: before × (1 − pruned) × bits / 32", fontsize=8)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    _bits_bar(figure, colours, norm)
    _hatch_legend(figure, any(layer.bits is None for layer in layers))
    before = sum(layer.params for layer in layers)
    figure.text(
        0.03,
        0.955,
        title or f"Architecture ribbon: {plan.method}, {plan.average_bits:.2f} bits per weight",
        fontsize=12,
        weight="bold",
        va="top",
    )
    figure.text(
        0.03,
        0.875,
        f"width: parameters left ({before / 1e3:,.0f} K → {total / 1e3:,.0f} K); "
        f"colour: bits; hatching: pruned",
        fontsize=8.5,
        color="#404040",
        va="top",
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def _colours() -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.colors import BoundaryNorm, ListedColormap

    count = MAX_BITS - MIN_BITS + 1
    base = matplotlib.colormaps["viridis"]
    listed = ListedColormap([base(index / (count - 1)) for index in range(count)])
    return listed, BoundaryNorm([MIN_BITS - 0.5 + i for i in range(count + 1)], count)


def _label_narrow(axes: Any, labels: list[tuple[float, str]]) -> None:
    """Slanted labels above the ribbon, spread so that they do not overlap."""
    gap = min(0.021, 0.93 / max(1, len(labels)))
    places: list[float] = []
    for centre, _ in labels:
        places.append(max(centre, places[-1] + gap) if places else centre)
    # Pushed over the right end? Then push back from there.
    limit = 0.94
    for index in range(len(places) - 1, -1, -1):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    for (centre, text), place in zip(labels, places, strict=True):
        axes.plot(
            [centre, place, place],
            [0.5, 0.68, 0.72],
            color="#808080",
            linewidth=0.6,
            clip_on=False,
        )
        axes.text(
            place,
            0.75,
            text,
            ha="left",
            va="center",
            rotation=40,
            rotation_mode="anchor",
            fontsize=7 if len(labels) <= 30 else 5,
        )


def _bits_bar(figure: Any, colours: Any, norm: Any) -> None:
    from matplotlib.cm import ScalarMappable

    axes = figure.add_axes((0.93, 0.16, 0.014, 0.44))
    bar = figure.colorbar(
        ScalarMappable(norm=norm, cmap=colours), cax=axes, ticks=range(MIN_BITS, MAX_BITS + 1)
    )
    bar.ax.tick_params(length=0, labelsize=8)
    bar.set_label("bits per weight", fontsize=8)
    bar.outline.set_visible(False)


def _hatch_legend(figure: Any, with_float: bool) -> None:
    from matplotlib.patches import Patch

    names = ("< 5 %", "5–20 %", "20–40 %", "40–60 %", "≥ 60 %")
    handles = [
        Patch(facecolor="#f4f4f4", edgecolor="#404040", hatch=hatch, label=name, linewidth=0.5)
        for (_, hatch), name in zip(_HATCHES, names, strict=True)
    ]
    if with_float:
        handles.append(Patch(facecolor=_FLOAT_COLOUR, label="float layer"))
    figure.text(0.03, 0.045, "pruned:", fontsize=8, va="center")
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.065, 0.0),
        ncol=len(handles),
        fontsize=8,
        frameon=False,
        handlelength=3,
        handleheight=1.6,
    )
