"""From the bytes of a picture to the pixels that are shown: one way for data folders and server."""

from __future__ import annotations

import io
import math
from collections.abc import Collection

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import DataError

__all__ = ["FORMATS", "MAX_PIXELS", "MAX_SIDE", "decode", "scaled_part"]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Decoded pixels of one picture; above it the header alone is enough to refuse (decompression bomb).
MAX_PIXELS = 50_000_000
# Decoders work row by row: fifty million rows of one pixel take ten seconds.
MAX_SIDE = 1_000_000

# EXIF: how the camera was held, and what sets the picture upright.
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_BITS = 258

# Beyond so many pixels scaled for each one shown, only the part that is shown is scaled: sides of
# six to one and more. Below it all of the picture is, which gives the bits that others get.
_WHOLE = 8
# Pillow may widen all rows before it drops any. Where those would be more than MAX_PIXELS, sides
# are first averaged down to not less than so many times what is wanted.
_AVERAGED = 16


def decode(
    data: bytes | memoryview,
    *,
    what: str,
    mode: str = "RGB",
    formats: Collection[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """The picture, upright as EXIF says, in ``mode`` ("RGB" or "L"); of an animation the first.

    Samples of 16 bits are scaled to 8; transparency is left out.

    Args:
        what: how messages call it: ``image 'folder/name.png'``.

    Raises:
        DataError: not one of ``formats``, damaged, too many pixels, or samples of which
            nothing says what is white.
    """
    try:
        with Image.open(io.BytesIO(data), formats=tuple(formats)) as image:
            # The header alone is read here; a small file can claim a huge picture.
            if image.width * image.height > max_pixels or max(image.size) > MAX_SIDE:
                raise DataError(
                    f"{what} is {image.width}x{image.height}; at most {max_pixels:,} pixels are "
                    f"accepted, and {MAX_SIDE:,} on a side"
                )
            image.load()
            upright = _UPRIGHT.get(_orientation(image))
            pixels = _eight_bits(image, what).convert(mode)
    except DataError:
        raise
    except UnidentifiedImageError as error:  # whose text has an address in memory
        raise DataError(f"cannot decode the {what} (as {_kinds(formats)}): it is none") from error
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise DataError(f"cannot decode the {what} (as {_kinds(formats)}): {error}") from error
    return pixels if upright is None else pixels.transpose(upright)


def _kinds(formats: Collection[str]) -> str:
    *most, last = sorted(formats)
    return f"{', '.join(most)} or {last}"


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF raises many types, and the pixels are well without it
        return 1


def _eight_bits(image: Image.Image, what: str) -> Image.Image:
    """Grey samples of more than 8 bits, which ``convert`` would cut off at 255, scaled to 8."""
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if not wide:
        if image.mode in ("I", "F"):
            raise DataError(
                f"{what} has samples of 32 bits, and nothing in the file says which of them is "
                f"white: expected 8 or 16 bits"
            )
        return image
    bits = 16
    if image.format == "TIFF":
        bits = int(image.tag_v2.get(_TIFF_BITS, (16,))[0])  # type: ignore[attr-defined]
    white = (1 << bits) - 1
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))


def scaled_part(
    image: Image.Image,
    scaled: tuple[int, int],
    corner: tuple[int, int],
    size: tuple[int, int],
    resample: Image.Resampling,
) -> Image.Image:
    """``image`` scaled to the size ``scaled``, and of that the part of ``size`` from ``corner``.

    All are (width, height) or (left, top). No more memory is used than a few times that of the
    picture and of what is shown, however long and narrow the picture is.
    """
    if image.size == scaled == size:
        return image
    if math.prod(scaled) > _WHOLE * math.prod(size):
        image, box = _around(image, scaled, corner, size)
        return image.resize(size, resample, box)
    if scaled[0] * image.height > MAX_PIXELS:
        image = image.reduce(
            (
                max(1, image.width // (_AVERAGED * scaled[0])),
                max(1, image.height // (_AVERAGED * scaled[1])),
            )
        )
    whole = image.resize(scaled, resample)
    if scaled == size:
        return whole
    left, top = corner
    return whole.crop((left, top, left + size[0], top + size[1]))


def _around(
    image: Image.Image, scaled: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """The pixels that the part depends on, and where in them it lies.

    Pillow keeps a box in float32, which is too coarse far from the corner of a long picture.
    """
    begins, ends, first, last = [], [], [], []
    for axis in (0, 1):
        step = image.size[axis] / scaled[axis]
        begin = corner[axis] * image.size[axis] / scaled[axis]
        end = (corner[axis] + size[axis]) * image.size[axis] / scaled[axis]
        reach = math.ceil(2 * max(1.0, step)) + 1  # what bicubic weights, the widest of them, see
        low = max(0, math.floor(begin) - reach)
        begins.append(begin - low)
        ends.append(end - low)
        first.append(low)
        last.append(min(image.size[axis], math.ceil(end) + reach))
    part = image.crop((first[0], first[1], last[0], last[1]))
    return part, (begins[0], begins[1], ends[0], ends[1])
