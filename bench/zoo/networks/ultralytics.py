"""Detectors of ultralytics, from their yaml files, with random weights."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from bench.zoo.entry import Entry, noise
from bench.zoo.packages import package


def _detector(name: str) -> nn.Module:
    tasks = package("ultralytics", "nn.tasks")
    model: nn.Module = tasks.DetectionModel(f"{name}.yaml", verbose=False)
    return model


class Trunk(nn.Module):
    """Backbone and neck of a detector: what its head would read.

    Args:
        detector: a ``DetectionModel``; each of its layers has the numbers of those it reads.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        *layers, head = detector.model
        self.layers = nn.ModuleList(layers)
        self.sources = [layer.f for layer in layers]
        self.results: list[int] = list(head.f)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        for layer, source in zip(self.layers, self.sources, strict=True):
            if isinstance(source, int):
                x = layer(x if source == -1 else kept[source])
            else:
                x = layer([x if number == -1 else kept[number] for number in source])
            kept.append(x)
        return tuple(kept[number] for number in self.results)


def _trunk(name: str) -> nn.Module:
    return Trunk(_detector(name))


def _entry(name: str, make: partial[nn.Module]) -> Entry:
    return Entry(f"ultralytics/{name}", "ultralytics", make, noise(3, 96, 96), noise(3, 128, 160))


ENTRIES = (
    _entry("yolov8n", partial(_detector, "yolov8n")),
    _entry("yolo11n", partial(_detector, "yolo11n")),
    _entry("yolov8n-trunk", partial(_trunk, "yolov8n")),
)
