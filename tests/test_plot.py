"""Pictures: what they show, at 9, 20 and 160 layers, as PNG and SVG, and what they refuse."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from PIL import Image

import adalayer_native as ada
from adalayer_native import LayerPlan, Plan, PlanError, plot
from adalayer_native.allocation import LayerTable
from adalayer_native.importance import LayerScore, LayerScores
from adalayer_native.microscope import Row
from adalayer_native.plot.style import colour_of, groups, is_dark, shortened

PICTURES = {"ribbon": plot.ribbon, "fingerprint": plot.fingerprint, "bars": plot.bars}


def plan_of(count: int) -> Plan:
    """Layers that grow, lose bits and are pruned more and more."""
    layers = {}
    for i in range(count):
        stage = i * 4 // count
        name = f"layer{stage + 1}.{i}.conv"
        bits = None if i == count - 1 else 2 + (7 * i) % 7 if count < 3 else 8 - 6 * i // count
        layers[name] = LayerPlan(name, "conv2d", 100 * 4**stage, bits, 0.9 * i / count)
    scores = {n: {"A": 1 / (k + 1), "F": (k + 1) / count} for k, n in enumerate(layers)}
    return Plan(layers, method="adalayer", scores=scores)


@pytest.mark.parametrize("count", [1, 9, 160])
@pytest.mark.parametrize("kind", sorted(PICTURES))
def test_png_and_svg(tmp_path: Path, kind: str, count: int) -> None:
    plan = plan_of(count)
    PICTURES[kind](plan, tmp_path / "deep" / "a.png", dpi=60)
    with Image.open(tmp_path / "deep" / "a.png") as image:
        assert image.format == "PNG" and min(image.size) > 150
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    shown = {to_hex(pixel / 255) for pixel in np.unique(pixels, axis=0)}
    if kind != "fingerprint":  # there colours are translucent
        for layer in plan.layers.values():
            share = layer.params_after / sum(each.params_after for each in plan.layers.values())
            if share > 0.02 and layer.sparsity < 0.5:
                assert to_hex(colour_of(layer.bits)) in shown
    PICTURES[kind](plan, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "<svg" in text and "<script" not in text
    if count == 9:  # the same plan gives the same file
        PICTURES[kind](plan, tmp_path / "b.svg")
        assert text == (tmp_path / "b.svg").read_text(encoding="utf-8")


def texts(figure) -> list[str]:
    found = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        found += [text.get_text() for text in axes.texts]
        found += [label.get_text() for label in axes.get_xticklabels()]
    return found


def overlaps(figure, axes) -> list[tuple[str, str]]:
    """Pairs of horizontal texts of one axes that cover each other."""
    renderer = figure.canvas.get_renderer()
    boxes = [
        (text.get_text(), text.get_window_extent(renderer))
        for text in axes.texts
        if text.get_text() and text.get_rotation() == 0
    ]
    return [
        (a, b)
        for k, (a, left) in enumerate(boxes)
        for b, right in boxes[k + 1 :]
        if left.shrunk(0.96, 0.8).overlaps(right.shrunk(0.96, 0.8))
    ]


@pytest.mark.parametrize("count", [20, 160])
def test_labels_stay_readable(count: int) -> None:
    plan = plan_of(count)
    for draw in PICTURES.values():
        figure = draw(plan)
        figure.canvas.draw()
        for axes in figure.axes:
            assert overlaps(figure, axes) == []
        sizes = [text.get_fontsize() for axes in figure.axes for text in axes.texts]
        assert all(size >= 5 for size in sizes)
        # Nothing is cut off at the edges.
        width, height = figure.get_size_inches() * figure.dpi
        renderer = figure.canvas.get_renderer()
        every = [*figure.texts, *(t for axes in figure.axes for t in axes.texts)]
        for text in every:
            box = text.get_window_extent(renderer)
            assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1, text


def test_ribbon_is_in_proportion_and_names_every_layer() -> None:
    plan = plan_of(20)
    figure = plot.ribbon(plan)
    widths = [patch.get_width() for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    total = sum(layer.params_after for layer in plan.layers.values())
    assert widths == pytest.approx([p.params_after / total for p in plan.layers.values()])
    hatches = [patch.get_hatch() or "" for patch in figure.axes[0].patches]
    assert [len(h) for h in hatches] == sorted(len(h) for h in hatches)  # pruned more and more
    shown = "\n".join(texts(figure))
    for name in plan:
        assert name in shown
    many = texts(plot.ribbon(plan_of(160)))
    assert {"layer1", "layer2", "layer3", "layer4"} <= set(many)
    assert "layer1.0.conv" not in "\n".join(many)


def test_fingerprint_polygons() -> None:
    plan = plan_of(9)
    figure = plot.fingerprint(plan)
    shapes = [c for c in figure.axes[0].collections if isinstance(c, PolyCollection)]
    rims = next(c for c in shapes if len(c.get_facecolor()) == 0)
    polygons = next(c for c in shapes if len(c.get_facecolor()) == 9)
    for position, layer in enumerate(plan.layers.values()):
        rim = rims.get_paths()[position].vertices[:5]
        centre = rim.mean(axis=0)
        points = polygons.get_paths()[position].vertices[:5]
        radii = np.linalg.norm(points - centre, axis=1) / np.linalg.norm(rim - centre, axis=1)
        largest = max(each.params_after for each in plan.layers.values())
        assert plan.scores is not None
        score = plan.scores[layer.name]
        expected = [
            (layer.params_after / largest) ** 0.5,
            score["F"] ** 0.5,
            layer.sparsity,
            1.0 if layer.bits is None else layer.bits / 8,
            score["A"],
        ]
        assert radii == pytest.approx(np.maximum(expected, 0.03), abs=1e-6)


def test_fingerprint_without_scores_says_so() -> None:
    plan = plan_of(9)
    plan.scores = None
    shown = texts(plot.fingerprint(plan))
    assert sum("(not known)" in text for text in shown) == 2
    given = plot.fingerprint(
        plan, flops=dict.fromkeys(plan, 1.0), contribution=dict.fromkeys(plan, 2.0)
    )
    assert not any("not known" in text for text in texts(given))
    plan.scores = {n: {"E": 0.5} for n in plan}  # of method "optimal"
    assert sum("(not known)" in text for text in texts(plot.fingerprint(plan))) == 1


def test_bars_before_and_after() -> None:
    plan = plan_of(9)
    axes = plot.bars(plan).axes[0]
    heights = [patch.get_height() for patch in axes.patches]
    assert heights[:9] == pytest.approx([p.params / 1e3 for p in plan.layers.values()])
    assert heights[9:18] == pytest.approx([p.params_after / 1e3 for p in plan.layers.values()])
    assert axes.get_yscale() == "log"
    same = Plan({n: LayerPlan(n, "linear", 100, 8) for n in "ab"})
    assert plot.bars(same).axes[0].get_yscale() == "linear"


ROWS = [
    {"size": s, "predicted_loss": 0.01 / s**2, "average_bits": 30 * s, "bytes": int(1e6 * s)}
    for s in (0.03, 0.06, 0.12, 0.25)
]


def test_pareto(tmp_path: Path) -> None:
    figure = plot.pareto(
        ROWS, tmp_path / "p.png", chosen={"name": "mine", "size": 0.1, "predicted_loss": 1.1}
    )
    points = figure.axes[0].collections[0].get_offsets()
    assert np.asarray(points) == pytest.approx(
        np.array([[100 * r["size"], r["predicted_loss"]] for r in ROWS])
    )
    assert any("mine: 10.0 %" in text for text in texts(figure))
    assert (tmp_path / "p.png").stat().st_size > 5000
    with pytest.raises(PlanError, match="without points"):
        plot.pareto([])
    plot.pareto([{**ROWS[0], "predicted_loss": 0.0}])  # one point, and no logarithm of it


def table_of(count: int) -> LayerTable:
    names = tuple(plan_of(count))
    base = np.linspace(1, 3, count)[:, None, None]
    values = base * 4.0 ** -np.arange(7)[None, :, None] * np.array([1.0, 7.0])
    return LayerTable("error", "nats", names, tuple(range(2, 9)), (0.0, 0.5), values)


@pytest.mark.parametrize("count", [9, 160])
def test_sensitivity_of_widths(tmp_path: Path, count: int) -> None:
    table = table_of(count)
    figure = plot.sensitivity(table, tmp_path / "s.svg", plan=plan_of(count))
    image = figure.axes[0].images[0].get_array()
    assert np.asarray(image) == pytest.approx(table.values[..., 0].T)
    marked = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    assert len(marked) == count - 1  # the last layer is float
    with pytest.raises(PlanError, match="unknown layer"):
        plot.sensitivity(table, plan=Plan({"other": LayerPlan("other", "linear", 4, 4)}))


def test_sensitivity_of_criteria() -> None:
    rows = {
        name: LayerScore(name, "linear", 4, 8.0, raw, 1.0, criteria={"kl": raw, "sparsity": share})
        for name, raw, share in (("a", 2.0, 0.5), ("b", 1.0, 0.0))
    }
    scores = LayerScores(rows, criterion="kl")
    figure = plot.sensitivity(scores)
    image = np.asarray(figure.axes[0].images[0].get_array())
    assert image == pytest.approx(np.array([[1.0, 0.5], [0.5, 1.0]]))
    with pytest.raises(PlanError, match="without layers"):
        plot.sensitivity(LayerScores({}))


def comparison_of(count: int) -> ada.Comparison:
    """Layers that get worse, with a value behind each; the last layer has a fault."""
    rows = []
    for place in range(count):
        value, last = bool(place % 2), place == count - 1
        own = 10.0 ** (-5 + 3 * place / count)
        name = f"act_quant.block{place // 4}_{place}" if value else f"block{place // 4}.{place}"
        rows.append(
            Row(
                name=name,
                kind="value" if value else "conv2d", place=place,
                bits=None if value else 2 + place % 7, input_bits=8, own=own,
                weights=None if value else own / 2, activations=own / 2, accumulated=2 * own,
                cosine=0.99, clipped=0.05 if last else 0.0, clipping=float(last),
                calibrated=(0.0, 1.0), observed=(0.0, 2.0), finding="clips" if last else "",
            )
        )  # fmt: skip
    return ada.Comparison(tuple(rows[::-1]), 0.01, "kl_divergence", 64)


@pytest.mark.parametrize("count", [1, 9, 161])
def test_microscope(tmp_path: Path, count: int) -> None:
    found = comparison_of(count)
    figure = plot.microscope(found, tmp_path / "m.png", dpi=60)
    with Image.open(tmp_path / "m.png") as image:
        assert image.format == "PNG" and min(image.size) > 150
    upper, lower = figure.axes[:2]
    bars = [patch.get_height() for patch in upper.patches]  # in the network's order
    assert bars == pytest.approx([50 - 30 * place / count for place in range(count)])
    assert [to_hex(p.get_facecolor()) for p in upper.patches[:2]] == [
        to_hex(colour_of(bits)) for bits in (2, 8)[:count]
    ]
    assert [patch.get_height() for patch in lower.patches][-1] == pytest.approx(5)
    assert "1 finding" in " ".join(texts(figure))
    names = [label.get_text() for label in lower.get_xticklabels()]
    if count == 9:
        assert names[1] == "block0_1" and names[8] == "block2.8"
        assert [label.get_weight() for label in lower.get_xticklabels()] == ["normal"] * 8 + [
            "bold"
        ]
    plot.microscope(found, tmp_path / "m.svg")
    first = (tmp_path / "m.svg").read_bytes()
    plot.microscope(found, tmp_path / "m.svg")
    assert first == (tmp_path / "m.svg").read_bytes()


def test_microscope_of_what_has_no_number(tmp_path: Path) -> None:
    (row,) = comparison_of(1).rows
    odd = [
        replace(row, own=0.0, accumulated=math.inf, weights=None, activations=None, clipped=None),
        replace(row, place=1, bits=None, input_bits=None),
    ]
    upper = plot.microscope(ada.Comparison(tuple(odd), 0.0, "squared_error", 1)).axes[0]
    assert [patch.get_height() for patch in upper.patches] == pytest.approx([90, 50])
    with pytest.raises(ValueError, match="without rows"):
        plot.microscope(ada.Comparison((), 0.0, "squared_error", 1), tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.gif: expected a file name"):
        plot.microscope(comparison_of(2), tmp_path / "x.gif")
    assert list(tmp_path.iterdir()) == []


def test_bad_input(tmp_path: Path) -> None:
    for name, draw in PICTURES.items():
        with pytest.raises(PlanError, match="without parameters"):
            draw(Plan({}), tmp_path / f"{name}.png")
        with pytest.raises(ValueError, match=r"x\.gif: expected a file name in \.png or \.svg"):
            draw(plan_of(2), tmp_path / "x.gif")
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError):
            draw(plan_of(2), tmp_path / "file" / "x.png")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert ada.plot is plot


def test_colours_differ_in_lightness_too() -> None:
    # Grey and colour-blind readers tell widths apart by lightness alone.
    weights = np.array([0.2126, 0.7152, 0.0722])
    light = [float(np.array(colour_of(bits)[:3]) @ weights) for bits in range(2, 9)]
    assert np.diff(light).min() > 0.04
    assert [is_dark(bits) for bits in (2, 5, 6, None)] == [True, True, False, False]


def test_groups_and_short_names() -> None:
    names = [f"layer{s}.{b}.conv{c}" for s in (1, 2) for b in (0, 1) for c in (1, 2)]
    assert [span[0] for span in groups(names)] == names
    assert groups(names, most=4)[1] == ("layer1.1", 2, 3)
    assert groups(names, most=3) == [("layer1", 0, 3), ("layer2", 4, 7)]
    same = [f"features.{i}" for i in range(100)]
    spans = groups(same)
    assert spans[0] == ("1–10", 0, 9) and spans[-1] == ("91–100", 90, 99)
    assert shortened("abc", 3) == "abc"
    assert len(shortened("a.very.long.name.conv1", 10)) == 10
    assert shortened("a.very.long.name.conv1", 10).endswith("conv1")
    assert not re.search("…", shortened("short", 10))
