"""Tables and the ribbon picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from adalayer_native.errors import PlanError
from adalayer_native.models import get_model
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from adalayer_native.report import Result, comparison_table, figure6_table, ribbon

FIGURE6 = {  # the paper's printed rows: before, after (thousands), pruned %, bits
    "Conv1": (864, 0.20217, 6.4045, 8),
    "Conv3": (73_728, 10.742, 6.7552, 5),
    "Conv6": (589_824, 104.55, 5.4632, 6),
    "FC2": (131_328, 12.685, 22.727, 4),
}


def text(table) -> str:
    console = Console(width=140, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def figure6_plan() -> Plan:
    return Plan(
        {
            name: LayerPlan(name, "conv2d", params, bits, percent / 100)
            for name, (params, _, percent, bits) in FIGURE6.items()
        },
        method="adalayer",
        scores={name: {"A": 0.25} for name in FIGURE6},
    )


def test_figure6_table_reproduces_the_paper() -> None:
    shown = text(figure6_table(figure6_plan()))
    for heading in ("Params K before", "Params K after", "Prune pct", "QuantBits", "AccContrib"):
        assert heading in shown
    for name, (_, after, _, bits) in FIGURE6.items():
        row = next(line for line in shown.splitlines() if f" {name} " in line)
        cells = [cell.strip() for cell in row.split("│") if cell.strip()]
        assert float(cells[2]) == pytest.approx(after, rel=1e-3)
        assert cells[4] == str(bits)
        assert cells[5] == "0.250"


def test_comparison_table() -> None:
    rows = [Result("float", 90.0, 1000, 2.0), {"name": "small", "accuracy": 89.5, "bytes": 100}]
    shown = text(comparison_table(rows))
    small = next(line for line in shown.splitlines() if "│ small" in line)
    assert "89.50" in small
    assert "-0.50" in small
    assert "10.00" in small
    assert "faster" in shown


@pytest.mark.parametrize("name", ["adalayernet", "resnet20"])
def test_ribbon_is_a_readable_png(tmp_path, name: str) -> None:
    layers = supported_layers(get_model(name))
    plan = Plan(
        {
            key: LayerPlan(key, layer_kind(m), m.weight.numel(), 2 + i % 7, (i % 5) / 5)
            for i, (key, m) in enumerate(layers.items())
        }
    )
    ribbon(plan, tmp_path / "deep" / "ribbon.png")
    with Image.open(tmp_path / "deep" / "ribbon.png") as image:
        assert image.format == "PNG"
        assert image.size == (1800, 690)
        pixels = np.asarray(image.convert("RGB"))
    # Along the middle of the ribbon there are several bit colours, not one flat area.
    row = pixels[int(690 * 0.72)]
    colours = {tuple(p) for p in row[60:1590].tolist()}
    assert len(colours) > 5


def test_ribbon_of_float_and_empty_plans(tmp_path) -> None:
    plan = Plan({"a": LayerPlan("a", "linear", 100, None), "b": LayerPlan("b", "linear", 50, 4)})
    ribbon(plan, tmp_path / "r.png", title="title", dpi=50)
    assert (tmp_path / "r.png").stat().st_size > 1000
    with pytest.raises(PlanError, match="without parameters"):
        ribbon(Plan({}), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
