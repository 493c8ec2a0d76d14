"""The networks that are measured, with random weights and settled batch norms."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.models import get_model, load_weights
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from tests.helpers_torchvision import torchvision_models

CACHE = Path(__file__).resolve().parent.parent / "build" / "bench-cache"


class Residual(nn.Module):
    """``activation(body(x) + x)``."""

    def __init__(self, body: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + x)


def _conv(
    inputs: int,
    outputs: int,
    kernel: int,
    activation: nn.Module | None,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(outputs)]
    return layers if activation is None else [*layers, activation]


def random_network(seed: int) -> nn.Module:
    """A network that nobody tuned for: blocks, widths and strides drawn by ``seed``.

    Plain, bottleneck, grouped, dilated and inverted-residual blocks for 128 x 128 images.
    """
    draw = random.Random(seed)
    activation: Callable[[], nn.Module] = draw.choice([nn.ReLU, nn.ReLU6])
    width = draw.choice([16, 24, 40])
    layers = _conv(3, width, draw.choice([3, 5]), activation(), stride=2)
    for stage in range(4):
        outputs = width + draw.choice([24, 40, 64, 104])
        outputs -= outputs % 8
        layers += _conv(width, outputs, 3, activation(), stride=2 if stage < 3 else 1)
        width = outputs
        for _ in range(draw.randint(1, 3)):
            kind = draw.choice(["plain", "bottleneck", "inverted", "grouped", "dilated"])
            if kind == "plain":
                body = _conv(width, width, draw.choice([1, 3, 5]), activation())
                body += _conv(width, width, 3, None)
            elif kind == "bottleneck":
                body = _conv(width, width // 2, 1, activation())
                body += _conv(width // 2, width // 2, 3, activation())
                body += _conv(width // 2, width, 1, None)
            elif kind == "inverted":
                inner = width * draw.choice([3, 4, 6])
                body = _conv(width, inner, 1, activation())
                body += _conv(inner, inner, draw.choice([3, 5]), activation(), groups=inner)
                body += _conv(inner, width, 1, None)
            elif kind == "grouped":
                body = _conv(width, width, 3, activation(), groups=draw.choice([2, 4, 8]))
                body += _conv(width, width, 1, None)
            else:
                body = _conv(width, width, 3, activation(), dilation=2)
                body += _conv(width, width, 1, None)
            layers.append(Residual(nn.Sequential(*body), activation()))
    classes = draw.choice([10, 100, 1000])
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def vgg16_mean() -> nn.Module:
    """VGG-16 with batch norms, and a mean instead of the two wide linear layers."""
    layers: list[nn.Module] = []
    width = 3
    for outputs, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += _conv(width, outputs, 3, nn.ReLU())
            width = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


class UNet(nn.Module):
    """3x3 convolutions of 64 to 512 channels down and up again, with the finer images joined in."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        widths = (64, 128, 256, 512)
        before = (3, *widths[:-1])
        self.down = nn.ModuleList(map(self._pair, before, widths))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(2 * width, width, 2, stride=2) for width in widths[-2::-1]
        )
        self.joined = nn.ModuleList(self._pair(2 * width, width) for width in widths[-2::-1])
        self.head = nn.Conv2d(widths[0], classes, 1)

    @staticmethod
    def _pair(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            *_conv(inputs, outputs, 3, nn.ReLU()), *_conv(outputs, outputs, 3, nn.ReLU())
        )

    def forward(self, x: Tensor) -> Tensor:
        finer = []
        for k, down in enumerate(self.down):
            x = down(self.pool(x) if k else x)
            finer.append(x)
        finer.pop()
        for up, joined in zip(self.up, self.joined, strict=True):
            x = joined(torch.cat([up(x), finer.pop()], dim=1))
        return self.head(x)


# ------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class Network:
    """A float network as a user brings it.

    Attributes:
        size: side of its square input images.
        folder: where its weights and what is made of them are kept.
    """

    name: str
    size: int
    model: nn.Module
    folder: Path

    def images(self, batch: int, seed: int = 1) -> Tensor:
        """Random normalised images, contiguous NCHW float32."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, self.size, self.size, generator=generator)


NETWORKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "resnet18": (224, lambda: get_model("resnet18", 1000)),
    "resnet50": (224, lambda: torchvision_models().resnet50(weights=None)),
    "mobilenet_v2": (224, lambda: torchvision_models().mobilenet_v2(weights=None)),
    "vgg16_mean": (224, vgg16_mean),
    "unet": (256, UNet),
    "adalayernet": (32, lambda: get_model("adalayernet")),
    "resnet20": (32, lambda: get_model("resnet20")),
}


@lru_cache(maxsize=2)
def network(name: str) -> Network:
    """A network by name; ``random<seed>`` is :func:`random_network` of that seed."""
    torch.manual_seed(0)
    if name.startswith("random"):
        size, model = 128, random_network(int(name.removeprefix("random")))
    else:
        size, build = NETWORKS[name]
        model = build()
    digest = hashlib.sha256(version("torch").encode())
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.contiguous().numpy().tobytes())
    found = Network(name, size, model, CACHE / f"{name}-{digest.hexdigest()[:16]}")
    # Kept, because the statistics depend on the instruction set and the threads that made them,
    # and exported models are found by these weights.
    settled = found.folder / "settled.safetensors"
    if settled.is_file():
        load_weights(model, settled)
    else:
        _settle(found)
        found.folder.mkdir(parents=True, exist_ok=True)
        scratch = settled.with_suffix(f".{os.getpid()}")
        save_file(model.state_dict(), scratch)
        scratch.replace(settled)
    model.eval().requires_grad_(False)
    return found


def _settle(source: Network) -> None:
    """Statistics of batch norms from a few random batches.

    Fresh ones let activations grow from block to block. Settled ones give the ranges of a trained
    network, and a wrong result shows in the logits.
    """
    norms = [m for m in source.model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    source.model.train()
    with torch.no_grad():
        for seed in (2, 3):
            source.model(source.images(4, seed))
    for norm in norms:
        norm.momentum = 0.1


@lru_cache(maxsize=4)
def native_network(name: str, bits: int) -> tuple[nn.Module, nn.Module]:
    """(fake-quantized, native) twins of a network with ``bits`` in every layer."""
    layers = {
        n: LayerPlan(n, layer_kind(layer), layer.weight.numel(), bits)
        for n, layer in supported_layers(network(name).model).items()
    }
    return native_plan(name, Plan(layers, "fixed", {}))


def native_plan(name: str, plan: Plan) -> tuple[nn.Module, nn.Module]:
    """The same twins for any plan."""
    source = network(name)
    images = source.images(4, seed=2)
    prepared = ada.prepare(source.model, plan, images)
    ada.calibrate(prepared, [images], progress=False)
    return prepared, ada.convert(prepared)
