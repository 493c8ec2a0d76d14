"""What all pictures share: colours, layer labels that stay readable, saving."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._files import replacing
from ..errors import PlanError
from ..plan import MAX_BITS, MIN_BITS, LayerPlan, Plan

__all__ = [
    "FLOAT_COLOUR", "INK", "LINE", "MUTED", "PAPER", "brackets", "canvas", "colour_of", "finish",
    "groups", "heading", "is_dark", "layers_of", "names_below", "scale_of_bits", "shortened",
]  # fmt: skip

# Inks by role. The report replaces them by the page's own, so that pictures follow light and dark.
INK = "#1b1f24"
MUTED = "#5b6470"
LINE = "#c9d0d8"
PAPER = "#fefefe"
FLOAT_COLOUR = "#b9bec5"

MANY = 40  # layers beyond which single names are no longer written
SUFFIXES = (".png", ".svg")


def canvas(width: float, height: float) -> Any:
    """A figure of its own, inches: pyplot would choose a backend and keep global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def clear(figure: Any) -> None:
    """Let the page show through every axes: what is white on paper would be white in the dark."""
    for axes in figure.axes:
        axes.set_facecolor("none")


def finish(figure: Any, path: str | os.PathLike[str] | None, dpi: int) -> Any:
    """Save the figure if there is a path, and return it.

    Raises:
        ValueError: a file name that ends neither in .png nor in .svg.
        OSError: the file cannot be written.
    """
    import matplotlib

    clear(figure)
    if path is not None:
        suffix = Path(path).suffix.lower()
        if suffix not in SUFFIXES:
            raise ValueError(f"{os.fspath(path)}: expected a file name in .png or .svg")
        # The same picture gives the same file: no date, no random identifiers.
        with matplotlib.rc_context({"svg.hashsalt": "adalayer"}), replacing(path) as temporary:
            figure.savefig(
                temporary,
                format=suffix[1:],
                dpi=dpi,
                metadata={"Date": None} if suffix == ".svg" else None,
            )
    return figure


def layers_of(plan: Plan, what: str) -> list[LayerPlan]:
    """The layers with parameters.

    Raises:
        PlanError: there are none.
    """
    layers = [layer for layer in plan.layers.values() if layer.params > 0]
    if not layers:
        raise PlanError(f"cannot draw {what} of a plan without parameters")
    return layers


def scale_of_bits() -> tuple[Any, Any]:
    """(colour map, norm) of whole bits: viridis, which also reads in grey and colour-blind."""
    import matplotlib
    from matplotlib.colors import BoundaryNorm, ListedColormap

    count = MAX_BITS - MIN_BITS + 1
    base = matplotlib.colormaps["viridis"]
    listed = ListedColormap([base(index / (count - 1)) for index in range(count)])
    return listed, BoundaryNorm([MIN_BITS - 0.5 + i for i in range(count + 1)], count)


def colour_of(bits: int | None) -> Any:
    """Colour of a width; grey for a float layer."""
    if bits is None:
        return FLOAT_COLOUR
    colours, norm = scale_of_bits()
    return colours(norm(bits))


def is_dark(bits: int | None) -> bool:
    """Whether white ink reads on the colour of that width."""
    return bits is not None and bits <= 5


def bits_bar(figure: Any, place: tuple[float, float, float, float]) -> None:
    """The key of the colours, standing or lying as its place is."""
    from matplotlib.cm import ScalarMappable

    colours, norm = scale_of_bits()
    axes = figure.add_axes(place)
    standing = place[3] * figure.get_figheight() > place[2] * figure.get_figwidth()
    bar = figure.colorbar(
        ScalarMappable(norm=norm, cmap=colours),
        cax=axes,
        ticks=range(MIN_BITS, MAX_BITS + 1),
        orientation="vertical" if standing else "horizontal",
    )
    bar.ax.minorticks_off()
    bar.ax.tick_params(length=0, labelsize=8, colors=INK)
    bar.set_label("bits per weight", fontsize=8, color=INK)
    bar.outline.set_visible(False)


def heading(figure: Any, title: str, line: str, left: float = 0.03) -> None:
    """Title and one line below it, at a fixed distance from the top whatever the height."""
    inch = 1 / figure.get_figheight()
    figure.text(left, 1 - 0.17 * inch, title, fontsize=12, weight="bold", va="top", color=INK)
    figure.text(left, 1 - 0.45 * inch, line, fontsize=8.5, color=MUTED, va="top")


def shortened(text: str, length: int) -> str:
    """The text, its middle replaced by an ellipsis where it is longer than ``length``.

    A dollar would begin a formula, so it is escaped.
    """
    if len(text) <= length:
        return text.replace("$", r"\$")
    tail = 2 * length // 3  # names differ at their ends
    return f"{text[: length - tail - 1]}…{text[-tail:]}".replace("$", r"\$")


def groups(names: Sequence[str], most: int = 16) -> list[tuple[str, int, int]]:
    """Neighbouring layers with a common prefix: ``(prefix, first, last)`` in order.

    The longest prefix, in parts between dots or underscores, that gives at most ``most`` groups
    and more than one; else runs of equal length, named by position.
    """
    best: list[tuple[str, int, int]] = []
    for depth in (1, 2, 3):
        found: list[tuple[str, int, int]] = []
        for position, name in enumerate(names):
            parts = name.replace("_", ".").split(".")
            prefix = ".".join(parts[:depth])
            if found and found[-1][0] == prefix:
                found[-1] = (prefix, found[-1][1], position)
            else:
                found.append((prefix, position, position))
        if 1 < len(found) <= most:
            best = found
    if best:
        return best
    step = -(-len(names) // 10)
    return [
        (f"{first + 1}–{min(first + step, len(names))}", first, min(first + step, len(names)) - 1)
        for first in range(0, len(names), step)
    ]


def brackets(axes: Any, spans: Sequence[tuple[str, float, float]], y: float, drop: float) -> None:
    """Brackets below an axis for groups: ``(label, left, right)`` in data units.

    Args:
        axes: where.
        spans: groups from left to right.
        y: of the brackets, in units of the axes' height (below 0).
        drop: how far the label stands below.
    """
    transform = axes.get_xaxis_transform()
    total = spans[-1][2] - spans[0][1]
    for label, left, right in spans:
        gap = min(0.0015 * total, 0.1 * (right - left))
        axes.plot(
            [left + gap, left + gap, right - gap, right - gap],
            [y + 0.4 * drop, y, y, y + 0.4 * drop],
            transform=transform, color=MUTED, linewidth=0.8, clip_on=False,
        )  # fmt: skip
        room = (right - left) / total
        if room > 0.012:
            upright = room < 0.011 * len(label)
            axes.text(
                (left + right) / 2, y - 0.5 * drop, label, transform=transform, fontsize=7.5,
                ha="center", va="top", rotation=90 if upright else 0, color=INK,
            )  # fmt: skip


def names_below(axes: Any, names: Sequence[str]) -> None:
    """Names of layers at 0, 1, 2, … on the x axis: each one if they are few, else their groups."""
    axes.set_xlim(-0.6, len(names) - 0.4)
    if len(names) <= MANY:
        axes.set_xticks(
            range(len(names)),
            [shortened(name, 28) for name in names],
            rotation=45, ha="right", rotation_mode="anchor", fontsize=8 if len(names) < 25 else 7,
            color=INK,
        )  # fmt: skip
        axes.tick_params(axis="x", length=2, color=LINE)
        return
    axes.set_xticks([])
    spans = [(label, first - 0.5, last + 0.5) for label, first, last in groups(names)]
    brackets(axes, spans, -0.03, 0.05)
