"""Energy: the model in closed form, counters that wrap around, labels, and what is missing."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_models import tiny

import adalayer_native as ada
from adalayer_native.allocation import packed_bytes
from adalayer_native.energy import (
    LayerEnergy,
    Meter,
    Row,
    counters,
    fit_layers,
    intensity,
    layer_energy,
)
from adalayer_native.energy.meter import Counter
from adalayer_native.importance.flops import Work, layer_work
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers


def test_published_constants() -> None:
    # 8 x 8 bits: 0.2 pJ to multiply, 0.1 pJ to add; 160 pJ a byte from DRAM, 1.25 from SRAM.
    found = layer_energy(1000, 10, 8, 8, 4)
    assert found == LayerEnergy(pytest.approx(300), 1600, 5, extrapolated=False)
    assert found.total == pytest.approx(1905)
    # float32: 3.7 + 0.9 pJ, four bytes an activation.
    assert layer_energy(1000, 40, None, activations=4) == LayerEnergy(pytest.approx(4600), 6400, 20)


def test_below_eight_bits_it_is_an_extrapolation_and_says_so() -> None:
    for bits, activation_bits in ((4, 8), (8, 4), (2, 2)):
        found = layer_energy(1000, 0, bits, activation_bits)
        assert found.extrapolated
        assert found.arithmetic == pytest.approx(200 * bits * activation_bits / 64 + 100)


def plan_of(model, bits: int | None, sparsity: float = 0.0) -> Plan:
    return Plan(
        {
            name: LayerPlan(name, layer_kind(m), m.weight.numel(), bits, sparsity)
            for name, m in supported_layers(model).items()
        }
    )


def test_energy_of_a_plan() -> None:
    model, x = tiny(), torch.zeros(2, 3, 8, 8)
    found = ada.plan_energy(model, plan_of(model, 4, 0.5), x)
    # conv1: 3 -> 8 channels, 3 x 3, 8 x 8 pixels in and out.
    macs, values = 216 * 64, (3 + 8) * 64
    assert found["conv1"].arithmetic == pytest.approx(macs * (0.1 + 0.1))
    assert found["conv1"].weights == 160 * packed_bytes(216, 108, 4)
    assert found["conv1"].activations == 1.25 * values
    whole = ada.plan_energy(model, plan_of(model, None), x)
    assert whole["conv1"].weights == 160 * 4 * 216
    assert whole["conv1"].activations == 5 * values
    assert all(found[name].total < whole[name].total for name in whole)
    # Fewer bits never cost more.
    totals = [
        sum(layer.total for layer in ada.plan_energy(model, plan_of(model, bits), x).values())
        for bits in range(2, 9)
    ]
    assert totals == sorted(totals)
    with pytest.raises(ada.PlanError, match="unknown layer 'other'"):
        ada.plan_energy(model, Plan({"other": LayerPlan("other", "linear", 4, 4)}), x)


def test_work_of_a_layer() -> None:
    model = tiny()
    work = layer_work(model, supported_layers(model), torch.zeros(2, 3, 8, 8))
    assert work["conv2"] == Work(macs=8 * 9 * 12 * 16, activations=8 * 64 + 12 * 16)
    assert work["fc"] == Work(macs=48 * 4, activations=48 + 4)


def zone(root: Path, name: str, label: str, microjoules: int, limit: int = 1000) -> Path:
    path = root / name
    path.mkdir(parents=True)
    (path / "name").write_text(f"{label}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{limit}\n")
    return path


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


@pytest.mark.usefixtures("no_gpu")
def test_rapl_zones(tmp_path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 10)
    zone(tmp_path, "intel-rapl:0:0", "core", 5)  # a part of the package
    zone(tmp_path, "intel-rapl:1", "psys", 5)  # the packages again
    broken = zone(tmp_path, "intel-rapl:2", "package-1", 5)
    (broken / "energy_uj").unlink()  # as where only root may read
    found = counters(tmp_path)
    assert [(c.source, c.part) for c in found] == [("RAPL", "cpu"), ("RAPL", "ram")]
    with Meter(found=found, grams_per_kwh=360) as meter:
        (package / "energy_uj").write_text("100\n")  # wrapped around at 1000
        (memory / "energy_uj").write_text("60\n")
    use = meter.use
    assert use.measured and use.label == "measured (RAPL)"
    assert use.parts == pytest.approx({"cpu": 200e-6, "ram": 50e-6})
    assert use.joules == pytest.approx(250e-6)
    assert use.co2_grams == pytest.approx(250e-6 / 3.6e6 * 360)
    each = use.per(1000)
    assert each.joules == pytest.approx(250e-9) and each.measured
    assert each.as_dict()["label"] == "measured (RAPL)"
    with pytest.raises(ValueError, match="above 0"):
        use.per(0)
    assert counters(tmp_path / "nothing") == []


def test_a_long_run_samples_in_between(monkeypatch) -> None:
    monkeypatch.setattr("adalayer_native.energy.meter.SAMPLE_SECONDS", 0.01)
    values = [0.0, 0.0, 700.0, 300.0]
    seen = threading.Event()

    def read() -> float:
        value = values.pop(0) if len(values) > 1 else values[0]
        if value == 300.0:
            seen.set()
        return value

    with Meter(found=[Counter("RAPL", "cpu", read, 1000.0)]) as meter:
        assert seen.wait(30)  # a single look at the end would take the wrap for 300 J
    assert meter.use.joules == 1300
    assert meter.use.co2_grams is None and meter.use.country is None


def test_the_result_is_there_after_the_block() -> None:
    meter = Meter(found=[Counter("RAPL", "cpu", lambda: 0.0)])
    with pytest.raises(RuntimeError, match="still running"):
        _ = meter.use
    with meter:
        pass
    assert meter.use.joules == 0


def test_missing_extra_names_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(ada.MissingExtraError, match=r"install adalayer_native\[energy\]"):
        Meter(found=[])
    with pytest.raises(ImportError):  # what code that does not know the package catches
        Meter(found=[Counter("RAPL", "cpu", lambda: 0.0)], country="ITA")
    # Counters alone need nothing more.
    Meter(found=[Counter("RAPL", "cpu", lambda: 0.0)], grams_per_kwh=300)
    with pytest.raises(ValueError, match="not be negative"):
        Meter(found=[], grams_per_kwh=-1)


def test_estimates_of_codecarbon() -> None:
    pytest.importorskip("codecarbon", reason="needs the extra: pip install adalayer_native[energy]")
    with Meter(found=[], country="ITA") as meter:
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            sum(range(1000))
    use = meter.use
    assert not use.measured and use.label == "estimated (codecarbon)"
    assert use.joules == pytest.approx(sum(use.parts.values())) and use.joules > 0
    assert 1.2 <= use.seconds < 30
    assert use.co2_grams is not None
    grams_per_kwh = use.co2_grams / use.joules * 3.6e6
    assert 50 < grams_per_kwh < 1000  # Italy's mix, whatever the year
    with pytest.raises(ValueError, match=r"unknown country 'XYZ'.*'ITA'"):
        Meter(found=[], country="XYZ")
    # With a counter the joules are measured; the country gives its intensity alone.
    values = iter([0.0, 5.0, 3600.0 + 5.0])
    with Meter(found=[Counter("RAPL", "cpu", lambda: next(values))], country="ITA") as meter:
        time.sleep(0.05)
    assert meter.use.measured and meter.use.joules == 3600
    assert meter.use.co2_grams == pytest.approx(grams_per_kwh * 1e-3, rel=1e-6)


# -- fitted to a machine, and elsewhere -----------------------------------------------------------


def test_a_model_that_layers_follow_is_found_again() -> None:
    truth = {"multiplications": 3e-5, "additions": 1e-5, "weights": 2e-3, "activations": 1e-3}
    rows = []
    for position, (macs, kilobytes, values) in enumerate(
        [(1e6, 2, 9e3), (4e6, 30, 4e3), (2e5, 80, 1e3), (9e6, 9, 3e4), (3e6, 1, 2e4), (5e5, 4, 5e2)]
    ):
        bits = 2 + position
        took = (
            truth["multiplications"] * macs * bits * 8 / 64
            + truth["additions"] * macs
            + truth["weights"] * 1e3 * kilobytes
            + truth["activations"] * values
            + 5.0
        )
        rows.append(Row(f"layer{position}", macs, bits, 8, 1e3 * kilobytes, values, took))
    fit = fit_layers(rows, "µs")
    for name, value in truth.items():
        assert fit.coefficients[name] == pytest.approx(value, rel=1e-3)
    assert fit.coefficients["constant"] == pytest.approx(5.0, rel=1e-3)
    assert fit.error < 1e-6
    # Two layers that are alike, and one takes twice as long: no fit can be right about both.
    odd = replace(rows[0], name="odd", measured=2 * rows[0].measured)
    shown = fit_layers([odd, *rows], "µs").as_dict()
    assert shown["unit"] == "µs" and shown["error"] > 0.05
    by_name = {row["name"]: row for row in shown["rows"]}
    assert by_name["odd"]["predicted"] == pytest.approx(by_name["layer0"]["predicted"])
    assert by_name["odd"]["residual"] < -0.05 < 0.05 < by_name["layer0"]["residual"]
    with pytest.raises(ada.EnergyError, match="at least 2 measured layers, got 1"):
        fit_layers(rows[:1], "µs")
    with pytest.raises(ada.EnergyError, match="layer 'layer1': measured is 0"):
        fit_layers([rows[0], replace(rows[1], measured=0.0)], "µs")


def test_co2_by_region() -> None:
    pytest.importorskip("codecarbon")
    with Meter(found=[Counter("RAPL", "cpu", lambda: 0.0)]) as meter:
        pass
    use = replace(meter.use, joules=3.6e6)  # a kWh
    found = use.co2_in(["SWE", "IND"])
    assert found == {"SWE": intensity("SWE"), "IND": intensity("IND")}
    assert 0 < found["SWE"] < found["IND"]
    with pytest.raises(ada.EnergyError, match="unknown country 'XXX'"):
        use.co2_in(["XXX"])
