"""One picture: its bytes, how it is held, its samples, and the part of it that is shown."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from adalayer_native.data import pictures
from adalayer_native.data.pictures import decode, scaled_part
from adalayer_native.errors import DataError

BILINEAR = Image.Resampling.BILINEAR


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))


def middle(image: Image.Image, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    scale = size / min(image.size)
    wide, high = (max(size, round(side * scale)) for side in image.size)
    return (wide, high), ((wide - size) // 2, (high - size) // 2)


@pytest.mark.parametrize("size", [(50, 40), (37, 210), (31, 31), (64, 64)])
def test_ordinary_pictures_are_scaled_whole_and_cropped(size: tuple[int, int]) -> None:
    image = noise(*size)
    scaled, (left, top) = middle(image, 32)
    expected = image.resize(scaled, BILINEAR).crop((left, top, left + 32, top + 32))
    found = scaled_part(image, scaled, (left, top), (32, 32), BILINEAR)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("size", [(900, 40), (40, 900), (200, 3), (3, 200)])
def test_of_long_pictures_only_the_shown_part_is_scaled(size: tuple[int, int]) -> None:
    image = noise(*size)
    scaled, (left, top) = middle(image, 32)
    whole = image.resize(scaled, BILINEAR).crop((left, top, left + 32, top + 32))
    found = scaled_part(image, scaled, (left, top), (32, 32), BILINEAR)
    # Rows and columns are scaled one after the other, with rounding between; which of them comes
    # first depends on the size.
    assert np.abs(np.asarray(found).astype(int) - np.asarray(whole)).max() <= 1


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000)])
def test_a_line_of_pixels_costs_nothing(size: tuple[int, int]) -> None:
    stripes = np.zeros((100_000, 3), np.uint8)
    stripes[50_000:] = 200  # the edge in the middle says that the part is where it has to be
    line = Image.fromarray(stripes.reshape(size[1], size[0], 3))
    image = decode(encoded(line), what="image 'line'")
    scaled, corner = middle(image, 224)
    limit = pictures.MAX_PIXELS
    assert scaled[0] * scaled[1] > limit  # by far too large to be made
    shown = np.asarray(scaled_part(image, scaled, corner, (224, 224), BILINEAR))
    along = shown[0, :, 0] if size[0] > size[1] else shown[:, 0, 0]
    assert (along[:111] < 100).all() and (along[113:] > 100).all()


def test_stretching_a_tall_line_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", 10_000)
    asked: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def watched(self: Image.Image, *args: object) -> Image.Image:
        asked.append(self.size)
        return resize(self, *args)

    monkeypatch.setattr(Image.Image, "resize", watched)
    tall = Image.new("RGB", (1, 9_000), (10, 20, 30))
    shown = scaled_part(tall, (32, 32), (0, 0), (32, 32), BILINEAR)
    assert shown.size == (32, 32) and shown.getpixel((5, 5)) == (10, 20, 30)
    assert asked[0][0] == 1 and asked[0][1] <= 2 * 16 * 32


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16], pixels[8:, :16], pixels[:8, 16:] = 60, 120, 240
    upright = Image.fromarray(pixels)
    # How the sensor saw it: the inverse of what the viewer has to do.
    backwards = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    undo = backwards.get(orientation, pictures._UPRIGHT.get(orientation))
    seen = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(seen, kind, exif=exif), what="image 'x'")
    assert found.size == (32, 16)
    assert np.abs(np.asarray(found)[4::8, 8::16].astype(int) - pixels[4::8, 8::16]).max() <= 6


def test_damaged_exif_does_not_matter() -> None:
    data = encoded(noise(8, 8), "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7fnonsense")
    assert decode(data, what="image 'x'").size == (8, 8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sixteen_bits_are_scaled_to_eight(kind: str, mode: str) -> None:
    values = np.array([[0, 1, 128, 129, 255, 256, 32_768, 65_278, 65_407, 65_535]], np.uint16)
    found = np.asarray(decode(encoded(Image.fromarray(values), kind), what="image 'x'", mode=mode))
    plane = found[..., 0] if mode == "RGB" else found
    assert plane.tolist() == [[0, 0, 0, 1, 1, 1, 128, 254, 255, 255]]


def test_samples_without_a_white_are_refused() -> None:
    for values in (np.zeros((4, 4), np.int32), np.zeros((4, 4), np.float32)):
        with pytest.raises(DataError, match=r"image 'a/b\.tif' has samples of 32 bits"):
            decode(encoded(Image.fromarray(values), "TIFF"), what="image 'a/b.tif'")


def test_the_first_picture_of_several() -> None:
    frames = [Image.new("L", (8, 8), value) for value in (50, 200)]
    for kind in ("GIF", "TIFF", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert abs(np.asarray(decode(data, what="image 'x'")).astype(int) - 50).max() <= 1


def test_too_large_is_refused_by_the_header() -> None:
    data = encoded(Image.new("1", (8_000, 8_000)))
    with pytest.raises(DataError, match=r"image 'bomb' is 8000x8000; at most 50,000,000 pixels"):
        decode(data, what="image 'bomb'")
    with pytest.raises(DataError, match=r"1000001x1; .* and 1,000,000 on a side"):
        decode(encoded(Image.new("1", (1_000_001, 1))), what="image 'line'")


def test_what_was_expected_is_said() -> None:
    data = encoded(noise(8, 8), "BMP")
    with pytest.raises(DataError, match=r"cannot decode the image 'x' \(as JPEG or PNG\)"):
        decode(data, what="image 'x'", formats=("PNG", "JPEG"))
