"""bench/accuracy.py: the protocol on digits, the page, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from adalayer_native.data import digits
from bench import accuracy
from bench.accuracy_page import BEGIN, END, page_section, write_page


def entry(name: str, **changes) -> dict:
    row = {
        "name": name, "group": "no-training", "network": "resnet20", "budget": [["size", 0.135]],
        "method": "optimal", "images": 1000, "most": 0.8, "repair": True, "bytes": 135,
        "float_bytes": 1000, "average_bits": 3.5, "held_out": {"accuracy": 90.0, "kl": 0.1},
        "accuracy": 91.0, "layers": {},
    }  # fmt: skip
    return {**row, **changes}


def results() -> dict:
    rows = [entry("a"), entry("b", accuracy=90.0)]
    for method, score in (("uniform", 85.0), ("adalayer", 86.0), ("optimal", 88.5)):
        rows.append(entry(f"c-{method}", group="equal-size", method=method, accuracy=score))
    machine = {"cpu": "test CPU", "isa": "avx2", "versions": {"torch": "2.13"}}
    floats = {"resnet20": {"accuracy": 91.73, "held_out": 99.0}}
    return {
        "format": accuracy.FORMAT, "machine": machine, "float": floats,
        "rows": {row["name"]: row for row in rows},
    }  # fmt: skip


def test_the_page_judges_every_row() -> None:
    section = page_section(results())
    assert "test CPU" in section
    assert "| ResNet-20 | 135 B | 13.50 % | 1000 | 91.73 | 91.00 | +0.73 | ≤ 0.8: met |" in section
    assert "| 91.73 | 90.00 | +1.73 | ≤ 0.8: **missed** |" in section
    assert "--rows a`" in section
    assert (
        "| 85.00 (13.50 %) | 86.00 (13.50 %) | 88.50 (13.50 %) | +3.50 | rising: met |" in section
    )


@pytest.mark.parametrize(
    ("scores", "words"),
    [((85, 86, 88), "met"), ((85, 84.9, 84.8), "within 0.2"), ((85, 84, 88), "**missed**")],
)
def test_the_page_judges_the_order_of_methods(scores, words: str) -> None:
    found = results()
    for method, score in zip(("uniform", "adalayer", "optimal"), scores, strict=True):
        found["rows"][f"c-{method}"]["accuracy"] = score
    assert f"| rising: {words} |" in page_section(found)


def test_the_page_judges_average_bits_unpruned() -> None:
    found = results()
    for label, gain in ((accuracy.UNPRUNED, 0.9), ("", 5.0)):
        for method, score in (("uniform", 85.0), ("mixed", 85.5), ("optimal", 85.0 + gain)):
            name = f"d-{method}-{label}"
            row = entry(name, group="average-bits", method=method, accuracy=score, label=label)
            found["rows"][name] = {**row, "budget": [["bits", 2.5]]}
    lines = page_section(found).splitlines()
    (unpruned,) = (line for line in lines if accuracy.UNPRUNED in line)
    assert "85.50 (13.50 %)" in unpruned and unpruned.endswith("| +0.90 | ≥ 1: **missed** |")
    (pruned,) = (line for line in lines if line.startswith("| ResNet-20 | 2.5 bits |"))
    assert pruned.endswith("| +5.00 |  |")
    assert "two ways" in page_section(found)


def test_mixed_plans_spend_the_average_from_the_front() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(),
                          nn.Linear(128, 10)).eval()  # fmt: skip
    model = accuracy.ada.capture(model, torch.zeros(2, 3, 8, 8))
    plan = accuracy.mixed_plan(model, accuracy.ada.Budget(bits=2.39))
    assert [entry.bits for entry in plan.layers.values()] == [3, 3, 2]
    assert 2.38 < plan.average_bits <= 2.39
    with pytest.raises(accuracy.ada.BudgetError):
        accuracy.mixed_plan(model, accuracy.ada.Budget(bits=1.5))


def test_the_page_keeps_what_is_written_by_hand(tmp_path) -> None:
    page = tmp_path / "docs" / "accuracy.md"
    write_page(results(), page)
    page.write_text(page.read_text() + "\nBy hand.\n")
    write_page({**results(), "rows": {}}, page)
    text = page.read_text()
    assert text.endswith("By hand.\n")
    assert text.count(BEGIN) == text.count(END) == 1
    assert "ResNet-20" not in text
    page.write_text("# Accuracy\n\nAfter training.\n")  # by bench/accuracy_training.py
    write_page(results(), page)
    text = page.read_text()
    assert text.endswith("After training.\n")
    assert text.count("# Accuracy\n") == text.count(BEGIN) == 1
    page.write_text(f"mine {END}")
    with pytest.raises(ValueError, match="markers"):
        write_page(results(), page)


def test_rows_are_chosen_by_name_and_group() -> None:
    assert len(accuracy.chosen_rows(["no-training"])) == 4
    (row,) = accuracy.chosen_rows(["resnet20-13.5"])
    assert row.limits.size == 0.135
    assert len(accuracy.chosen_rows(["all"])) == len(accuracy.ROWS)
    with pytest.raises(ValueError, match="no row or group 'x'"):
        accuracy.chosen_rows(["x"])


def test_a_file_of_something_else_is_refused(tmp_path) -> None:
    path = tmp_path / "results.json"
    assert accuracy.load(path)["rows"] == {}
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a file of accuracy results"):
        accuracy.load(path)


def test_held_out_calibration_and_test_images_are_apart(monkeypatch) -> None:
    split = dict(zip(("train", "test"), digits(32), strict=True))
    monkeypatch.setattr(accuracy, "open_dataset", lambda _, which, *a, **k: split[which])
    monkeypatch.setattr(accuracy, "HELD_OUT", 400)
    images = accuracy.Images("digits")
    held = torch.cat([x for x, _ in images.held_out])
    used = torch.cat([x for x, _ in images.calibration(300)])
    assert (len(held), len(used)) == (400, 300)
    both = torch.cat([held, used]).flatten(1)
    train = torch.cat([x for x, _ in accuracy.Batches(split["train"], 500)]).flatten(1)
    assert len(both.unique(dim=0)) >= 690  # digits holds a few images twice
    assert len(torch.cat([train, both]).unique(dim=0)) == len(train.unique(dim=0))
    assert sum(len(y) for _, y in images.tested) == len(split["test"])


def test_a_row_is_measured_with_the_engine_and_kept(monkeypatch, tmp_path) -> None:
    split = dict(zip(("train", "test"), digits(32), strict=True))
    monkeypatch.setattr(accuracy, "open_dataset", lambda _, which, *a, **k: split[which])
    monkeypatch.setattr(accuracy, "HELD_OUT", 100)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
    ).eval()
    monkeypatch.setattr(accuracy, "network", lambda *_: model)
    row = accuracy.Row("r", "no-training", "resnet20", (("size", 0.5),), "uniform", 32, 50.0)
    path = tmp_path / "results.json"
    found = accuracy.run([row], "digits", tmp_path, path)
    kept = json.loads(path.read_text())["rows"]["r"]
    assert kept == json.loads(json.dumps(found["rows"]["r"]))
    assert kept["bytes"] <= 0.5 * kept["float_bytes"]
    assert kept["bytes"] == (tmp_path / "accuracy" / "r" / "model.safetensors").stat().st_size
    assert 0 <= kept["accuracy"] <= 100
    monkeypatch.setattr(accuracy, "run_row", lambda *_: pytest.fail("it was there already"))
    assert accuracy.run([row], "digits", tmp_path, path)["rows"].keys() == {"r"}
