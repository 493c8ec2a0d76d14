"""Which picture belongs to which part and class: one rule, and a name for all that departs from it.

The rule (:data:`DATA_HELP` is it in two sentences):

- ``<part>/<class>/<picture>``. A part is ``train`` (or ``training``) or ``test`` (or ``testing``,
  ``val``, ``valid``, ``validation``; the first of them that there is). A class folder may have
  folders of its own. Classes are numbered by name, those of ``train`` alone.
- or ``<class>/<picture>``, with no folder between. Every fifth picture of a class, in the order of
  their names, is a test picture then.
- All of it may lie within folders that hold nothing else, however many. What is hidden (a name
  that begins with a dot, ``__MACOSX``) is not looked at.

What contradicts itself is an error: a class that ``test`` alone has, a picture in no class,
parts below classes. What was left out is one warning: files of other kinds and how many, pictures
outside of the parts, folders without pictures, classes without test pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..errors import DataError

__all__ = ["DATA_HELP", "SPLITS", "DataFolders", "arrange", "kinds"]

DATA_HELP = (
    "Folder or zip of images: train/CLASS/IMAGE and test/CLASS/IMAGE (or val/), or CLASS/IMAGE, "
    "where every fifth image of a class, by name, is for testing. Or the word digits."
)
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation"),
}
_PART_NAMES = frozenset(alias for aliases in SPLITS.values() for alias in aliases)
_EXPECTED = "expected train/<class>/<image> and test/<class>/<image>, or <class>/<image>"
_FIFTH = 5

Parts = tuple[str, ...]


@dataclass
class DataFolders:
    """How the pictures of a data set are arranged.

    Attributes:
        members: for each part that there is, its pictures with their class, in order.
        folders: what every part's folder is called, where there are some.
        classes: names, in the order of their numbers.
        notes: what was left out.
    """

    members: dict[str, list[tuple[str, str]]]
    folders: dict[str, str]
    classes: list[str]
    notes: list[str]


def arrange(images: Collection[str], folders: Iterable[str], where: str) -> DataFolders:
    """Arranges pictures by the rule.

    Args:
        images: their names, relative and with ``/``.
        folders: of all folders, those without pictures among them.
        where: what messages call the data.

    Raises:
        DataError: the names contradict the rule.
    """
    parts = {name: PurePosixPath(name).parts for name in sorted(images)}
    depth = 0
    while True:
        if any(len(p) > depth + 2 and p[depth].lower() in _PART_NAMES for p in parts.values()):
            found = _by_parts(parts, depth, where)
            break
        if len({p[depth] for p in parts.values()}) > 1 or any(
            len(p) <= depth + 2 for p in parts.values()
        ):
            found = _by_classes(parts, depth, where)
            break
        depth += 1  # one folder, and all pictures further down
    top = next(iter(parts.values()))[:depth]
    found.notes += _empty_folders(found, folders, top)
    return found


def _by_parts(parts: dict[str, Parts], depth: int, where: str) -> DataFolders:
    inside: dict[str, list[str]] = {}
    outside: list[str] = []
    for name, p in parts.items():
        if len(p) > depth + 2 and p[depth].lower() in _PART_NAMES:
            inside.setdefault(p[depth], []).append(name)
        else:
            outside.append(name)
    chosen: dict[str, str] = {}
    for split, aliases in SPLITS.items():
        # A folder called exactly so comes before one with capitals.
        there = sorted(
            (folder for folder in inside if folder.lower() in aliases),
            key=lambda folder: (aliases.index(folder.lower()), folder != folder.lower(), folder),
        )
        if there:
            chosen[split] = there[0]
        for folder in there[1:]:
            outside += inside[folder]
    members = {
        split: [(name, parts[name][depth + 1]) for name in inside[folder]]
        for split, folder in chosen.items()
    }
    known = {split: {label for _, label in found} for split, found in members.items()}
    classes = sorted(known.get("train") or known["test"])
    notes = []
    if len(known) == 2:
        if strange := known["test"] - known["train"]:
            raise DataError(
                f"data {where!r}: {_named(strange, 'class', 'classes')} only in "
                f"{chosen['test']!r}: nothing in {chosen['train']!r} has that name"
            )
        if untested := known["train"] - known["test"]:
            notes.append(
                f"{_named(untested, 'class', 'classes')} only in {chosen['train']!r}, so no test "
                f"image is of it"
            )
    if outside:
        folders = " and ".join(repr(f"{folder}/") for folder in chosen.values())
        notes.append(
            f"{_named(outside, 'image', 'images')} left out, in no class folder of {folders}"
        )
    return DataFolders(members, chosen, classes, notes)


def _by_classes(parts: dict[str, Parts], depth: int, where: str) -> DataFolders:
    by_class: dict[str, list[str]] = {}
    for name, p in parts.items():
        if len(p) < depth + 2:
            raise DataError(
                f"data {where!r}: image {name!r} is in no class directory ({_EXPECTED})"
            )
        if len(p) > depth + 2:
            raise DataError(
                f"data {where!r}: image {name!r} is too far down to say what its class is "
                f"({_EXPECTED})"
            )
        by_class.setdefault(p[depth], []).append(name)
    if all(label.lower() in _PART_NAMES for label in by_class):
        raise DataError(
            f"data {where!r}: images lie in {_named(by_class, '', '')} itself, in no class "
            f"directory ({_EXPECTED})"
        )
    classes = sorted(by_class)
    members: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for label in classes:
        for position, name in enumerate(by_class[label], start=1):
            members["train" if position % _FIFTH else "test"].append((name, label))
    notes = []
    if few := [label for label in classes if len(by_class[label]) < _FIFTH]:
        notes.append(
            f"{_named(few, 'class', 'classes')} of fewer than {_FIFTH} images, so no test image is "
            f"of it"
        )
    return DataFolders(members, {}, classes, notes)


def _empty_folders(found: DataFolders, folders: Iterable[str], top: Parts) -> list[str]:
    """A note about what looks like classes and holds no picture."""
    homes = [(*top, folder) for folder in found.folders.values()] or [top]
    empty = []
    for folder in folders:
        p = PurePosixPath(folder).parts
        if p[:-1] in homes and p[-1] not in found.classes:
            empty.append(folder)
    if not empty:
        return []
    return [f"{_named(sorted(empty), 'folder', 'folders')} without images that can be read"]


def kinds(counts: Counter[str]) -> str:
    """A note about files left out, the most frequent kinds first."""
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    few = [f"{ending or 'without ending'} {n:,}" for ending, n in ordered[:5]]
    more = ", …" if len(counts) > 5 else ""
    return f"{total:,} file{'s' * (total != 1)} of other kinds left out ({', '.join(few)}{more})"


def _named(names: Collection[str], one: str, many: str) -> str:
    """``3 classes ('ape', 'bee' and 1 more)``; for a single one ``class 'ape'``."""
    few = sorted(names)[:2]
    if len(names) == 1:
        return f"{one} {few[0]!r}".strip()
    quoted = ", ".join(map(repr, few))
    more = f" and {len(names) - len(few):,} more" if len(names) > len(few) else ""
    return f"{len(names):,} {many} ({quoted}{more})" if many else quoted + more
