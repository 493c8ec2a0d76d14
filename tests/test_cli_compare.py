"""adalayer compare: what a run says by itself, options, files and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers_cli import SIZE, make_quick, run, save_weights, train_small, write_images
from PIL import Image

import adalayer_native as ada
from adalayer_native.report import load_run


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with images, float weights and a run at 4 bits, its first layer at 2."""
    root = tmp_path_factory.mktemp("compare")
    data = write_images(root / "images")
    save_weights(train_small(data), root / "weights.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch, root / "cache")
        code = run(
            patch, "compress", "helpers_cli:SmallNet", "--weights", root / "weights.safetensors",
            "--data", data, "--image-size", SIZE, "--calibration", 24, "--epochs", 0, "--bits", 4,
            "--method", "uniform", "--fix", "conv2=2", "--no-repair", "--out", root / "out",
            "--quiet",
        )  # fmt: skip
    assert code == 0
    return root


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path) -> None:
    make_quick(monkeypatch, tmp_path / "cache")


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """The run, to write into."""
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def test_a_run_says_all_that_is_needed(monkeypatch, capsys, out: Path, tmp_path: Path) -> None:
    capsys.readouterr()
    assert run(monkeypatch, "compare", out, "--samples", 40, "--json", "--quiet") == 0
    printed = capsys.readouterr()
    found = ada.Comparison.load(out / "compare.json")
    assert found.as_dict() == json.loads(printed.out)
    assert (found.samples, found.judging) == (20, 20)
    assert found.rows[0].name == "conv2" and found.rows[0].bits == 2
    assert found.suggestions[0].name == "conv2"
    assert found.engine == {"equal": 1.0, "snr_db": None}
    assert "100 % of its results have the bits of the torch modules" in printed.err
    assert "bits in the weights instead of 2" in printed.err and "conv2" in printed.err
    assert load_run(out).comparison == found
    assert run(monkeypatch, "report", out, "--out", tmp_path / "r.html") == 0
    assert 'role="tablist"' in (tmp_path / "r.html").read_text()
    # Another run in the same folder is another network.
    (command,) = (json.loads((out / "work" / "command.json").read_text()),)
    code = run(
        monkeypatch, "compress", command["model"], "--weights", command["weights"], "--data",
        command["data"], "--image-size", SIZE, "--calibration", 24, "--epochs", 0, "--bits", 3,
        "--method", "uniform", "--no-repair", "--out", out, "--quiet",
    )  # fmt: skip
    assert code == 0 and not (out / "compare.json").exists()


def test_images_are_not_those_of_the_calibration(monkeypatch, capsys, out: Path) -> None:
    assert run(monkeypatch, "compare", out, "--samples", 40, "--no-suggest") == 0
    assert "calibrated with" not in capsys.readouterr().err  # 24 of 64 are
    assert run(monkeypatch, "compare", out, "--samples", 50, "--no-suggest") == 0
    assert "10 of the images are some that the run was calibrated with" in capsys.readouterr().err
    assert ada.Comparison.load(out / "compare.json").samples == 50


def test_a_packed_model_alone_needs_to_be_told(
    monkeypatch, capsys, made: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "m.safetensors"
    shutil.copy(made / "out" / "model.safetensors", packed)

    def failing(*options: object) -> str:
        capsys.readouterr()
        assert run(monkeypatch, "compare", packed, *options) == 1
        return capsys.readouterr().err

    assert "give --model" in failing()
    options: list[object] = ["--model", "helpers_cli:SmallNet"]
    assert "give --weights" in failing(*options)
    options += ["--weights", made / "weights.safetensors"]
    assert "give --data" in failing(*options)
    options += ["--data", made / "images"]
    assert "give --image-size" in failing(*options)
    options += ["--image-size", SIZE]
    picture, file = tmp_path / "m.png", tmp_path / "deep" / "c.json"
    more = ("--picture", picture, "--out", file, "--no-suggest", "--samples", 16)
    assert run(monkeypatch, "compare", packed, *options, *more) == 0
    with Image.open(picture) as image:
        assert image.format == "PNG"
    found = ada.Comparison.load(file)
    assert found.engine is None and found.suggestions == () and found.samples == 16
    assert not packed.with_name("compare.json").exists()
    # Another network of the same names.
    message = failing("--model", "helpers_cli:WrongOutput", *options[2:])
    assert "weights" in message and "Traceback" not in message


def test_the_loss_of_a_task(monkeypatch, capsys, out: Path) -> None:
    """What the network's error is follows from what its output is said to be."""
    errors = {}
    for kind in ("classes", "values"):
        more = ("--task", f"output={kind}", "--samples", 40, "--no-suggest", "--quiet")
        assert run(monkeypatch, "compare", out, *more) == 0
        found = ada.Comparison.load(out / "compare.json")
        assert found.measure == "task_loss"
        errors[kind] = found.error
    assert 0 < errors["classes"] != errors["values"] > 0
    assert run(monkeypatch, "compare", out, "--samples", 40, "--no-suggest", "--quiet") == 0
    usual = ada.Comparison.load(out / "compare.json")
    assert usual.measure != "task_loss" and usual.error == pytest.approx(errors["classes"])


@pytest.mark.parametrize(
    ("more", "message", "code"),
    [
        (("--samples", 0), "--samples", 2),
        (("--task", "classes"), "expected OUTPUT=KIND", 2),
        (("--task", "a=values", "--task", "a=boxes"), "'a' is given more than once", 2),
        (("--task", "output=colours"), "colours", 1),
        (("--task", "other=classes"), "no output 'other'", 1),
        (("--detection", "boxes"), "not JSON", 1),
        (("--detection", '{"boxes": "a", "scores": "b"}'), "no output 'b'", 1),
        (("--detection", '{"boxes": "a"}'), "scores", 1),
        (("--detection", "{}", "--task", "output=classes"), "give one", 1),
        (("--picture", "m.gif"), "in .png or .svg", 2),
        (("--mean", "a"), "numbers separated by commas", 2),
        (("--weights", "missing.safetensors"), "missing.safetensors", 1),
        (("--data", "missing"), "missing", 1),
        (("--model", "helpers_cli:missing"), "missing", 1),
    ],
)
def test_refusals(monkeypatch, capsys, made: Path, more, message: str, code: int) -> None:
    assert run(monkeypatch, "compare", made / "out", *more) == code
    text = capsys.readouterr().err
    assert message in text and "Traceback" not in text
    assert not (made / "out" / "compare.json").exists()


def test_no_run_at_all(monkeypatch, capsys, tmp_path: Path) -> None:
    assert run(monkeypatch, "compare", tmp_path) == 1
    assert "holds no model.safetensors" in capsys.readouterr().err
    assert run(monkeypatch, "compare", tmp_path / "missing") == 1
    assert "does not exist" in capsys.readouterr().err


def test_an_engine_file_of_another_network(monkeypatch, capsys, out: Path, made: Path) -> None:
    model, x = train_small(made / "images"), torch.rand(8, 3, SIZE, SIZE)
    plan = ada.allocate(None, ada.Budget(bits=6), method="uniform", model=model, progress=False)
    prepared = ada.prepare(model, plan)
    ada.calibrate(prepared, [x], progress=False)
    ada.compile(ada.convert(prepared), x[:1], policy="native").save(out / "model.ada")
    assert run(monkeypatch, "compare", out, "--quiet") == 1
    assert "other weights in the engine" in capsys.readouterr().err
