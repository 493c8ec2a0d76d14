"""Where images come from: a folder or a zip, and what lies in it."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .._files import found_at
from ..errors import DataError
from .folders import SPLITS, arrange, kinds

__all__ = ["MAX_FILE_BYTES", "ImageList", "list_images"]

EXTENSIONS = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
)
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
        classes: class names, alphabetical; the same of every split.
        read: function from a name to the encoded bytes; safe to call from several threads.
        fingerprint: changes when the files change (names, sizes, modification times).
    """

    path: str
    names: list[str]
    labels: list[int]
    classes: list[str]
    read: Callable[[str], bytes]
    fingerprint: str


@dataclass
class _Found:
    """What lies in a folder or zip and is not hidden.

    Attributes:
        files: what changes when the file does, for every regular file.
        folders: names of all folders.
        read: as in :class:`ImageList`.
        stamp: of the data as a whole.
    """

    files: dict[str, str]
    folders: set[str]
    read: Callable[[str], bytes]
    stamp: str


def list_images(path: str | os.PathLike[str], split: str) -> ImageList:
    """Find the images of one split, by the rule in :mod:`~adalayer_native.data.folders`.

    What the rule leaves out is said in one warning.

    Args:
        path: a directory or a zip file. Links are followed.
        split: ``"train"`` or ``"test"``.

    Raises:
        DataError: nothing there, not a zip, no images, no such split, a dangling link, or names
            that contradict the rule.
    """
    if split not in SPLITS:
        raise DataError(f"split must be one of {sorted(SPLITS)}, got {split!r}")
    root, where = Path(path), os.fspath(path)
    if root.is_dir():
        found = _from_directory(root)
    elif root.is_file():
        found = _from_zip(root)
    else:
        raise DataError(f"data {where!r} {found_at(root)} (expected a directory or a zip)")
    images = [name for name in found.files if _ending(name) in EXTENSIONS]
    others = Counter(_ending(name) for name in found.files if _ending(name) not in EXTENSIONS)
    if not images:
        there = f"; {kinds(others)}" if others else ""
        raise DataError(
            f"data {where!r}: no images found (looked for {', '.join(sorted(EXTENSIONS))}){there}"
        )
    arranged = arrange(images, found.folders, where)
    if split not in arranged.members:
        raise DataError(
            f"data {where!r}: no {split!r} directory (looked for {', '.join(SPLITS[split])}; "
            f"found {', '.join(arranged.folders.values())})"
        )
    notes = arranged.notes + ([kinds(others)] if others else [])
    if notes:
        warnings.warn(f"data {where!r}: {'; '.join(notes)}", stacklevel=3)
    chosen = arranged.members[split]
    if not chosen:
        raise DataError(f"data {where!r}: too few images for a {split!r} split")
    number = {label: index for index, label in enumerate(arranged.classes)}
    digest = hashlib.sha256(found.stamp.encode())
    for name, _ in chosen:
        digest.update(f"\n{name}\t{found.files[name]}".encode("utf-8", "surrogateescape"))
    return ImageList(
        path=where,
        names=[name for name, _ in chosen],
        labels=[number[label] for _, label in chosen],
        classes=arranged.classes,
        read=found.read,
        fingerprint=digest.hexdigest(),
    )


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _from_directory(root: Path) -> _Found:
    files: dict[str, str] = {}
    folders: set[str] = set()

    def walk(folder: str, above: frozenset[tuple[int, int]]) -> None:
        place = root / folder
        try:
            with os.scandir(place) as entries:
                inside = [entry for entry in entries if not _hidden(entry.name)]
        except OSError as error:
            raise DataError(f"cannot read the folder {os.fspath(place)!r}: {error}") from error
        for entry in inside:
            name = f"{folder}/{entry.name}" if folder else entry.name
            try:
                info = entry.stat()
            except OSError as error:
                if entry.is_symlink():
                    raise DataError(
                        f"dangling link {entry.path!r}: it leads to {os.readlink(entry.path)!r}"
                    ) from error
                raise DataError(f"cannot read {entry.path!r}: {error}") from error
            if stat.S_ISDIR(info.st_mode):
                itself = (info.st_dev, info.st_ino)
                if itself in above:
                    raise DataError(f"link {entry.path!r} leads back to a folder that it lies in")
                folders.add(name)
                walk(name, above | {itself})
            elif stat.S_ISREG(info.st_mode):
                files[name] = f"{info.st_size} {info.st_mtime_ns}"

    own = root.stat()
    walk("", frozenset({(own.st_dev, own.st_ino)}))

    def read(name: str) -> bytes:
        file = root / name
        try:
            if file.stat().st_size > MAX_FILE_BYTES:
                raise DataError(_too_big(f"{root / name}", file.stat().st_size))
            return file.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the image {os.fspath(file)!r}: {error}") from error

    return _Found(files, folders, read, os.fspath(root.resolve()))


def _from_zip(path: Path) -> _Found:
    where = os.fspath(path)
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise DataError(
            f"data {where!r} is neither a directory nor a readable zip: {error}"
        ) from error
    named = {_entry_name(info, where): info for info in archive.infolist()}
    shown = {
        name: info
        for name, info in named.items()
        if not any(_hidden(part) for part in PurePosixPath(name).parts)
    }
    infos = {name: info for name, info in shown.items() if not name.endswith("/")}
    files = {name: f"{info.file_size} {info.CRC:08x}" for name, info in infos.items()}
    folders = {name.rstrip("/") for name in shown if name.endswith("/")}
    for name in files:
        folders.update(os.fspath(parent) for parent in PurePosixPath(name).parents[:-1])

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
    return _Found(files, folders, read, f"{path.resolve()} {info.st_size} {info.st_mtime_ns}")


def _entry_name(info: zipfile.ZipInfo, where: str) -> str:
    """With slashes. (Some programs for Windows write backslashes, against the format.)"""
    name = info.filename if "/" in info.filename else info.filename.replace("\\", "/")
    if ".." in PurePosixPath(name).parts:
        raise DataError(f"data {where!r}: entry {info.filename!r} leads out of the zip")
    return name


def _too_big(name: str, size: int) -> str:
    return f"image {name!r} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are accepted"
