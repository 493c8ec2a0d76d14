"""Bad input to the whole job: one sentence that names the culprit, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from helpers_cli import (
    CLASSES,
    SIZE,
    CalledTwice,
    NoLayers,
    SharedWeight,
    SmallNet,
    WrongOutput,
    make_quick,
    run,
    save_weights,
    train_small,
    write_images,
)
from safetensors.torch import save_file
from torch import nn

import adalayer_native as ada
from adalayer_native import _files, files
from adalayer_native._files import found_at, require_file
from adalayer_native.data import open_dataset
from adalayer_native.errors import AdaError
from adalayer_native.models import load_weights


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("bad") / "images", train=4, test=2)


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path) -> None:
    make_quick(monkeypatch, tmp_path / "cache")


@pytest.fixture
def weights(tmp_path) -> Path:
    return weights_of(SmallNet, tmp_path)


def weights_of(kind: type[nn.Module], folder: Path) -> Path:
    torch.manual_seed(0)
    return save_weights(kind(), folder / f"{kind.__name__}.safetensors")


@pytest.fixture
def fails(monkeypatch, capsys, images, weights, tmp_path):
    """Runs compress, expects exit code 1 and one sentence on standard error; returns it."""

    def check(*more: object, model: str = "SmallNet", expect: int = 1, **changed: object) -> str:
        options: dict[str, object] = {
            "weights": weights, "data": images, "out": tmp_path / "out", "size": 0.5, **changed
        }  # fmt: skip
        flags = [v for k, value in options.items() if value is not None for v in (f"--{k}", value)]
        name = model if ":" in model or model.islower() else f"helpers_cli:{model}"
        fixed = ("--image-size", SIZE, "--epochs", 0, "--calibration", 16, "--quiet")
        capsys.readouterr()
        assert run(monkeypatch, "compress", name, *fixed, *flags, *more) == expect
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "Traceback" not in printed.err
        if expect == 1:
            assert printed.err.startswith("error: ")
            assert printed.err.count("\n") == 1
        out = Path(str(options["out"]))
        assert not (out / "model.safetensors").exists() and not (out / "report.json").exists()
        if out.is_dir():
            assert not list(out.rglob("*.tmp"))
        return printed.err

    return check


# -- weights ------------------------------------------------------------------------------------


def test_missing_weights(fails, tmp_path):
    message = fails(weights=tmp_path / "nothing.safetensors")
    assert "nothing.safetensors" in message and "does not exist" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "huge header"])
def test_corrupt_weights(fails, weights, damage: str):
    data = weights.read_bytes()
    weights.write_bytes(
        {
            "empty": b"",
            "truncated": data[: len(data) // 2],
            "text": b"these are no weights at all",
            "huge header": b"\xff" * 8 + data[8:],
        }[damage]
    )
    assert "SmallNet.safetensors" in fails()


def test_weights_of_another_model(fails, tmp_path):
    message = fails(weights=weights_of(CalledTwice, tmp_path))
    assert "conv1.weight" in message and "stem.weight" in message


def test_weights_of_another_shape(fails, weights):
    torch.manual_seed(0)
    save_weights(SmallNet(7), weights)
    message = fails()
    assert "fc.weight: model (4, 32), file (7, 32)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(fails, weights, value: float):
    state = SmallNet().state_dict()
    state["conv2.weight"][3, 1, 0, 2] = value
    save_file(state, weights)
    assert "conv2.weight" in fails()


# -- data ---------------------------------------------------------------------------------------


def test_missing_data(fails, tmp_path):
    assert "nowhere" in fails(data=tmp_path / "nowhere")


def test_data_that_is_no_zip(fails, tmp_path):
    (tmp_path / "data.zip").write_bytes(b"PK\x03\x04 and then nothing")
    assert "data.zip" in fails(data=tmp_path / "data.zip")


@pytest.mark.parametrize("split", ["train", "test"])
def test_unreadable_image_is_named(fails, images, tmp_path, split: str):
    copy = Path(shutil.copytree(images, tmp_path / "images"))
    for name in CLASSES:  # the calibration part is drawn at random, so all of one position
        for file in (copy / split / name).glob("*.png"):
            file.write_bytes(file.read_bytes()[:60])
    message = fails(data=copy)
    assert ".png" in message and f"{split}/" in message


def test_empty_split(fails, images, tmp_path):
    copy = Path(shutil.copytree(images, tmp_path / "images"))
    shutil.rmtree(copy / "test")
    message = fails(data=copy)
    assert "test" in message and str(copy) in message


def test_folder_without_images(fails, tmp_path):
    (tmp_path / "nothing" / "train" / "a").mkdir(parents=True)
    assert "no images" in fails(data=tmp_path / "nothing")


def test_class_that_only_one_split_has(fails, images, tmp_path):
    copy = Path(shutil.copytree(images, tmp_path / "images"))
    (copy / "test" / "red").rename(copy / "test" / "violet")
    assert "class 'violet' only in 'test'" in fails("--classes", 4, data=copy)


def test_model_of_more_classes_than_the_data(fails, images, tmp_path):
    copy = Path(shutil.copytree(images, tmp_path / "images"))
    for split in ("train", "test"):
        shutil.rmtree(copy / split / "red")
    message = fails("--classes", 4, data=copy)
    assert "logits of shape (N, 3) for the 3 classes of the data, got (1, 4)" in message
    for split in ("train", "test"):
        for name in ("green", "grey"):
            shutil.rmtree(copy / split / name)
    assert "one class only, 'blue'" in fails("--classes", 4, data=copy)


# -- budgets and options ------------------------------------------------------------------------


def test_impossible_budget_states_the_smallest_size_and_that_one_works(
    fails, monkeypatch, images, weights, tmp_path
):
    for method in ("adalayer", "uniform"):
        message = fails("--method", method, size=0.01)
        assert "smallest reachable size is" in message
        smallest = message.split("bytes, ")[1].split(" of the float file")[0]
        out = tmp_path / method
        arguments = (
            "compress", "helpers_cli:SmallNet", "--weights", weights, "--data", images,
            "--method", method, "--image-size", SIZE, "--epochs", 0, "--quiet", "--calibration", 16,
        )  # fmt: skip
        assert run(monkeypatch, *arguments, "--size", smallest, "--out", out) == 0
        report = json.loads((out / "report.json").read_text())
        assert report["size_fraction"] <= float(smallest)


def test_budgets_that_are_no_budget(fails):
    assert "takes one limit of size, bytes and bits" in fails("--bits", 4)
    assert "needs a budget" in fails(size=None)
    assert "above 0" in fails(size=-1)
    assert "above 0" in fails(size="nan")


def test_bad_options(fails):
    assert "adalayer" in fails("--method", "magic", expect=2)
    assert "--layer-bits" in fails("--method", "fixed", "--layer-bits", "2,x", expect=2)
    assert "got 9" in fails("--method", "fixed", "--layer-bits", "9", size=None, expect=2)
    wrong = ("--method", "ascending", "--layer-bits", "2,3", "--stages", "conv1,nothing")
    assert "nothing" in fails(*wrong, size=None)


# -- models -------------------------------------------------------------------------------------


def test_unknown_models(fails):
    assert "adalayernet" in fails(model="alexnet")
    assert "no_such_module" in fails(model="no_such_module:net")
    assert "helpers_cli:Nothing" in fails(model="helpers_cli:Nothing")
    assert "helpers_cli:CLASSES" in fails(model="helpers_cli:CLASSES")


def test_model_without_supported_layers(fails, tmp_path):
    message = fails(model="NoLayers", weights=weights_of(NoLayers, tmp_path))
    assert "no convolution or linear layer" in message


def test_model_that_returns_no_logits(fails, tmp_path):
    message = fails(model="WrongOutput", weights=weights_of(WrongOutput, tmp_path))
    assert "(N, 4)" in message


def test_images_too_small_for_the_model(fails, tmp_path):
    message = fails(
        "--image-size", 4, model="adalayernet", weights=save_weights(
            ada_model(), tmp_path / "ada.safetensors"
        ), expect=1,
    )  # fmt: skip
    assert "(1, 3, 4, 4)" in message


def ada_model() -> nn.Module:
    from adalayer_native.models import adalayernet

    torch.manual_seed(0)
    return adalayernet(4)


# -- the output directory -----------------------------------------------------------------------


def test_output_that_is_a_file(fails, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file" in fails(out=tmp_path / "file" / "out", expect=2)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["plan.json", "model.safetensors", "analysis.json"])
def test_full_disk_leaves_nothing_half_written(fails, monkeypatch, images, tmp_path, name: str):
    real = os.replace

    def full(source: object, target: object) -> None:
        if Path(str(target)).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        real(source, target)

    monkeypatch.setattr(_files.os, "replace", full)
    # Weights that know the images: others would be warned about.
    message = fails(weights=save_weights(train_small(images), tmp_path / "trained.safetensors"))
    assert name in message and "No space left" in message


def test_save_keeps_the_old_file_when_the_disk_is_full(monkeypatch, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    path = tmp_path / "model.safetensors"
    ada.save(model, path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_files.os, "replace", full)
    with torch.no_grad():
        model[0].weight.zero_()
    with pytest.raises(OSError, match="No space left"):
        ada.save(model, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


# -- info ---------------------------------------------------------------------------------------


def info(monkeypatch, capsys, path: Path) -> str:
    capsys.readouterr()
    assert run(monkeypatch, "info", path) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def test_info_of_what_is_no_packed_model(monkeypatch, capsys, weights, tmp_path):
    assert "does not exist; expected a file" in info(monkeypatch, capsys, tmp_path / "absent")
    assert "float model" in info(monkeypatch, capsys, weights)
    (tmp_path / "text").write_text("hello")
    assert "not a readable safetensors file" in info(monkeypatch, capsys, tmp_path / "text")
    assert "error" in info(monkeypatch, capsys, tmp_path)


def test_info_of_a_damaged_packed_model(monkeypatch, capsys, tmp_path):
    from safetensors.torch import load_file

    torch.manual_seed(0)
    data = [torch.randn(8, 3, SIZE, SIZE)]
    result = ada.compress(SmallNet().eval(), data, ada.Budget(bits=4), method="uniform")
    path = tmp_path / "model.safetensors"
    ada.save(result.model, path)
    tensors = load_file(path)
    tensors["conv2.weight_packed"][:8] = 255
    save_file(tensors, path)
    assert "conv2.weight_packed" in info(monkeypatch, capsys, path)
    del tensors["conv2.weight_packed"], tensors["conv1.bias"]
    save_file(tensors, path)
    assert "conv1.bias" in info(monkeypatch, capsys, path)


# -- the library call ---------------------------------------------------------------------------


def call(model: nn.Module, data: object, **options: object) -> ada.Compressed:
    return ada.compress(model.eval(), data, ada.Budget(size=0.5), progress=False, **options)


@pytest.mark.parametrize("method", ["adalayer", "uniform"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_data_that_are_not_finite(method: str, value: float):
    data = [torch.randn(4, 3, SIZE, SIZE) for _ in range(2)]
    data[1][2, 1, 0, 0] = value
    with pytest.raises(ada.CalibrationError, match="NaN or infin"):
        call(SmallNet(), data, method=method)


@pytest.mark.parametrize("method", ["adalayer", "uniform"])
@pytest.mark.parametrize("data", [[], [torch.randn(0, 3, SIZE, SIZE)]])
def test_empty_loader(method: str, data: list):
    with pytest.raises(ada.CalibrationError, match="empty"):
        call(SmallNet(), data, method=method)


def test_empty_train_loader():
    data = [torch.randn(4, 3, SIZE, SIZE)]
    with pytest.raises(ada.CalibrationError, match="training loader is empty"):
        call(SmallNet(), data, train_loader=[], epochs=1, method="uniform")


@pytest.mark.parametrize("method", ["adalayer", "uniform"])
def test_weights_that_are_not_finite_in_memory(method: str):
    model = SmallNet()
    with torch.no_grad():
        model.conv3.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ada.CalibrationError, match="conv3"):
        call(model, [torch.randn(4, 3, SIZE, SIZE)], method=method)


def test_one_module_under_two_names():
    model = CalledTwice()
    model.again = model.conv
    result = call(model, [torch.randn(4, 3, SIZE, SIZE)], method="uniform")
    assert list(result.plan) == ["stem", "conv", "fc"]


def test_one_weight_in_two_layers():
    torch.manual_seed(0)
    model = SharedWeight().eval()
    result = call(model, [torch.randn(4, 3, SIZE, SIZE)], method="uniform")
    assert list(result.plan) == ["stem", "conv", "again", "fc"]
    x = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert float((result.model(x) - model(x)).norm() / model(x).norm()) < 0.1
    assert model.again.weight is model.conv.weight


@pytest.mark.parametrize("shape", [(2, 4, SIZE, SIZE), (3, SIZE), (2, 3, 0, 0)])
def test_native_model_refuses_wrong_shapes_by_name(shape: tuple[int, ...]):
    result = call(SmallNet(), [torch.randn(4, 3, SIZE, SIZE)], method="uniform")
    with pytest.raises((ValueError, RuntimeError), match=r"expected shape|conv2d|Conv2d"):
        result.model(torch.zeros(shape))


def test_unknown_method_and_missing_budget():
    data = [torch.randn(4, 3, SIZE, SIZE)]
    with pytest.raises(ada.PlanError, match="magic"):
        call(SmallNet(), data, method="magic")
    with pytest.raises(ada.BudgetError, match="needs a budget"):
        ada.compress(SmallNet().eval(), data, None)


# -- paths that are no files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        ada.load,
        ada.Plan.load,
        lambda path: ada.restore(SmallNet(), path),
        lambda path: load_weights(SmallNet(), path),
        lambda path: files.describe(path),
        lambda path: open_dataset(path),
    ],
    ids=["engine", "plan", "packed", "weights", "describe", "data"],
)
def test_a_named_pipe_is_not_waited_for(tmp_path, read):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(AdaError, match=r"pipe'?:? .*(is a named pipe|a regular file)"):
        read(pipe)


def test_what_a_path_leads_to(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.fspath(tmp_path / "socket"))
        found = {path.name: found_at(path) for path in tmp_path.iterdir()}
    assert found == {
        "file": "is a file",
        "link": "is a file",
        "dangling": "does not exist",
        "socket": "is a socket",
    }
    assert found_at("/dev/null") == "is a device" and found_at(tmp_path) == "is a directory"
    assert found_at(tmp_path / "file" / "below") == "cannot be looked at (Not a directory)"
    require_file(tmp_path / "link")
