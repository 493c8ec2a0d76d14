"""Data, model and weights of a job, each checked when it is opened."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass

import torch
from torch import nn

from .._console import warn
from .._files import require_file
from ..data import Batches, ImageDataset, Loaders, digits, open_dataset
from ..errors import FileFormatError, UnsupportedModelError
from ..importance.outputs import has_logits, logits_of
from ..measure import accuracy
from ..models import get_model, is_file, load_weights
from .job import CompressJob, TrainJob
from .normalise import Normalisation, normalisation_of

__all__ = ["Opened", "at_chance", "build", "check_fit", "open_model", "open_splits", "warn_chance"]


@dataclass
class Opened:
    """A model and the images it is for.

    Attributes:
        model: float, with its weights if it has any yet.
        train, test: normalised as ``normalisation`` says.
    """

    model: nn.Module
    train: ImageDataset
    test: ImageDataset
    normalisation: Normalisation


def open_splits(
    data: str, image_size: int, *, progress: bool = True
) -> tuple[ImageDataset, ImageDataset]:
    """(train, test) of data as the command line names it."""
    if data == "digits":
        return digits(image_size)
    train, test = (
        open_dataset(data, split, image_size, progress=progress) for split in ("train", "test")
    )
    return train, test


def open_model(job: CompressJob | TrainJob) -> Opened:
    """Data and model; weights are loaded where the job has some.

    Raises:
        AdaError: data, model or weights that cannot be used.
    """
    weights = job.weights if isinstance(job, CompressJob) else None
    if weights is not None:
        require_file(weights, "weight file")
    elif isinstance(job, CompressJob) and not is_file(job.model):
        raise FileFormatError(
            f"the weights of {job.model!r} are needed: give --weights (an ONNX file has its own)"
        )
    train, test = open_splits(job.data, job.image_size, progress=job.progress)
    model = build(job.model, job.classes, len(train.classes), job.image_size)
    if weights is not None:
        load_weights(model, weights)
        model.eval()
    normalisation = normalisation_of(job, model)
    for part in (train, test):
        part.mean, part.std = normalisation.mean, normalisation.std
    return Opened(model, train, test, normalisation)


def build(name: str, wanted: int | None, classes: int, image_size: int | None = None) -> nn.Module:
    """A model with the number of classes that was asked for, else with that of the data."""
    if ":" in name and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as ``python -m`` does
    return get_model(name, wanted or classes, required=wanted is not None, image_size=image_size)


def check_fit(job: CompressJob | TrainJob, model: nn.Module, data: Batches) -> None:
    """Tries one image.

    Raises:
        UnsupportedModelError: the model cannot take the images, or does not return one value per
            class.
    """
    x, _ = next(iter(data))
    shape = tuple(x[:1].shape)
    try:
        with torch.inference_mode():
            output = model(x[:1])
    except (RuntimeError, ValueError, TypeError) as error:
        raise UnsupportedModelError(
            f"model {job.model!r} cannot take images of shape {shape} (--image-size "
            f"{job.image_size}): {error}"
        ) from error
    classes = len(data.dataset.classes)
    out = logits_of(output) if has_logits(output) else output
    if not isinstance(out, torch.Tensor) or out.dim() != 2 or out.shape[1] != classes:
        got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise UnsupportedModelError(
            f"model {job.model!r} must return logits of shape (N, {classes}) for the {classes} "
            f"classes of the data, got {got}"
        )


def at_chance(percent: float, images: int, classes: int) -> bool:
    """Whether an accuracy is no better than guessing, three standard errors of it included."""
    if classes < 2 or images < 1:
        return False
    chance = 1 / classes
    return percent / 100 <= chance + 3 * math.sqrt(chance * (1 - chance) / images)


def warn_chance(opened: Opened, data: Loaders) -> float:
    """The float model's accuracy on the calibration images; a warning where it only guesses."""
    images = data.calibration
    classes, count = len(opened.train.classes), len(images.indices)
    found = accuracy(opened.model, images, progress=False)
    if at_chance(found, count, classes):
        warn(
            f"the float network is right on {found:.1f} % of {count} training images with "
            f"{classes} classes, which is guessing. Likely causes: another normalisation than in "
            f"its training (now {opened.normalisation}; --mean, --std and --scale change it); "
            "another order of classes (here they are in the alphabetical order of their folders, "
            f"{', '.join(opened.train.classes[:3])}{', …' if classes > 3 else ''}); another size "
            "or cut of the images (--image-size), or BGR for RGB; weights that were never trained"
        )
    return found
