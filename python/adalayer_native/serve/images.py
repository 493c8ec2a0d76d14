"""From the bytes of a JPEG or PNG to the network's input, as the ``.ada`` file says.

``preprocessing`` in the file is a JSON object; every field may be left out:

    size           [height, width] that the network reads; default: its input's
    resize         shorter side before a centre crop to ``size``; default: scaled to ``size``
    interpolation  "bilinear" (default), "bicubic", "nearest"
    mean, std      one per channel, of values from 0 to 1; default 0 and 1
    channels       "RGB" (default for 3 channels), "BGR", "L" (default for 1)

Decoding and scaling are those of data folders (``data/pictures.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..data.pictures import decode, scaled_part
from ..errors import DataError, FileFormatError, InputError

__all__ = ["Placing", "Preprocessing", "probabilities"]

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}
_KNOWN = {"size", "resize", "interpolation", "mean", "std", "channels"}


class Placing(NamedTuple):
    """Where in an image what the network reads lies; all are (width, height) or (left, top).

    Attributes:
        image: its size, upright.
        scaled: the size that it was scaled to.
        corner: of the part of that which is shown.
    """

    image: tuple[int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int]

    def located(self, boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Boxes ``[K, 4]`` (``x1 y1 x2 y2``) in the image's own pixels, cut off at its edges."""
        found = (boxes.astype(np.float64) + np.tile(self.corner, 2)) * np.tile(
            np.divide(self.image, self.scaled), 2
        )
        return np.clip(found, 0, np.tile(self.image, 2))


class Preprocessing:
    """Decodes, scales, crops and normalises images.

    Args:
        spec: as above, or None.
        shape: the input's sizes without the batch.

    Raises:
        FileFormatError: the specification does not fit the input, or names something unknown.
    """

    def __init__(self, spec: Mapping[str, Any] | None, shape: Sequence[int]) -> None:
        given = {} if spec is None else dict(spec)
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise FileFormatError(
                f"images need an input [batch, 1 or 3, height, width], this one is [batch, "
                f"{', '.join(map(str, shape))}]"
            )
        unknown = sorted(set(given) - _KNOWN)
        if unknown:
            raise FileFormatError(
                f"preprocessing: unknown field {unknown[0]!r}, expected {sorted(_KNOWN)}"
            )
        planes = shape[0]
        size = given.get("size", list(shape[1:]))
        size = [size, size] if isinstance(size, int) else list(size)
        if size != list(shape[1:]):
            raise FileFormatError(
                f"preprocessing: size {size} is not that of the input, {list(shape[1:])}"
            )
        self.height, self.width = int(size[0]), int(size[1])
        self.resize = None if given.get("resize") is None else int(given["resize"])
        if self.resize is not None and self.resize < max(self.height, self.width):
            raise FileFormatError(
                f"preprocessing: resize {self.resize} is smaller than the crop {size}"
            )
        name = given.get("interpolation", "bilinear")
        if name not in _FILTERS:
            raise FileFormatError(
                f"preprocessing: interpolation {name!r}, expected one of {sorted(_FILTERS)}"
            )
        self.filter = _FILTERS[name]
        self.channels = given.get("channels", "RGB" if planes == 3 else "L")
        if self.channels not in (("RGB", "BGR") if planes == 3 else ("L",)):
            raise FileFormatError(
                f"preprocessing: channels {self.channels!r} do not fit {planes} planes"
            )
        mean = self._per_channel(given, "mean", 0.0, planes)
        std = self._per_channel(given, "std", 1.0, planes)
        if not (std > 0).all():
            raise FileFormatError("preprocessing: expected std above 0")
        self._mean, self._std = mean, std

    @staticmethod
    def _per_channel(
        given: Mapping[str, Any], key: str, default: float, planes: int
    ) -> npt.NDArray[np.float32]:
        value = given.get(key)
        values = [default] * planes if value is None else value
        values = [values] * planes if isinstance(values, (int, float)) else list(values)
        if len(values) != planes or not all(
            isinstance(item, (int, float)) and math.isfinite(item) for item in values
        ):
            raise FileFormatError(f"preprocessing: expected {planes} numbers as {key}, got {value}")
        return np.array(values, dtype=np.float32).reshape(planes, 1, 1)

    def __call__(self, data: bytes | memoryview, max_pixels: int) -> npt.NDArray[np.float32]:
        """One image as float32 ``[channels, height, width]``; errors as of :meth:`placed`."""
        return self.placed(data, max_pixels)[0]

    def placed(
        self, data: bytes | memoryview, max_pixels: int
    ) -> tuple[npt.NDArray[np.float32], Placing]:
        """One image as float32 ``[channels, height, width]``, and where in it that is.

        Raises:
            InputError: not a JPEG or PNG, damaged, or more than ``max_pixels``, also when its
                shorter side is scaled to ``resize``.
        """
        mode = "L" if self.channels == "L" else "RGB"
        try:
            pixels = decode(
                data, what="image", mode=mode, formats=("JPEG", "PNG"), max_pixels=max_pixels
            )
        except DataError as error:
            raise InputError(str(error)) from error
        fitted, placing = self._fitted(pixels, max_pixels)
        array = np.asarray(fitted, dtype=np.float32) / np.float32(255)
        if self.channels == "L":
            array = array[None]
        else:
            array = array.transpose(2, 0, 1)
            if self.channels == "BGR":
                array = array[::-1]
        return np.ascontiguousarray((array - self._mean) / self._std), placing

    def _fitted(self, image: Image.Image, max_pixels: int) -> tuple[Image.Image, Placing]:
        size = self.width, self.height
        if self.resize is None:
            placing = Placing(image.size, size, (0, 0))
            return scaled_part(image, size, (0, 0), size, self.filter), placing
        scale = self.resize / min(image.size)
        wide = max(self.width, int(image.width * scale))
        high = max(self.height, int(image.height * scale))
        if wide * high > max_pixels:
            raise InputError(
                f"image is {image.width}x{image.height}, with its shorter side at {self.resize} "
                f"{wide}x{high}; at most {max_pixels:,} pixels are accepted"
            )
        corner = round((wide - self.width) / 2), round((high - self.height) / 2)
        placing = Placing(image.size, (wide, high), corner)
        return scaled_part(image, (wide, high), corner, size, self.filter), placing


def probabilities(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Softmax over the last axis, in float64; of a NaN or +infinity all are NaN, as in torch."""
    with np.errstate(invalid="ignore"):
        shifted = scores.astype(np.float64) - scores.max(axis=-1, keepdims=True)
    powers = np.exp(shifted)
    result: npt.NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return result
