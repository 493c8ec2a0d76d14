"""The command line: compress from files to files, info, errors in one sentence."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_cli import (
    CLASSES,
    SIZE,
    SmallNet,
    make_quick,
    run,
    save_weights,
    train_small,
    write_images,
)
from helpers_engine import native_of
from helpers_models import tiny
from safetensors.torch import load_file

import adalayer_native as ada
from adalayer_native import Plan, restore
from adalayer_native.data import open_dataset
from adalayer_native.measure import accuracy
from adalayer_native.models import load_weights

BUDGET = 0.25


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """(image folder, float weights)."""
    root = tmp_path_factory.mktemp("cli")
    data = write_images(root / "images")
    return data, save_weights(train_small(data), root / "weights.safetensors")


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path) -> None:
    make_quick(monkeypatch, tmp_path / "cache")


def compress(monkeypatch, files: tuple[Path, Path], out: Path, *more: object) -> int:
    data, weights = files
    return run(
        monkeypatch, "compress", "helpers_cli:SmallNet", "--weights", weights, "--data", data,
        "--out", out, "--image-size", SIZE, "--batch-size", 16, "--calibration", 32, *more,
    )  # fmt: skip


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_compress_writes_plan_model_and_report(monkeypatch, capsys, files, tmp_path) -> None:
    out = tmp_path / "out"
    assert compress(monkeypatch, files, out, "--size", BUDGET, "--epochs", 1, "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)  # nothing but the report on standard output
    assert report == load(out / "report.json")
    assert "QuantBits" in printed.err and "smaller" in printed.err

    packed = out / "model.safetensors"
    assert report["bytes"] == packed.stat().st_size
    assert report["size_fraction"] == report["bytes"] / files[1].stat().st_size <= BUDGET
    assert report["float_ms"] > 0 and report["native_ms"] > 0
    assert report["test_images"] == 20 and report["epochs"] == 1
    assert [row["name"] for row in report["classes"]] == list(CLASSES)
    assert sum(row["images"] for row in report["classes"]) == 20
    assert 5 * sum(row["right"] for row in report["classes"]) == report["accuracy"]
    plan = Plan.load(out / "plan.json")
    assert [layer["name"] for layer in report["layers"]] == list(plan)
    for layer in report["layers"]:
        assert layer["bits"] == plan[layer["name"]].bits
        assert set(layer) >= {"params", "planned_sparsity", "encoding", "bytes", *"AFRI"}

    # Both accuracies are those of the files, in per cent.
    test = open_dataset(files[0], "test", SIZE, progress=False)
    batch = [(test.normalise(test.pixels()), test.labels)]
    float_model = load_weights(SmallNet().eval(), files[1])
    native = restore(SmallNet(), packed)
    assert report["float_accuracy"] == accuracy(float_model, batch, progress=False) > 90
    assert report["accuracy"] == accuracy(native, batch, progress=False) > 60


@pytest.mark.parametrize("form", ["zip", "folder"])
def test_compress_uniform_from_folder_and_zip(monkeypatch, files, tmp_path, form: str) -> None:
    data, weights = files
    if form == "zip":
        data = Path(shutil.make_archive(str(tmp_path / "images"), "zip", data))
    out = tmp_path / "out"
    more = ("--bits", 4, "--method", "uniform", "--epochs", 0, "--quiet")
    assert compress(monkeypatch, (data, weights), out, *more) == 0
    report = load(out / "report.json")
    assert {layer["bits"] for layer in report["layers"]} == {4}
    assert report["method"] == "uniform" and report["epochs"] == 0
    assert not (out / "work" / "analysis.json").exists()  # uniform needs no scores
    assert "A" not in report["layers"][0]
    for layer in report["layers"]:  # no training: repaired, and the report says what is left
        assert 0 < layer["output_error"] <= layer["plain_error"] < 1


def test_compress_ascending(monkeypatch, files, tmp_path) -> None:
    out = tmp_path / "out"
    more = ("--method", "ascending", "--layer-bits", "2,3,4", "--stages", "conv1,conv2,conv3")
    assert compress(monkeypatch, files, out, *more, "--epochs", 0, "--quiet", "--no-repair") == 0
    layers = load(out / "report.json")["layers"]
    assert not any("output_error" in layer for layer in layers)
    bits = {layer["name"]: layer["bits"] for layer in layers}
    assert bits == {"conv1": 2, "conv2": 3, "conv3": 4, "fc": None}


def test_compress_optimal_with_overrides(monkeypatch, capsys, files, tmp_path) -> None:
    out = tmp_path / "out"
    more = ("--method", "optimal", "--bytes", 14_000, "--bits", 5, "--epochs", 0, "--quiet")
    decided = ("--fix", "conv2=7", "--exclude", "fc")
    assert compress(monkeypatch, files, out, *more, *decided, "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)  # HiGHS printed nothing either
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert layers["conv2"]["bits"] == 7 and layers["fc"]["bits"] is None
    assert report["bytes"] <= 14_000 and report["average_bits"] <= 5
    assert {name for name, layer in layers.items() if "E" in layer} == {"conv1", "conv3"}
    assert report["measured"]["predicted_loss"] >= 0
    assert "Predicted loss increase, layer by layer (optimal)" in printed.err
    assert [p.name[:7] for p in (out / "work" / "tables").iterdir()] == ["errors-"]


def test_compress_to_levels(monkeypatch, capsys, files, tmp_path) -> None:
    out = tmp_path / "out"
    more = ("--levels", "8,6,4", "--fix", "conv2=7", "--effort", "low", "--quiet", "--json")
    assert compress(monkeypatch, files, out, *more) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    widths = [row["average_bits"] for row in report["levels"]]
    assert 8 >= widths[0] > 6 >= widths[1] > 4 >= widths[2]
    assert report["levels"][0]["accuracy"] == report["accuracy"]
    assert all(row["engine_ms"] > 0 for row in report["levels"])
    assert "level 2, " in printed.err and report["epochs"] == 0
    engine = ada.load(out / "model.ada")
    assert engine.levels == 3
    for level in range(3):
        rows = {r.name: r.bits for r in engine.at_quality(level).coverage(rounds=0).rows if r.bits}
        assert rows["conv2"] == 7
    # The accuracies are those of the file.
    test = open_dataset(files[0], "test", SIZE, progress=False)
    x, labels = test.normalise(test.pixels()), test.labels
    for level, row in enumerate(report["levels"]):
        right = (engine.at_quality(level)(x).argmax(1) == labels).float().mean()
        assert row["accuracy"] == pytest.approx(100 * float(right))
    assert run(monkeypatch, "report", out, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Levels of quality" in page and f"{widths[2]:.2f}" in page


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--levels", "3,8"), 2, "the best level first"),
        (("--levels", "8"), 2, "two or more widths"),
        (("--levels", "9,4"), 2, "expected 2 to 8 bits"),
        (("--levels", "8,4", "--bits", 4), 1, "not with a budget"),
        (("--levels", "8,4", "--no-repair"), 1, "or --no-repair"),
        (("--levels", "8,4", "--method", "uniform"), 1, "which is optimal, not uniform"),
        (("--levels", "8,4", "--fix", "nothing=4"), 1, "nothing"),
    ],
)
def test_levels_that_cannot_be(monkeypatch, capsys, files, tmp_path, more, code, message) -> None:
    assert compress(monkeypatch, files, tmp_path / "out", *more) == code
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--method", "optimal"),
            "--size, --bytes or --bits, --latency, --bops, --energy or --loss",
        ),
        (("--size", 0.2, "--bytes", 9000), "by size or by bytes, not by both"),
        (("--size", 0.2, "--latency", 1), "'adalayer' takes one limit"),
        (("--size", 0.2, "--exclude", "conv9"), "exclude: unknown layer 'conv9'"),
        (("--size", 0.2, "--fix", "conv9=4"), "fixed: unknown layer 'conv9'"),
    ],
)
def test_bad_limits_and_overrides(monkeypatch, capsys, files, tmp_path, more, message) -> None:
    assert compress(monkeypatch, files, tmp_path / "o", *more, "--epochs", 0, "--quiet") == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_criterion_energy_frontier_and_report(monkeypatch, capsys, files, tmp_path) -> None:
    pytest.importorskip("codecarbon", reason="needs the extra: pip install adalayer_native[energy]")
    out = tmp_path / "out"
    more = ("--method", "optimal", "--criterion", "kl", "--bits", 4, "--epochs", 0, "--quiet")
    assert compress(monkeypatch, files, out, *more, "--energy-use", "--country", "ITA") == 0
    report = load(out / "report.json")
    assert report["criterion"] == "kl" and report["format"] == "adalayer-report"
    assert set(report["energy"]) == {"compression", "float", "native"}
    for use in report["energy"].values():
        assert use["label"].startswith(("measured (", "estimated (")) and use["co2_grams"] >= 0
    sizes = [point["bytes"] for point in report["frontier"]]
    assert len(sizes) >= 2 and sizes == sorted(sizes)
    for layer in report["layers"]:
        assert layer["kernel"] and layer["microseconds"] >= 0 and layer["energy_pj"] > 0
    page = tmp_path / "report.html"
    assert run(monkeypatch, "report", out, "--out", page) == 0
    assert "SmallNet: optimal" in page.read_text(encoding="utf-8")
    assert run(monkeypatch, "info", out) == 0
    assert "energy nJ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--size", 0.2, "--country", "ITA"), "give --energy-use, too"),
        (("--size", 0.2, "--criterion", "kurtosi"), "did you mean 'kurtosis'"),
        (("--size", 0.2, "--criterion", "kl", "--method", "uniform"), "looks at no criterion"),
    ],
)
def test_bad_criteria_and_energy(monkeypatch, capsys, files, tmp_path, more, message) -> None:
    assert compress(monkeypatch, files, tmp_path / "o", *more, "--epochs", 0, "--quiet") == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_missing_energy_extra_names_it(monkeypatch, capsys, files, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    monkeypatch.setattr("adalayer_native.energy.meter.counters", list)
    more = ("--size", 0.2, "--energy-use", "--epochs", 0, "--quiet")
    assert compress(monkeypatch, files, tmp_path / "o", *more) == 1
    assert "install adalayer_native[energy]" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o").exists()  # before any work


def test_a_malformed_fix_is_a_usage_error(monkeypatch, capsys, files, tmp_path) -> None:
    for text, message in (
        ("conv1", "LAYER=BITS"),
        ("conv1=four", "LAYER=BITS"),
        ("=4", "LAYER=BITS"),
        ("conv1=9", "expected 2 to 8 bits"),
        ("conv1=1", "expected 2 to 8 bits"),
    ):
        assert compress(monkeypatch, files, tmp_path / "o", "--size", 0.2, "--fix", text) == 2
        assert message in capsys.readouterr().err


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[k], right[k]) for k in left)


# Of a stage: what it calls again and again, and at which call it is interrupted.
STAGES = {
    "analysis": ("adalayer_native.importance.accuracy", "loss_of", 3),
    "search": ("adalayer_native.allocation.evaluate", "Evaluator._measure", 5),
    "finetune": ("adalayer_native.training.loop", "Loop._step", 6),
}
TWO_EPOCHS = ("--size", BUDGET, "--epochs", 2, "--quiet")


def counted(patch: pytest.MonkeyPatch, stage: str, limit: float = math.inf) -> list[int]:
    """The number of a stage's calls, which grows; at the limit comes Ctrl-C."""
    module, name, _ = STAGES[stage]
    owner: Any = sys.modules[module]
    *inner, name = name.split(".")
    for part in inner:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    count = [0]

    def counting(*arguments, **options):
        count[0] += 1
        if count[0] == limit:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    patch.setattr(owner, name, counting)
    return count


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> tuple[Path, dict[str, list[int]]]:
    """A run that nobody interrupted, and how often its stages' functions were called."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch, root / "cache")
        counts = {stage: counted(patch, stage) for stage in STAGES}
        assert compress(patch, files, root / "out", *TWO_EPOCHS) == 0
    return root / "out", counts


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_compress_goes_on(
    monkeypatch, capsys, files, whole, tmp_path, stage: str
) -> None:
    expected, counts = whole
    broken = tmp_path / "broken"
    limit = STAGES[stage][2]
    with monkeypatch.context() as patch:
        count = counted(patch, stage, limit)
        assert compress(patch, files, broken, *TWO_EPOCHS) == 130 and count == [limit]
    assert "same command goes on" in capsys.readouterr().err
    assert not (broken / "model.safetensors").exists()
    with monkeypatch.context() as patch:
        rest = counted(patch, stage)
        assert compress(patch, files, broken, *TWO_EPOCHS) == 0
    assert rest < counts[stage]
    assert same(tensors(expected), tensors(broken))
    assert load(expected / "plan.json") == load(broken / "plan.json")


def train(monkeypatch, data: Path, out: Path, *more: object) -> int:
    return run(
        monkeypatch, "train", "helpers_cli:SmallNet", "--data", data, "--out", out, "--quiet",
        "--image-size", SIZE, "--batch-size", 16, "--lr", 0.05, *more,
    )  # fmt: skip


def test_train_writes_weights_and_report(monkeypatch, capsys, files, tmp_path) -> None:
    out = tmp_path / "runs" / "small.safetensors"
    assert train(monkeypatch, files[0], out, "--epochs", 6, "--no-augment", "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report == load(out.with_suffix(".json"))
    assert report["test_images"] == 20 and len(report["epochs"]) == 6
    assert "test accuracy" in printed.err
    test = open_dataset(files[0], "test", SIZE, progress=False)
    batch = [(test.normalise(test.pixels()), test.labels)]
    model = load_weights(SmallNet().eval(), out)
    assert report["accuracy"] == accuracy(model, batch, progress=False) > 90
    assert {path.name for path in out.parent.iterdir()} == {
        "small.safetensors", "small.json", "small.checkpoint.safetensors"
    }  # fmt: skip


def test_interrupted_train_goes_on(monkeypatch, capsys, files, tmp_path) -> None:
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    assert train(monkeypatch, files[0], whole, "--epochs", 2) == 0
    loop = sys.modules["adalayer_native.training.loop"].Loop
    step, count = loop._step, 0

    def counting(*arguments) -> None:
        nonlocal count
        count += 1
        if count == 6:
            signal.raise_signal(signal.SIGINT)
        step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", counting)
        assert train(monkeypatch, files[0], broken, "--epochs", 2) == 130
    assert not broken.exists()
    assert "same command goes on" in capsys.readouterr().err
    assert train(monkeypatch, files[0], broken, "--epochs", 2) == 0
    assert same(load_file(whole), load_file(broken))


def test_other_arguments_do_not_reuse_the_checkpoint(monkeypatch, capsys, files, tmp_path) -> None:
    used, fresh = tmp_path / "used", tmp_path / "fresh"
    base = ("--size", BUDGET, "--method", "uniform", "--quiet")
    assert compress(monkeypatch, files, used, *base, "--epochs", 1) == 0
    first = tensors(used)
    other = (*base, "--epochs", 2, "--seed", 5)
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert compress(monkeypatch, files, used, *other) == 0
    assert "belongs to another run" in capsys.readouterr().err
    assert compress(monkeypatch, files, fresh, *other) == 0
    assert same(tensors(used), tensors(fresh))
    assert not same(first, tensors(used))


def test_repeating_a_finished_command_trains_nothing(monkeypatch, files, tmp_path) -> None:
    command = ("--size", BUDGET, "--method", "uniform", "--epochs", 1, "--quiet")
    assert compress(monkeypatch, files, tmp_path / "out", *command) == 0
    before = tensors(tmp_path / "out")

    def never(*_: object) -> None:
        raise AssertionError("trained again")

    loop = sys.modules["adalayer_native.training.loop"].Loop
    monkeypatch.setattr(loop, "_step", never)
    assert compress(monkeypatch, files, tmp_path / "out", *command) == 0
    assert same(before, tensors(tmp_path / "out"))


def test_info(monkeypatch, capsys, files, tmp_path) -> None:
    out = tmp_path / "out"
    assert compress(monkeypatch, files, out, "--size", BUDGET, "--epochs", 0, "--quiet") == 0
    packed = out / "model.safetensors"
    capsys.readouterr()
    assert run(monkeypatch, "info", packed, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["bytes"] == packed.stat().st_size
    assert [e["name"] for e in shown["layers"]] == ["conv1", "conv2", "conv3", "fc", None]
    assert shown["layers"][1]["shape"] == [32, 16, 3, 3]
    assert sum(e["bytes"] for e in shown["layers"]) < shown["bytes"]
    assert run(monkeypatch, "info", packed) == 0
    table = capsys.readouterr().out
    assert "conv3" in table and "32×32×3×3" in table and "bits per weight" in table


def test_info_of_an_engine(monkeypatch, capsys, tmp_path) -> None:
    path = tmp_path / "tiny.ada"
    native = native_of(tiny(), torch.randn(8, 3, 8, 8))
    engine = ada.compile(native, torch.zeros(1, 3, 8, 8), policy="native")
    engine.save(path, class_names=["a", "b", "c", "d"], preprocessing={"size": 8})
    assert run(monkeypatch, "info", path, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["bytes"] == path.stat().st_size
    assert shown["inputs"] == [{"name": "x", "shape": [3, 8, 8]}]
    assert shown["classes"] == ["a", "b", "c", "d"] and shown["preprocessing"] == {"size": 8}
    assert [n["name"] for n in shown["nodes"] if n["bits"] == 8] == ["conv1", "conv2", "fc"]
    assert run(monkeypatch, "info", path) == 0
    table = capsys.readouterr().out
    assert "conv2" in table and "x [batch, 3, 8, 8]; 4 classes; with preprocessing" in table
    path.write_bytes(path.read_bytes()[:100])
    assert run(monkeypatch, "info", path) == 1
    assert "tiny.ada" in capsys.readouterr().err


def test_help_and_usage(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--help") == 0
    assert "compress" in capsys.readouterr().out
    assert run(monkeypatch, "compress", "adalayernet") == 2
    assert "--data" in capsys.readouterr().err
    assert run(monkeypatch, "nothing") == 2


@pytest.mark.slow
def test_demo(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert run(monkeypatch, "demo", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    for text in ("float", "uniform", "layer-wise", "faster", "AccContrib", "ribbon.png"):
        assert text in printed
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("uniform", "adalayer")]
    assert (tmp_path / "ribbon.png").stat().st_size > 10_000
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "AdaLayerNet on digits: adalayer" in page and 'id="frontier"' in page
    assert load(tmp_path / "report.json")["frontier"]
    assert len(ada.load(tmp_path / "adalayer.ada").class_names or ()) == 10
    assert max(sizes) <= 0.1 * 5_579_816


@pytest.mark.slow
def test_real_network_keeps_its_accuracy_without_training(
    monkeypatch, shared_dir, tmp_path
) -> None:
    out = tmp_path / "out"
    more = ("--size", 0.2, "--method", "uniform", "--epochs", 0, "--quiet", "--out", out)
    weights = shared_dir / "models" / "adalayernet_cifar10.safetensors"
    data = shared_dir / "data" / "cifar10.zip"
    monkeypatch.delenv("ADALAYER_CACHE")
    assert (
        run(monkeypatch, "compress", "adalayernet", "--weights", weights, "--data", data, *more)
        == 0
    )
    report = load(out / "report.json")
    assert report["float_accuracy"] == pytest.approx(89.85, abs=0.02)
    assert report["accuracy"] > 89.2
    assert report["size_fraction"] <= 0.2
