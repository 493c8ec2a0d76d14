"""Where images come from: a folder or a zip with one directory per class."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import DataError

__all__ = ["MAX_FILE_BYTES", "ImageList", "list_images"]

EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation"),
}
# A single encoded image above this is refused before it is read: no photograph needs it, and a
# zip entry may claim kilobytes and inflate to gigabytes.
MAX_FILE_BYTES = 64 << 20


@dataclass
class ImageList:
    """One split of a data set.

    Attributes:
        path: the directory or zip file.
        names: file name of every image, relative to ``path``, in sorted order.
        labels: class number of every image.
        classes: class names, alphabetical.
        read: function from a name to the encoded bytes; safe to call from several threads.
        fingerprint: changes when the files change (names, sizes, modification times).
    """

    path: str
    names: list[str]
    labels: list[int]
    classes: list[str]
    read: Callable[[str], bytes]
    fingerprint: str


def list_images(path: str | os.PathLike[str], split: str) -> ImageList:
    """Find the images of one split.

    Expected are ``train`` and ``test`` (or ``val``) directories with one directory per class in
    each, optionally inside one top directory; or class directories alone, of which every fifth
    image of each class is the test split.

    Args:
        path: a directory or a zip file.
        split: ``"train"`` or ``"test"``.

    Raises:
        DataError: nothing there, not a zip, no images, or no such split.
    """
    if split not in SPLITS:
        raise DataError(f"split must be one of {sorted(SPLITS)}, got {split!r}")
    root = Path(path)
    if root.is_dir():
        files, read, stamp = _from_directory(root)
    elif root.is_file():
        files, read, stamp = _from_zip(root)
    else:
        raise DataError(f"data {os.fspath(path)!r} does not exist (expected a directory or a zip)")
    images = sorted(name for name in files if _is_image(name))
    if not images:
        raise DataError(
            f"data {os.fspath(path)!r}: no images found "
            f"(looked for {', '.join(sorted(EXTENSIONS))})"
        )
    chosen, classes = _pick(images, split, os.fspath(path))
    digest = hashlib.sha256(stamp.encode())
    for name, _ in chosen:
        digest.update(f"\n{name}\t{files[name]}".encode("utf-8", "surrogateescape"))
    return ImageList(
        path=os.fspath(path),
        names=[name for name, _ in chosen],
        labels=[label for _, label in chosen],
        classes=classes,
        read=read,
        fingerprint=digest.hexdigest(),
    )


def _pick(images: list[str], split: str, where: str) -> tuple[list[tuple[str, int]], list[str]]:
    parts = {name: PurePosixPath(name).parts for name in images}
    every_split = {alias for aliases in SPLITS.values() for alias in aliases}
    for depth in (0, 1):  # split directories at the top, or inside one top directory
        if any(len(p) > depth + 2 and p[depth].lower() in every_split for p in parts.values()):
            groups: dict[str, list[str]] = {}
            for name in images:
                if len(parts[name]) > depth + 2:
                    groups.setdefault(parts[name][depth].lower(), []).append(name)
            alias = next((a for a in SPLITS[split] if a in groups), None)
            if alias is None:
                raise DataError(
                    f"data {where!r}: no {split!r} directory (looked for "
                    f"{', '.join(SPLITS[split])}; found {', '.join(sorted(groups))})"
                )
            # Labels come from the classes of all splits, so that they agree between splits.
            classes = sorted({parts[n][depth + 1] for a in every_split for n in groups.get(a, [])})
            number = {name: index for index, name in enumerate(classes)}
            return [(n, number[parts[n][depth + 1]]) for n in groups[alias]], classes
    tops = {p[0] for p in parts.values()}
    depth = 1 if len(tops) == 1 and all(len(p) > 2 for p in parts.values()) else 0
    by_class: dict[str, list[str]] = {}
    for name in images:
        if len(parts[name]) < depth + 2:
            raise DataError(
                f"data {where!r}: image {name!r} is in no class directory (expected "
                f"train/<class>/<image>, test/<class>/<image>, or <class>/<image>)"
            )
        by_class.setdefault(parts[name][depth], []).append(name)
    classes = sorted(by_class)
    chosen = [
        (name, label)
        for label, class_name in enumerate(classes)
        for position, name in enumerate(by_class[class_name])
        if (position % 5 == 4) == (split == "test")
    ]
    if not chosen:
        raise DataError(f"data {where!r}: too few images for a {split!r} split")
    return chosen, classes


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in EXTENSIONS and not hidden


def _from_directory(root: Path) -> tuple[dict[str, str], Callable[[str], bytes], str]:
    files: dict[str, str] = {}
    for folder, _, names in os.walk(root):
        for name in names:
            if PurePosixPath(name).suffix.lower() in EXTENSIONS:
                full = Path(folder, name)
                info = full.stat()
                files[full.relative_to(root).as_posix()] = f"{info.st_size} {info.st_mtime_ns}"

    def read(name: str) -> bytes:
        file = root / name
        try:
            if file.stat().st_size > MAX_FILE_BYTES:
                raise DataError(_too_big(f"{root / name}", file.stat().st_size))
            return file.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the image {os.fspath(file)!r}: {error}") from error

    return files, read, os.fspath(root.resolve())


def _from_zip(path: Path) -> tuple[dict[str, str], Callable[[str], bytes], str]:
    where = os.fspath(path)
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise DataError(
            f"data {where!r} is neither a directory nor a readable zip: {error}"
        ) from error
    infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    files = {name: f"{info.file_size} {info.CRC:08x}" for name, info in infos.items()}

    def read(name: str) -> bytes:
        info = infos[name]
        if info.file_size > MAX_FILE_BYTES:
            raise DataError(_too_big(f"{where}:{name}", info.file_size))
        try:
            with archive.open(info) as stream:
                # The directory's size may lie; never inflate more than the limit.
                data = stream.read(MAX_FILE_BYTES + 1)
        except Exception as error:  # zlib, lzma, BadZipFile, RuntimeError (encrypted), EOFError
            raise DataError(f"cannot read the image '{where}:{name}': {error}") from error
        if len(data) > MAX_FILE_BYTES:
            raise DataError(_too_big(f"{where}:{name}", len(data)))
        return data

    info = path.stat()
    return files, read, f"{path.resolve()} {info.st_size} {info.st_mtime_ns}"


def _too_big(name: str, size: int) -> str:
    return f"image {name!r} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are accepted"
