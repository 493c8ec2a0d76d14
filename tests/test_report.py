"""Tables of plans and results."""

from __future__ import annotations

import pytest
from rich.console import Console

from adalayer_native.plan import LayerPlan, Plan
from adalayer_native.report import Result, comparison_table, figure6_table
from adalayer_native.report.columns import fitted_text
from adalayer_native.report.record import _fitted

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


def test_the_fit_is_said_with_its_residuals() -> None:
    layers = [
        {
            "name": f"conv{k}", "flops": 2e6 * (k + 1), "bits": 2 + k % 5, "activation_bits": 8,
            "bytes": 9000 - 900 * k, "activations": 500 * (k % 4 + 1),
            "microseconds": 3.0 + 2.0 * k + 6.0 * (k == 4),
        }
        for k in range(9)
    ]  # fmt: skip
    found = fitted_text({"fitted_model": _fitted(layers, None)})
    assert found.startswith("in µs: ") and "largest conv4 -" in found
    use = {"joules": 3.0, "seconds": 1.5, "label": "measured (RAPL)"}
    metered = _fitted(layers, {"native": use})
    assert metered is not None and metered["unit"] == "µJ, power measured (RAPL)"
    assert metered["rows"][0]["measured"] == 6.0  # 2 W for 3 µs
    assert _fitted(layers[:4], None) is None and fitted_text({}) == ""
