"""Images of a study: the whole test split, and parts of the training split by seed."""

from __future__ import annotations

import torch

from ..data import Batches, ImageDataset, calibration_indices, digits, open_dataset
from ..errors import DataError

__all__ = ["CLASSES", "Images", "SomeBatches"]

CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10}
TEST_BATCH = 250


class SomeBatches(Batches):
    """Shuffled, augmented full batches that end after so many images; every epoch draws others.

    Args:
        dataset: where images come from.
        batch_size: images per batch.
        images: per epoch; at least one batch is made of them, if the data suffice.
        seed: of order and augmentation.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, images: int, seed: int) -> None:
        super().__init__(
            dataset,
            min(batch_size, len(dataset)),
            shuffle=True,
            augment=True,
            seed=seed,
            drop_last=True,  # batch norm of a few images is noise
        )
        self.images = images

    def __len__(self) -> int:
        return max(1, min(super().__len__(), self.images // self.batch_size))


class Images:
    """Both splits of a data set.

    Args:
        source: folder or zip with ``train/<class>/…`` and ``test/<class>/…``, or ``"digits"``.
        dataset: ``"cifar10"``, ``"cifar100"`` or ``"digits"``: how many classes are expected.
        size: pixels per side.
        progress: show progress.

    Raises:
        DataError: unreadable data, or another number of classes.
    """

    def __init__(self, source: str, dataset: str, size: int, progress: bool) -> None:
        if dataset not in CLASSES:
            raise DataError(f"unknown data set {dataset!r}: expected one of {sorted(CLASSES)}")
        self.train: ImageDataset
        self.test: ImageDataset
        if source == "digits":
            self.train, self.test = digits(size)
        else:
            self.train, self.test = (
                open_dataset(source, split, size, progress=progress) for split in ("train", "test")
            )
        classes = len(self.train.classes)
        if classes != CLASSES[dataset] or self.train.classes != self.test.classes:
            raise DataError(
                f"data {source!r}: {dataset} has {CLASSES[dataset]} classes in both splits, got "
                f"{classes} in train and {len(self.test.classes)} in test"
            )
        self.source, self.dataset, self.classes = source, dataset, classes

    def calibration(self, count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of ``count`` training images, the classes even; another draw for every seed."""
        return list(Batches(self.train, 125, indices=calibration_indices(self.train, count, seed)))

    def training(self, batch_size: int, images: int, seed: int) -> SomeBatches:
        """``images`` training images per epoch."""
        return SomeBatches(self.train, batch_size, images, seed)

    def tested(self, count: int | None = None) -> Batches:
        """All test images, or a fixed class-balanced part of them."""
        if count is None or count >= len(self.test):
            return Batches(self.test, TEST_BATCH)
        return Batches(self.test, TEST_BATCH, indices=calibration_indices(self.test, count))

    def describe(self) -> dict[str, object]:
        """JSON values that a study goes on with only if they are the same."""
        return {"dataset": self.dataset, "train_images": len(self.train),
                "test_images": len(self.test)}  # fmt: skip
