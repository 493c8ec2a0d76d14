"""Batches of normalised images: shuffled and augmented for training, in order otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import DataError
from .datasets import ImageDataset

__all__ = ["Batches", "Loaders", "calibration_indices", "loaders"]

CROP = 4  # pixels of zero padding for the random crop, as is usual for 32x32 images


class Batches:
    """Iterable over ``(images, labels)``: float32 ``[B, 3, S, S]`` and int64 ``[B]``.

    The order and the augmentation of an epoch depend on ``seed`` and the epoch's number only.
    Every iteration is the next epoch; :meth:`set_epoch` chooses the next one, for resuming.

    Args:
        dataset: where images come from.
        batch_size: images per batch; the last batch may be smaller.
        indices: int64 tensor of the images to use; ``None`` for all.
        shuffle: another order in every epoch.
        augment: random crop (4 pixels of padding) and horizontal flip.
        seed: of order and augmentation.
        drop_last: leave out a last batch that is not full.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int = 128,
        *,
        indices: torch.Tensor | None = None,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {batch_size}")
        self.dataset, self.batch_size = dataset, batch_size
        self.indices = torch.arange(len(dataset)) if indices is None else indices
        self.shuffle, self.augment, self.seed, self.drop_last = shuffle, augment, seed, drop_last
        self.epoch = 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.indices), self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` (from 0) the one that the next iteration yields."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        order = self.indices
        if self.shuffle:
            order = order[torch.randperm(len(order), generator=generator)]
        # Everything that will be needed is decoded together, with all threads, not per batch.
        self.dataset.decode(order)
        for number in range(len(self)):
            chosen = order[number * self.batch_size : (number + 1) * self.batch_size]
            pixels = self.dataset.pixels(chosen)
            if self.augment:
                images = self.dataset.normalise(random_crop_flip(pixels, generator))
            else:
                images = self.dataset.normalise(pixels)
            yield images, self.dataset.labels[chosen]


def random_crop_flip(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift every image by up to 4 pixels (zeros move in) and mirror every second one.

    One gather for the whole batch; uint8 ``[N, 3, H, W]`` in and out.
    """
    count, _, height, width = pixels.shape
    padded = torch.nn.functional.pad(pixels, (CROP, CROP, CROP, CROP))
    offsets = torch.randint(0, 2 * CROP + 1, (2, count, 1), generator=generator)
    flip = torch.rand((count, 1), generator=generator) < 0.5
    rows = offsets[0] + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(flip, columns.flip(1), columns) + offsets[1]
    images = torch.arange(count).view(count, 1, 1)
    taken = padded[images, :, rows[:, :, None], columns[:, None, :]]  # [N, H, W, 3]
    return taken.permute(0, 3, 1, 2).contiguous()


@dataclass
class Loaders:
    """The three loaders that compression needs.

    Attributes:
        train: training images, shuffled and augmented.
        calibration: a fixed, class-balanced part of the training images, as they are.
        test: test images, as they are; only for the final measurement.
    """

    train: Batches
    calibration: Batches
    test: Batches


def loaders(
    train: ImageDataset,
    test: ImageDataset,
    *,
    batch_size: int = 128,
    calibration: int = 512,
    calibration_batch_size: int = 128,
    test_batch_size: int = 250,
    augment: bool = True,
    seed: int = 0,
) -> Loaders:
    """Loaders over a train and a test split. Calibration images come from ``train`` only.

    Raises:
        DataError: an empty split, splits with different classes, or a single class.
    """
    for name, dataset in (("train", train), ("test", test)):
        if len(dataset) == 0:
            raise DataError(f"the {name} split {dataset.name!r} holds no images")
    if train.classes != test.classes:
        raise DataError(
            f"train and test have different classes: {train.classes} and {test.classes}"
        )
    if len(train.classes) == 1:
        raise DataError(
            f"{train.name!r} has one class only, {train.classes[0]!r}: any model would be right "
            f"about every image (expected a folder for each class)"
        )
    return Loaders(
        train=Batches(train, batch_size, shuffle=True, augment=augment, seed=seed),
        calibration=Batches(
            train, calibration_batch_size, indices=calibration_indices(train, calibration, seed)
        ),
        test=Batches(test, test_batch_size),
    )


def calibration_indices(dataset: ImageDataset, count: int, seed: int = 0) -> torch.Tensor:
    """``count`` different images, the classes as even as they can be, in mixed order; int64.

    Raises:
        DataError: ``count`` below 1.
    """
    if count < 1:
        raise DataError(f"calibration needs at least 1 image, got {count}")
    count = min(count, len(dataset))
    generator = torch.Generator().manual_seed(seed + 7919)
    order = torch.randperm(len(dataset), generator=generator)
    labels = dataset.labels[order]
    rank = torch.empty_like(labels)  # this image is the rank-th of its class in that order
    for label in labels.unique():
        members = labels == label
        rank[members] = torch.arange(int(members.sum()))
    return order[torch.sort(rank, stable=True).indices[:count]]
