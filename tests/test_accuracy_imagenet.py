"""bench/accuracy_imagenet.py: the page, plans without a search, what it reads and refuses."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import adalayer_native as ada
from bench import accuracy_imagenet as bench


def run(accuracy: float, **changes) -> dict:
    judged = {"float": 78.0, "agreement": 90.0, "error": 0.05, "kl": 0.05}
    found = {
        "bytes": 133, "float_bytes": 1000, "average_bits": 4.0, "seconds": 100.0,
        "cpu_seconds": 90.0, "peak_bytes": 2e9, "threads": 1, "layers": {},
        "used": {**judged, "accuracy": 78.0}, "unused": {**judged, "accuracy": accuracy},
    }  # fmt: skip
    return {**found, **changes}


def test_the_page_has_means_of_both_directions(tmp_path: Path) -> None:
    row = {"title": "4-bit weights", "most": 2.0}
    machine = {"cpu": "test CPU", "isa": "avx2", "versions": {"torch": "2.13"}}
    results = {"machine": machine, "rows": {
        "met": {**row, "runs": {"a": run(75.5), "b": run(77.5)}},
        "missed": {**row, "runs": {"a": run(74.0), "b": run(77.5)}},
        "half": {**row, "title": "not whole", "runs": {"a": run(75.0)}},
    }}  # fmt: skip
    page = tmp_path / "accuracy.md"
    page.write_text("# Accuracy\n\nBefore.\n", encoding="utf-8")
    for _ in range(2):
        bench.write_part(page, (bench.BEGIN, bench.END), bench.page_section(results))
    text = page.read_text(encoding="utf-8")
    assert text.count(bench.BEGIN) == text.count(bench.END) == 1
    assert "Before." in text
    assert "| 13.30 % | 4.00 | +1.5 | ≤ 2: met | +0.0 | 90.0 % | 0.0500 \\| 0.0500 |" in text
    assert "| +2.2 | ≤ 2: **missed** |" in text
    assert "not whole" not in text


@pytest.mark.parametrize(("row", "picture"), [("uniform-4-6", 8), ("uniform-4-6-picture", 6)])
def test_plans_without_a_search_give_depthwise_inputs_eight_bits(row: str, picture: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    model = ada.capture(net.eval(), torch.rand(2, 3, 12, 12))
    plan = bench.ROWS[row].plan(model)
    assert plan is not None
    found = [(entry.bits, entry.activation_bits) for entry in plan.layers.values()]
    assert found == [(4, picture), (4, 8), (4, 6)]
    assert bench.ROWS["optimal-4"].plan(model) is None


def test_pictures_of_a_half_in_the_order_of_their_classes(tmp_path: Path) -> None:
    file = tmp_path / "two.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name, shade in (("a/010/x.jpg", 255), ("a/002/y.jpg", 0), ("b/004/z.jpg", 9)):
            data = io.BytesIO()
            Image.new("RGB", (256, 256), (shade,) * 3).save(data, "jpeg")
            archive.writestr(name, data.getvalue())
    ((x, y),) = bench.pictures(file, "a")
    assert x.shape == (2, 3, 224, 224)
    assert y.tolist() == [2, 10]
    assert float(x[0].max()) < 0 < float(x[1].min())
    with pytest.raises(ValueError, match="expected pictures c/<class index>"):
        bench.pictures(file, "c")


def test_a_network_is_judged_beside_the_float_one() -> None:
    z = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    data = [(z, torch.tensor([0, 2]))]
    found = bench.judged(lambda x: x.flip(0), data, lambda x: x)
    assert (found["accuracy"], found["float"], found["agreement"]) == (0.0, 50.0, 0.0)
    same = bench.judged(lambda x: x, data, lambda x: x)
    assert (same["agreement"], same["error"]) == (100.0, 0.0)
    assert same["kl"] == pytest.approx(0.0, abs=1e-6)
