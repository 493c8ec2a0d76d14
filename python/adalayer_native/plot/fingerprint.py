"""Layer fingerprints: one polar polygon per layer over the paper's five axes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from ..plan import MAX_BITS, Plan
from .style import (
    INK,
    LINE,
    MUTED,
    bits_bar,
    canvas,
    colour_of,
    finish,
    heading,
    layers_of,
    shortened,
)

__all__ = ["AXES", "fingerprint"]

AXES = ("parameters", "FLOPs", "pruned", "bits", "accuracy contribution")
_CELL = {1: (4, 2.0), 9: (5, 1.7), 26: (8, 1.25), 65: (12, 1.0), 145: (16, 0.8)}  # columns, inches
_KEY = 2.9  # inches for the explanation on the right


def fingerprint(
    plan: Plan,
    path: str | os.PathLike[str] | None = None,
    *,
    flops: Mapping[str, float] | None = None,
    contribution: Mapping[str, float] | None = None,
    title: str | None = None,
    dpi: int = 150,
) -> Any:
    """Draw a polygon for every layer, side by side.

    The five axes are those of the paper's Figure 2, each from 0 in the centre to 1 at the rim:
    parameters that are left and FLOPs as the square root of their share of the largest layer's (so
    that areas compare), pruned as a share, bits over 8 (a float layer has 1), and A of eq. (1). The
    colour says the bits, too. The grey polygon is the mean of all layers.

    Args:
        plan: what to draw.
        path: a PNG or SVG file; default: it is not saved.
        flops: per layer; default: F of the plan's scores.
        contribution: per layer, the largest 1; default: A of the plan's scores, or its predicted
            loss E over the largest. An axis that nothing is known of is drawn dashed and stays 0.
        title: heading.
        dpi: dots per inch.

    Returns:
        The matplotlib Figure.

    Raises:
        PlanError: a plan without parameters.
        ValueError: another file name. OSError: it cannot be written.
    """
    from matplotlib.collections import LineCollection, PolyCollection

    layers = layers_of(plan, "fingerprints")
    names = [layer.name for layer in layers]
    work = _known(names, flops, plan, "F")
    loss = _known(names, contribution, plan, "A", "E")
    largest = max(layer.params_after for layer in layers)
    radii = [
        [
            math.sqrt(layer.params_after / largest) if largest else 0.0,
            math.sqrt(work[layer.name]) if work else 0.0,
            layer.sparsity,
            1.0 if layer.bits is None else layer.bits / MAX_BITS,
            loss[layer.name] if loss else 0.0,
        ]
        for layer in layers
    ]
    known = [True, bool(work), True, True, bool(loss)]
    mean = [sum(row[axis] for row in radii) / len(radii) for axis in range(len(AXES))]
    columns, cell = next(v for k, v in reversed(_CELL.items()) if len(layers) >= k)
    columns = min(columns, len(layers))
    rows = -(-len(layers) // columns)
    tall = cell * 1.22
    height = max(rows * tall + 0.85, 4.1)
    width = columns * cell + _KEY + 0.4
    figure = canvas(width, height)
    axes = figure.add_axes(
        (0.2 / width, 0.1 / height, columns * cell / width, rows * tall / height)
    )
    axes.set_xlim(0, columns)
    axes.set_ylim(-rows * 1.22, 0)
    axes.set_axis_off()
    reach = 0.43
    size = min(9.5, 4.0 + 2.2 * cell)
    polygons, spokes, rims, means = [], [], [], []
    for position, row in enumerate(radii):
        x, y = position % columns + 0.5, -(position // columns) * 1.22 - 0.70
        polygons.append(_polygon(row, x, y, reach))
        means.append(_polygon(mean, x, y, reach))
        rims.append(_polygon([1.0] * len(AXES), x, y, reach))
        spokes += [[(x, y), end] for end in _polygon([1.0] * len(AXES), x, y, reach)]
        room = int(cell * 72 / (0.67 * size))
        axes.text(
            x, y + 0.55, shortened(names[position], room), fontsize=size, ha="center", va="center",
            color=INK,
        )  # fmt: skip
    axes.add_collection(LineCollection(spokes, colors=LINE, linewidths=0.5))
    axes.add_collection(PolyCollection(rims, facecolors="none", edgecolors=LINE, linewidths=0.6))
    axes.add_collection(
        PolyCollection(
            polygons,
            facecolors=[colour_of(layer.bits) for layer in layers],
            edgecolors=INK,
            linewidths=0.7,
            alpha=0.85,
        )
    )
    axes.add_collection(
        PolyCollection(
            means, facecolors="none", edgecolors=MUTED, linewidths=0.7, linestyles=(0, (2, 1.5))
        )
    )
    _key(figure, width, height, known, mean)
    heading(
        figure,
        title or f"Layer fingerprints: {plan.method}, {plan.average_bits:.2f} bits per weight",
        f"{len(layers)} layers in the order of the network",
        left=0.2 / width,
    )
    return finish(figure, path, dpi)


def _known(
    names: list[str], given: Mapping[str, float] | None, plan: Plan, *keys: str
) -> dict[str, float]:
    """Values over the largest; empty where nothing is known of a layer."""
    values = dict(given or {})
    for key in keys:
        if not values:
            rows = {n: s[key] for n, s in (plan.scores or {}).items() if key in s}
            values = rows if any(name in rows for name in names) else {}
    if not values:
        return {}
    most = max((values.get(name, 0.0) for name in names), default=0.0)
    return {name: max(0.0, values.get(name, 0.0)) / most if most > 0 else 0.0 for name in names}


def _polygon(radii: list[float], x: float, y: float, reach: float) -> list[tuple[float, float]]:
    points = []
    for axis, radius in enumerate(radii):
        angle = math.pi / 2 - 2 * math.pi * axis / len(radii)
        # A polygon that ends in the centre would be invisible: nothing is a small stub.
        far = reach * max(0.03, min(1.0, radius))
        points.append((x + far * math.cos(angle), y + far * math.sin(angle)))
    return points


def _key(figure: Any, width: float, height: float, known: list[bool], mean: list[float]) -> None:
    """The axes with their names, and the colours."""
    side = 1.3
    tall = side * 1.6
    place = (1 - (_KEY + 0.05) / width, 1 - (0.6 + tall) / height, _KEY / width, tall / height)
    axes = figure.add_axes(place)
    ratio = _KEY / (side * 1.6)
    axes.set_xlim(-ratio, ratio)
    axes.set_ylim(-1, 1)
    axes.set_axis_off()
    reach = 0.56
    rim = _polygon([1.0] * len(AXES), 0, 0, reach)
    axes.fill(*zip(*rim, strict=True), facecolor="none", edgecolor=LINE, linewidth=0.8)
    axes.fill(
        *zip(*_polygon(mean, 0, 0, reach), strict=True), facecolor="none", edgecolor=MUTED,
        linewidth=0.9, linestyle=(0, (2, 1.5)),
    )  # fmt: skip
    for axis, (name, there) in enumerate(zip(AXES, known, strict=True)):
        x, y = rim[axis]
        axes.plot([0, x], [0, y], color=LINE, linewidth=0.8, linestyle="-" if there else ":")
        text = name if there else f"{name}\n(not known)"
        text = text.replace("accuracy contribution", "accuracy\ncontribution")
        axes.text(
            1.12 * x, 1.12 * y, text, fontsize=8, color=INK if there else MUTED,
            ha="center" if abs(x) < 0.05 else ("left" if x > 0 else "right"),
            va="bottom" if y > 0.3 else ("center" if y > -0.2 else "top"),
        )  # fmt: skip
    axes.text(0, -0.86, "dashed: mean of all layers", fontsize=7.5, color=MUTED, ha="center")
    left = 1 - (_KEY / 2 + 0.95) / width
    bits_bar(figure, (left, 1 - (0.85 + tall) / height, 1.8 / width, 0.12 / height))
