"""The benchmark of trained accuracy, on a few random images: protocol, files, page, resumption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import adalayer_native as ada
from adalayer_native.models import get_model
from bench import accuracy_training as bench


@pytest.fixture
def inputs(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """(data, weights): ten classes of noise and an untrained ResNet-20."""
    monkeypatch.setenv("ADALAYER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bench, "HELD_OUT", 20)
    monkeypatch.setattr(bench, "CALIBRATION", 20)
    monkeypatch.setattr(bench, "BATCH", 20)
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for label in range(10):
            folder = tmp_path / "data" / split / str(label)
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    torch.manual_seed(0)
    models = tmp_path / "models"
    models.mkdir()
    save_file(get_model("resnet20", 10).state_dict(), models / "resnet20_cifar10.safetensors")
    return tmp_path / "data", models


def test_parts_do_not_overlap(inputs: tuple[Path, Path]) -> None:
    images = bench.Images(str(inputs[0]))
    held = set(images.held_out.indices.tolist())
    trained = set(images.training(0).indices.tolist())
    assert len(held) == 20
    assert len(trained) == 40
    assert not held & trained
    assert images.test.dataset is not images.train
    pixels = torch.cat([x for x, _ in images.calibration])
    rest = images.train.normalise(images.train.pixels(torch.tensor(sorted(trained))))
    assert all(bool((rest == one).flatten(1).all(1).any()) for one in pixels)


@pytest.mark.slow
def test_a_row_over_two_seeds(inputs: tuple[Path, Path], tmp_path, monkeypatch, capsys) -> None:
    row = bench.Row("resnet20", 12.5, 1, 0.5)
    monkeypatch.setattr(bench, "ROWS", {row.name: row})
    model = get_model("resnet20", 10)
    results = tmp_path / "results"
    # Measuring the tables of 20 layers is not what is tested.
    plan = ada.allocate(None, ada.Budget(bits=2), method="uniform", model=model)
    plan.save(results / "resnet20-12.5-1" / "plan.json")
    page = tmp_path / "page.md"
    page.write_text("# Accuracy\n\nBy hand.\n", encoding="utf-8")
    data, models = inputs
    command = ["--data", str(data), "--models", str(models), "--rows", row.name, "--results",
               str(results), "--page", str(page)]  # fmt: skip
    assert bench.main([*command, "--seeds", "0"]) == 0
    first = (results / "resnet20-12.5-1" / "seed-0" / "result.json").read_text()
    capsys.readouterr()
    assert bench.main([*command, "--seeds", "0", "1"]) == 0
    assert (results / "resnet20-12.5-1" / "seed-0" / "result.json").read_text() == first
    runs = bench.load(row, results)
    assert list(runs) == [0, 1]
    for seed, found in runs.items():
        file = results / "resnet20-12.5-1" / f"seed-{seed}" / "model.safetensors"
        assert found["bytes"] == file.stat().st_size
        native = ada.restore(model, file)
        test = bench.Images(str(data)).test
        assert found["accuracy"] == bench.accuracy(native, test)
    assert f"drop {runs[0]['float'] - (runs[0]['accuracy'] + runs[1]['accuracy']) / 2:+.2f}" in (
        capsys.readouterr().out
    )
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Accuracy\n\nBy hand.\n")
    assert text.count("--rows resnet20-12.5") == 1


def test_summary_and_bad_files(tmp_path) -> None:
    runs = [
        {"accuracy": a, "float": 91.0, "bytes": b, "float_bytes": 1000}
        for a, b in ((90.0, 99), (91.0, 101))
    ]
    s = bench.summary(runs)
    assert s["mean"] == 90.5
    assert s["sd"] == pytest.approx(0.5**0.5)
    assert s["drop"] == 0.5
    assert s["percent"] == pytest.approx(10.1)
    assert bench.summary(runs[:1])["sd"] == 0.0
    row = bench.ROWS["resnet20-10"]
    file = tmp_path / f"resnet20-10-{row.epochs}" / "seed-0" / "result.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="not a result"):
        bench.load(row, tmp_path)
    page = tmp_path / "page.md"
    page.write_text(bench.END)
    with pytest.raises(ValueError, match="markers"):
        bench.write_part(page, (bench.BEGIN, bench.END), bench.page_section(tmp_path / "none"))
