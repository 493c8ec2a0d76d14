"""A small data set of coloured images, networks for it, and the command line in this process."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from adalayer_native import cli, measure
from adalayer_native.data import open_dataset
from adalayer_native.jobs import compiling, compressing

CLASSES = ("blue", "green", "grey", "red")
COLOURS = {"blue": (0, 0, 1), "green": (0, 1, 0), "grey": (1, 1, 1), "red": (1, 0, 0)}
SIZE = 12


class SmallNet(nn.Module):
    """Three convolutions and a linear layer; 14,000 weights, so that headers do not dominate."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.conv3(x))
        return self.fc(torch.flatten(self.pool(x), 1))


class SortedNet(SmallNet):
    """Its classes come by their values, which nobody but torch can do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sort(dim=1).values


class CalledTwice(nn.Module):
    """One convolution that runs twice in ``forward``."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.conv(torch.relu(self.conv(x))))
        return self.fc(torch.flatten(self.pool(x), 1))


class SharedWeight(CalledTwice):
    """Two layers with one weight parameter."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__(num_classes)
        self.again = nn.Conv2d(32, 32, 3, padding=1)
        self.again.weight = self.conv.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(torch.relu(self.stem(x))))
        return self.fc(torch.flatten(self.pool(torch.relu(self.again(x))), 1))


def with_classes(classes: int = 7) -> SmallNet:
    """A network whose number of classes has another name."""
    return SmallNet(classes)


def with_keywords(**options: int) -> SmallNet:
    """A network that hands its arguments on, as torchvision's do."""
    return SmallNet(**options)


def without_classes() -> SmallNet:
    """A network of four classes, always."""
    return SmallNet(4)


def failing(num_classes: int = 4) -> SmallNet:
    """No network."""
    raise KeyError(f"no {num_classes}")


def configured(num_classes: int = 4) -> SmallNet:
    """A network that says how its images are normalised, as timm's do."""
    model = SmallNet(num_classes)
    model.pretrained_cfg = {
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.2, 0.2),
        "input_size": (3, 9, 9),
    }
    return model


class NoLayers(nn.Module):
    """Logits without any layer that could be quantized."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 2, 3)).unsqueeze(1) * self.scale


class WrongOutput(CalledTwice):
    """Returns feature maps, not logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.stem(x))


def write_images(root: Path, train: int = 16, test: int = 5) -> Path:
    """``root/{train,test}/<class>/<nnnn>.png``: noisy images of one colour per class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                noise = generator.integers(0, 120, (SIZE, SIZE, 3))
                pixels = noise + 100 * np.array(COLOURS[name])
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:04}.png")
    return root


def train_small(data: Path, seed: int = 0) -> SmallNet:
    """A :class:`SmallNet` that knows the colours."""
    dataset = open_dataset(data, "train", SIZE, cache=False, progress=False)
    x, y = dataset.normalise(dataset.pixels()), dataset.labels
    torch.manual_seed(seed)
    model = SmallNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def save_weights(model: nn.Module, path: Path) -> Path:
    """The model's ``state_dict`` as safetensors."""
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, path)
    return path


def make_quick(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Short timings (their values are not tested), wide tables, an own cache of images."""
    short = functools.partial(measure.model_milliseconds, seconds=0.01)
    for module in (compiling, compressing):
        monkeypatch.setattr(module, "model_milliseconds", short)
    briefly = functools.partial(measure.inference_energy, seconds=0.01)
    monkeypatch.setattr(compressing, "inference_energy", briefly)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("ADALAYER_CACHE", str(cache))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """``adalayer ARGUMENTS`` in this process; the exit code."""
    monkeypatch.setattr(sys, "argv", ["adalayer", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as done:
        return int(done.code or 0)
    return 0
