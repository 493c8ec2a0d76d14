"""Pictures for detection and segmentation, made of CIFAR-10's.

A scene is a background with one to three objects on it. Objects are pictures of five classes, in
other sizes and proportions, cut out along a rounded rectangle; where they lie is known exactly, as
a box and pixel by pixel. Backgrounds are small parts of pictures of the other five classes, much
enlarged. Scenes for training, for calibration and for tests are made of pictures that the others
do not have. All of a scene follows from its number and the seed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adalayer_native.data import open_dataset

__all__ = [
    "CLASSES",
    "MEAN",
    "MOST",
    "SIZE",
    "STD",
    "SceneBatches",
    "Scenes",
    "Sources",
    "normalised",
]

Picture = np.ndarray  # uint8, channels last
BILINEAR = Image.Resampling.BILINEAR
SIZE = 96  # height and width of a scene
MOST = 3  # objects
CLASSES = ("airplane", "automobile", "frog", "horse", "ship")
MEAN, STD = 0.5, 0.25  # of all channels
SMALLEST, LARGEST = 24, 48  # geometric mean of an object's sides in pixels
OVERLAP = 0.15  # largest IoU of two boxes
HELD_OUT = 500  # training pictures per class from which calibration scenes are made


@dataclass
class Sources:
    """Pictures that scenes are made of.

    Attributes:
        objects: uint8 ``[n, 32, 32, 3]`` of :data:`CLASSES`.
        labels: int64 ``[n]``.
        backgrounds: uint8 of the other classes.
    """

    objects: Picture
    labels: np.ndarray
    backgrounds: Picture

    @classmethod
    def open(cls, data: Path, part: str) -> Sources:
        """Those of ``"train"``, ``"calibration"`` or ``"test"`` in ``data/cifar10.zip``."""
        split = "test" if part == "test" else "train"
        images = open_dataset(str(data / "cifar10.zip"), split, 32, progress=False)
        images.decode()
        chosen: list[Tensor] = []
        for number in range(len(images.classes)):
            rows = (images.labels == number).nonzero().flatten()
            if part != "test":
                rows = rows[:HELD_OUT] if part == "calibration" else rows[HELD_OUT:]
            chosen.append(rows)
        wanted = [images.classes.index(name) for name in CLASSES]
        others = [n for n in range(len(images.classes)) if n not in wanted]
        objects = torch.cat([chosen[n] for n in wanted])
        labels = torch.cat([torch.full((len(chosen[n]),), k) for k, n in enumerate(wanted)])
        backgrounds = torch.cat([chosen[n] for n in others])
        pictures = [
            images.pixels(rows).permute(0, 2, 3, 1).numpy() for rows in (objects, backgrounds)
        ]
        return cls(pictures[0], labels.numpy(), pictures[1])


@dataclass
class Scenes:
    """A batch of scenes.

    Attributes:
        images: float32 ``[N, 3, SIZE, SIZE]``, normalised.
        boxes: float32 ``[N, MOST, 5]``: class, ``x1 y1 x2 y2`` in pixels; class -1: no object.
        masks: int64 ``[N, SIZE, SIZE]``: 0 for the background, else the class + 1.
    """

    images: Tensor
    boxes: Tensor
    masks: Tensor

    @classmethod
    def drawn(cls, sources: Sources, count: int, seed: int, most: int = MOST) -> Scenes:
        """So many scenes with at most ``most`` objects each."""
        draw = np.random.default_rng(seed)
        scenes = [_scene(sources, draw, most) for _ in range(count)]
        images, boxes, masks = (
            torch.from_numpy(np.stack(part)) for part in zip(*scenes, strict=True)
        )
        return cls(normalised(images.permute(0, 3, 1, 2)), boxes, masks)

    def targets(self, task: str) -> Tensor:
        """What a task's loss reads: classes int64 ``[N]``, the boxes, or the masks."""
        if task == "classification":  # of the first object
            return self.boxes[:, 0, 0].long()
        return self.boxes if task == "detection" else self.masks


def normalised(images: Tensor) -> Tensor:
    """From values of 0 to 255 to what the networks read, NCHW in memory."""
    return ((images / 255 - MEAN) / STD).contiguous()


class SceneBatches:
    """Training batches; others in every epoch, which follow from its number.

    Args:
        sources: pictures.
        task: ``"classification"`` (scenes of one object), ``"detection"`` or ``"segmentation"``.
        batch_size: scenes per batch.
        steps: batches per epoch.
    """

    def __init__(self, sources: Sources, task: str, batch_size: int, steps: int) -> None:
        self.sources, self.task = sources, task
        self.batch_size, self.steps, self.epoch = batch_size, steps, 0

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        most = 1 if self.task == "classification" else MOST
        for step in range(self.steps):
            seed = 1_000_003 * (epoch + 1) + step
            scenes = Scenes.drawn(self.sources, self.batch_size, seed, most)
            yield scenes.images, scenes.targets(self.task)


def _scene(
    sources: Sources, draw: np.random.Generator, most: int
) -> tuple[Picture, np.ndarray, np.ndarray]:
    """Image uint8 ``[SIZE, SIZE, 3]``, boxes ``[MOST, 5]`` and mask ``[SIZE, SIZE]``."""
    image = _background(sources.backgrounds[draw.integers(len(sources.backgrounds))], draw)
    mask = np.zeros((SIZE, SIZE), dtype=np.int64)
    boxes = np.full((MOST, 5), -1.0, dtype=np.float32)
    placed: list[tuple[int, int, int, int]] = []
    for _ in range(draw.integers(1, most + 1)):
        size, ratio = draw.uniform(SMALLEST, LARGEST), 2.0 ** draw.uniform(-0.3, 0.3)
        height, width = round(size * ratio), round(size / ratio)
        place = _free(placed, height, width, draw)
        if place is None:
            continue
        x, y = place
        row = draw.integers(len(sources.labels))
        picture = sources.objects[row][:, :: draw.choice((1, -1))]
        inside = _rounded(height, width)
        part = (slice(y, y + height), slice(x, x + width))
        scaled = Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), BILINEAR)
        image[part][inside] = np.asarray(scaled)[inside]
        mask[part][inside] = sources.labels[row] + 1
        boxes[len(placed)] = sources.labels[row], x, y, x + width, y + height
        placed.append((x, y, x + width, y + height))
    return image, boxes, mask


def _background(picture: Picture, draw: np.random.Generator) -> Picture:
    side = draw.uniform(10, 18)
    x, y = draw.uniform(0, 32 - side, 2)
    part = (x, y, x + side, y + side)
    image = Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=part)
    return np.array(image)


def _free(
    placed: list[tuple[int, int, int, int]], height: int, width: int, draw: np.random.Generator
) -> tuple[int, int] | None:
    """A corner where a box covers little of the others, if one is found; the first always is."""
    for _ in range(20):
        x, y = int(draw.integers(SIZE - width + 1)), int(draw.integers(SIZE - height + 1))
        if all(_iou((x, y, x + width, y + height), other) <= OVERLAP for other in placed):
            return x, y
    return None


def _iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    common = max(wide, 0) * max(high, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return common / (areas - common)


@functools.cache
def _rounded(height: int, width: int) -> np.ndarray:
    """Whether a pixel lies in the superellipse of exponent 4 that fills the box."""
    y, x = (np.abs((np.arange(n) + 0.5) * 2 / n - 1) ** 4 for n in (height, width))
    return y[:, None] + x[None, :] <= 1.0
