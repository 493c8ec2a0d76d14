"""Law 2 on photographs: trained networks as engines and as the converted module tree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_engine import node_differences

import adalayer_native as ada
from adalayer_native.data import ImageDataset, open_dataset
from adalayer_native.models import get_model, load_weights
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photographs(shared_dir: Path) -> ImageDataset:
    return open_dataset(shared_dir / "data" / "cifar10.zip", "test", cache=False, progress=False)


@pytest.mark.parametrize(
    ("name", "bits"), [("adalayernet", 8), ("adalayernet", 3), ("resnet20", 4), ("resnet20", 8)]
)
def test_engine_and_module_tree_agree(
    shared_dir: Path, photographs: ImageDataset, name: str, bits: int
) -> None:
    model = load_weights(get_model(name), shared_dir / "models" / f"{name}_cifar10.safetensors")
    model.eval()
    draw = torch.randperm(len(photographs), generator=torch.Generator().manual_seed(0))[:1456]
    pixels = photographs.pixels(draw)
    images = photographs.normalise(pixels)
    layers = {
        n: LayerPlan(n, layer_kind(layer), layer.weight.numel(), bits)
        for n, layer in supported_layers(model).items()
    }
    prepared = ada.prepare(model, Plan(layers, "fixed", {}), images[:2])
    ada.calibrate(prepared, [images[:256]], progress=False)
    native = ada.convert(prepared)
    engine = ada.compile(native, images[:1], policy="native", strict=True)

    for item in node_differences(native, images[:8]):
        item.check()

    with torch.inference_mode():
        tree = native(images[256:])
        logits = engine(images[256:])
    assert torch.equal(tree, logits)
    accuracy = (logits.argmax(1) == photographs.labels[draw[256:]]).float().mean()
    assert accuracy > 0.6, "the network does not know its classes"
