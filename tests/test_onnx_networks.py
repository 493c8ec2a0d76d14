"""Round trips of whole networks: torch → ONNX → torch → native → ONNX → native, and runtimes."""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import adalayer_native as ada
from tests.helpers_onnx import by_runtime, converted
from tests.helpers_torchvision import ARCHITECTURES, build, images

TORCHVISION = {item.name: item for item in ARCHITECTURES}
slow = pytest.mark.slow
NETWORKS = [
    "unet",
    *(pytest.param(name, marks=slow) for name in (
        "resnet18", "mobilenet_v2", "convnext_tiny", "efficientnet_lite0", "yolov8n",
    )),
]  # fmt: skip
SIZE = 64


def package(name):
    from bench.zoo.packages import MissingPackageError
    from bench.zoo.packages import package as imported

    try:
        return imported(name)
    except (MissingPackageError, ImportError) as error:
        pytest.skip(str(error))


def network(name):
    """The network in evaluation mode, and images for it."""
    if name in TORCHVISION:
        model = build(TORCHVISION[name])
        if name == "convnext_tiny":  # the blocks of a stage repeat each other
            for stage in (1, 3, 5, 7):
                model.features[stage] = model.features[stage][:1]
        return model, images(TORCHVISION[name], 6, seed=3)
    x = images(TORCHVISION["unet"], 6, seed=3)
    torch.manual_seed(0)
    if name == "yolov8n":
        package("ultralytics")
        from ultralytics.nn.tasks import DetectionModel

        model = DetectionModel("yolov8n.yaml", verbose=False).eval()
        for module in model.modules():
            if hasattr(module, "export"):  # one tensor of boxes and classes
                module.export, module.format = True, "onnx"
        return model, x
    package("efficientnet-lite-pytorch")
    from bench.zoo.networks import efficientnet_lite

    return efficientnet_lite.ENTRIES[0].make().eval(), x


def exported(model, x, path, opset, dynamo):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its exporters
        if dynamo:
            options = {"dynamo": True, "external_data": False, "verbose": False}
        else:
            options = {"dynamo": False}
        torch.onnx.export(model, (x[:1],), str(path), opset_version=opset, **options)


def agrees(got, wanted, share):
    """Whether results differ by no more than a share of the largest one."""
    got, wanted = (np.asarray(t.detach() if torch.is_tensor(t) else t) for t in (got, wanted))
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= share * np.abs(wanted).max()


def rms(difference):
    return float(torch.as_tensor(difference).double().square().mean().sqrt())


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(name, tmp_path):
    model, x = network(name)
    with torch.no_grad():
        wanted = model(x)
    exported(model, x, tmp_path / "float.onnx", 17, dynamo=False)
    net = ada.from_onnx(tmp_path / "float.onnx")
    agrees(net(x), wanted, 2e-5)
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    layers = [m for m in net.modules() if isinstance(m, kinds)]
    original = [m for m in model.modules() if isinstance(m, kinds)]
    assert len(layers) == len(original)

    native = converted(net, x)
    size = ada.to_onnx(native, tmp_path / "native.onnx")
    assert size < 0.5 * (tmp_path / "float.onnx").stat().st_size
    again = ada.from_onnx(tmp_path / "native.onnx")
    assert set(again.meta["onnx"]["layers"].values()) <= set(range(2, 9))
    assert len(again.meta["onnx"]["layers"]) == len(layers)
    with torch.no_grad():
        result = native(x)
        # Levels that are rounded elsewhere are a small part of what quantization itself does. (The
        # file's own reading rounds as the native layers do; runtimes have steps of their own.)
        cost = rms(result - wanted)
        assert rms(again(x) - result) <= 0.05 * cost
    theirs = torch.from_numpy(by_runtime(str(tmp_path / "native.onnx"), x)[0])
    assert theirs.shape == result.shape and rms(theirs - result) <= 0.35 * cost
    ada.to_onnx(again, tmp_path / "again.onnx")
    last = ada.from_onnx(tmp_path / "again.onnx")
    for key, layer in again.named_modules():
        if hasattr(layer, "weight_packed"):
            other = last.get_submodule(key)
            assert torch.equal(other.weight_int(), layer.weight_int())
            assert torch.equal(other.weight_scale, layer.weight_scale)
            assert torch.equal(other.bias, layer.bias)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "resnet18", "mobilenet_v2", "convnext_tiny"])
def test_the_newer_exporter(name, tmp_path):
    """Of opset 18 and later, and with a batch of one written into its operators."""
    if importlib.util.find_spec("onnxscript") is None:
        pytest.skip("torch's newer exporter needs onnxscript, which is not installed")
    model, x = network(name)
    with torch.no_grad():
        wanted = model(x)
    exported(model, x, tmp_path / "float.onnx", 20, dynamo=True)
    agrees(ada.from_onnx(tmp_path / "float.onnx")(x), wanted, 2e-5)
