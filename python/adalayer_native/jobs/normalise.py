"""Which mean and deviation images are normalised with, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..data import IMAGENET_MEAN, IMAGENET_STD
from ..errors import DataError
from ..models import MODELS
from .job import CompareJob, CompileJob, CompressJob, TrainJob

__all__ = ["DIGITS", "Normalisation", "chosen", "normalisation_of", "preset"]

CHANNELS = 3


@dataclass(frozen=True)
class Normalisation:
    """``(x - mean) / std`` per channel, of values from 0 to 1.

    Attributes:
        mean, std: one number per channel.
        source: who says so.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    def __str__(self) -> str:
        numbers = (", ".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std))
        return "mean {}, std {} of values from 0 to 1 ({})".format(*numbers, self.source)

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"mean": list(self.mean), "std": list(self.std), "source": self.source}

    @classmethod
    def of_dict(cls, data: Mapping[str, Any]) -> Normalisation:
        """What :meth:`as_dict` gave."""
        mean, std = (tuple(float(v) for v in data[key]) for key in ("mean", "std"))
        return cls(mean, std, str(data["source"]))


DIGITS = Normalisation((0.5,) * CHANNELS, (0.5,) * CHANNELS, "of digits")


def chosen(job: CompressJob | TrainJob | CompileJob | CompareJob) -> Normalisation | None:
    """What the options say, ``None`` where they say nothing.

    With ``--scale s`` mean and deviation are of ``s * pixel``, as networks have them whose inputs
    are not values from 0 to 1.

    Raises:
        DataError: a number of values that is neither one nor three, or a value out of range.
    """
    if job.mean is None and job.std is None and job.scale is None:
        return None
    scale = 1 / 255 if job.scale is None else job.scale
    if not (math.isfinite(scale) and scale > 0):
        raise DataError(f"--scale must be a finite number above 0, got {scale:g}")
    mean = _channels("--mean", (0.0,) if job.mean is None else job.mean)
    std = _channels("--std", (1.0,) if job.std is None else job.std)
    if min(std) <= 0:
        raise DataError(f"--std must be above 0, got {min(std):g}")
    most = 255 * scale
    return Normalisation(
        tuple(v / most for v in mean), tuple(v / most for v in std), "as the options say"
    )


def _channels(name: str, values: Sequence[float]) -> tuple[float, ...]:
    if len(values) not in (1, CHANNELS):
        raise DataError(
            f"{name} must be one number or {CHANNELS}, one for each of red, green and blue, got "
            f"{len(values)}"
        )
    if not all(map(math.isfinite, values)):
        raise DataError(f"{name} must be finite, got {', '.join(f'{v:g}' for v in values)}")
    return tuple(values) * (CHANNELS // len(values))


def normalisation_of(job: CompressJob | TrainJob, model: nn.Module) -> Normalisation:
    """What the options say, else the data, else the model, else ImageNet's."""
    given = chosen(job)
    if given is not None:
        return given
    if job.data == "digits":
        return DIGITS
    return preset(job.model, model)


def preset(name: str, model: nn.Module) -> Normalisation:
    """A network's own where it is known, else ImageNet's.

    Args:
        name: as on the command line.
        model: what it names.
    """
    if name in MODELS:
        return Normalisation(IMAGENET_MEAN, IMAGENET_STD, f"of {name}: ImageNet's")
    own = _configured(model) or _torchvision(name)
    if own is not None:
        return own
    return Normalisation(
        IMAGENET_MEAN,
        IMAGENET_STD,
        "ImageNet's, since the model names none; --mean 0 --std 1: values from 0 to 1",
    )


def _configured(model: nn.Module) -> Normalisation | None:
    """What a network of timm carries with it."""
    found = getattr(model, "pretrained_cfg", None)
    if not isinstance(found, Mapping) or "mean" not in found or "std" not in found:
        return None
    return _usable(found["mean"], found["std"], "of the model's pretrained_cfg")


def _torchvision(name: str) -> Normalisation | None:
    """What torchvision's weights of that name ask for."""
    module, _, attribute = name.partition(":")
    if module.split(".")[:2] != ["torchvision", "models"]:
        return None
    from torchvision.models import get_model_weights

    try:
        asked = get_model_weights(attribute).DEFAULT.transforms()
        return _usable(asked.mean, asked.std, f"of torchvision's weights for {attribute}")
    except (AttributeError, ValueError):  # no weights of it, or of another kind
        return None


def _usable(mean: Any, std: Any, source: str) -> Normalisation | None:
    try:
        values = [tuple(float(v) for v in each) for each in (mean, std)]
    except (TypeError, ValueError):
        return None
    fits = all(len(each) == CHANNELS and all(map(math.isfinite, each)) for each in values)
    return Normalisation(values[0], values[1], source) if fits and min(values[1]) > 0 else None
