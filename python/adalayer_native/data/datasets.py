"""Image data sets held as uint8 tensors: decoded once, on demand, by several threads."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .._files import replacing, user_cache
from .._progress import ProgressBar
from ..errors import DataError
from .pictures import MAX_PIXELS, decode, scaled_part
from .sources import ImageList, list_images

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "ImageDataset", "open_dataset"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Counts what changed the pixels of a file, so that older caches are not taken for them.
DECODING = 2
# Splits up to this many decoded bytes stay in memory; larger ones are decoded when asked for.
MEMORY_LIMIT = 4 << 30
# Images one thread decodes per task: small enough for smooth progress, large enough to be cheap.
CHUNK = 64


class ImageDataset:
    """Labelled images of one size.

    Attributes:
        labels: int64 ``[N]``.
        classes: class names; ``labels`` index them.
        size: height and width of every image.
        mean, std: per channel, for pixels scaled to [0, 1].
        name: what messages call the data set.
    """

    def __init__(
        self,
        labels: torch.Tensor,
        classes: Sequence[str],
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        name: str,
        pixels: torch.Tensor | None = None,
        source: ImageList | None = None,
        cache_file: Path | None = None,
        progress: bool = True,
    ) -> None:
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise DataError(f"mean and std need three values, std above 0; got {mean}, {std}")
        self.labels, self.classes, self.size = labels, list(classes), size
        self.mean, self.std, self.name = tuple(mean), tuple(std), name
        self.progress = progress
        self._pixels, self._source, self._cache_file = pixels, source, cache_file
        self._ready = torch.full((len(labels),), pixels is not None)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """One normalised image, float32 ``[3, size, size]``, and its label."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        position = torch.tensor([index % len(self)])
        return self.normalise(self.pixels(position))[0], int(self.labels[index])

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 ``[N, 3, H, W]`` to float32 ``(x / 255 - mean) / std``."""
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

    def pixels(self, indices: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 ``[n, 3, size, size]`` of the images at ``indices`` (``None``: all of them).

        Only images that were not decoded before are decoded now. Where the split is too large
        for memory nothing is kept.

        Raises:
            DataError: an image cannot be read; the message names the file.
        """
        if self._source is None:
            assert self._pixels is not None
            return self._pixels if indices is None else self._pixels[indices]
        if self._too_large:
            wanted = torch.arange(len(self)) if indices is None else indices
            out = torch.empty((len(wanted), 3, self.size, self.size), dtype=torch.uint8)
            self._decode(wanted.tolist(), out, list(range(len(wanted))))
            return out
        self.decode(indices)
        assert self._pixels is not None
        return self._pixels if indices is None else self._pixels[indices]

    def decode(self, indices: torch.Tensor | None = None) -> None:
        """Decode the images at ``indices`` (``None``: all) that were not decoded before.

        Does nothing where the split is too large to be kept in memory.

        Raises:
            DataError: an image cannot be read; the message names the file.
        """
        if self._source is None or self._too_large:
            return
        if self._pixels is None and not self._load_cache():
            self._pixels = torch.empty((len(self), 3, self.size, self.size), dtype=torch.uint8)
        assert self._pixels is not None
        wanted = torch.arange(len(self)) if indices is None else indices.unique()
        wanted = wanted[~self._ready[wanted]]
        if len(wanted):
            places = wanted.tolist()
            self._decode(places, self._pixels, places)
            self._ready[wanted] = True
            if bool(self._ready.all()):
                self._save_cache()

    @property
    def _too_large(self) -> bool:
        return len(self) * 3 * self.size * self.size > MEMORY_LIMIT

    def _decode(self, images: list[int], out: torch.Tensor, rows: list[int]) -> None:
        source = self._source
        assert source is not None
        target = out.numpy()

        def work(start: int) -> int:
            stop = min(start + CHUNK, len(images))
            for position in range(start, stop):
                name = source.names[images[position]]
                target[rows[position]] = decode_image(
                    source.read(name), self.size, f"{source.path}:{name}"
                )
            return stop - start

        # Two at least: one thread inflates or waits for the disk while another decodes.
        threads = max(2, min(16, os.cpu_count() or 2))
        title = f"decoding {self.name}"
        bar = ProgressBar(
            title, len(images), unit="image", enabled=self.progress and len(images) > 1000
        )
        with bar, ThreadPoolExecutor(threads) as pool:
            try:
                for done in pool.map(work, range(0, len(images), CHUNK)):
                    bar.advance(done)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _load_cache(self) -> bool:
        if self._cache_file is None or not self._cache_file.is_file():
            return False
        try:
            array = np.load(self._cache_file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False  # half a file from elsewhere: decode again and replace it
        if array.dtype != np.uint8 or array.shape != (len(self), 3, self.size, self.size):
            return False
        self._pixels = torch.from_numpy(array)
        self._ready[:] = True
        return True

    def _save_cache(self) -> None:
        if self._cache_file is None or self._pixels is None:
            return
        try:
            with replacing(self._cache_file) as temporary, open(temporary, "wb") as stream:
                np.save(stream, self._pixels.numpy(), allow_pickle=False)
        except OSError as error:
            warnings.warn(
                f"decoded images could not be cached in {os.fspath(self._cache_file)!r}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


def open_dataset(
    path: str | os.PathLike[str],
    split: str = "train",
    size: int = 32,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    cache: bool = True,
    progress: bool = True,
) -> ImageDataset:
    """Open one split of an image folder or zip; images are decoded when they are first used.

    Images of another size are scaled so that the shorter side fits and cropped at the centre.
    A split that was decoded completely is kept as one file in ``cache_dir``, so that the next
    process starts at once; the file's name depends on the images' names, sizes and dates.

    Args:
        path: directory or zip; see :func:`~adalayer_native.data.sources.list_images`.
        split: ``"train"`` or ``"test"``.
        size: height and width in pixels.
        mean, std: per channel, for pixels scaled to [0, 1].
        cache_dir: where decoded splits are kept; default ``$ADALAYER_CACHE``, else
            ``adalayer_native`` in the user's cache directory.
        cache: false to keep nothing on disk.
        progress: show progress while decoding.

    Raises:
        DataError: missing or unreadable data, or no images.
    """
    if size < 1 or size > 4096:
        raise DataError(f"image size must be from 1 to 4096, got {size}")
    source = list_images(path, split)
    cache_file = None
    if cache:
        folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        name = f"images-{DECODING}-{source.fingerprint[:32]}-{split}-{size}.npy"
        cache_file = None if folder is None else folder / name
    return ImageDataset(
        torch.tensor(source.labels, dtype=torch.int64),
        source.classes,
        size,
        mean,
        std,
        name=f"{Path(path).name} {split}",
        source=source,
        cache_file=cache_file,
        progress=progress,
    )


def default_cache_dir() -> Path | None:
    """``$ADALAYER_CACHE``, else that of :func:`~adalayer_native._files.user_cache`."""
    chosen = os.environ.get("ADALAYER_CACHE")
    return Path(chosen) if chosen else user_cache()


def decode_image(data: bytes, size: int, name: str) -> np.ndarray:
    """Decode to uint8 ``[3, size, size]`` RGB: the shorter side scaled to ``size``, the middle.

    Raises:
        DataError: as :func:`~adalayer_native.data.pictures.decode`.
    """
    image = decode(data, what=f"image {name!r}", max_pixels=MAX_PIXELS)
    scale = size / min(image.size)
    wide, high = (max(size, round(side * scale)) for side in image.size)
    corner = ((wide - size) // 2, (high - size) // 2)
    shown = scaled_part(image, (wide, high), corner, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(shown).transpose(2, 0, 1)
