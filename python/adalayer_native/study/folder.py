"""What a study keeps in its directory: settings, machine, one entry per finished piece."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import ops
from .._files import found_at, read_json, write_text_atomic
from ..allocation.store import processor
from ..errors import FileFormatError, PlanError

__all__ = ["FORMAT", "Clock", "Study", "describe_machine", "load_study"]

FORMAT = "adalayer-study"
VERSION = 1
FILE = "study.json"


def describe_machine() -> dict[str, Any]:
    """Processor, cores, kernels and versions; no names of the machine or of its user."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count() or 1,
        "isa": ops.active_isa(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


class Clock:
    """Time that a run may take.

    Args:
        minutes: from now on; ``None``: without limit.
        now: seconds, for tests.
    """

    def __init__(
        self, minutes: float | None = None, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        if minutes is not None and not minutes > 0:
            raise PlanError(f"study: minutes must be above 0, got {minutes}")
        self.now = now
        self.minutes = minutes
        self.end = None if minutes is None else now() + 60.0 * minutes

    def over(self) -> bool:
        """Whether the time is up."""
        return self.end is not None and self.now() >= self.end


class Study:
    """One study's directory. ``entries`` are the finished pieces; each is written at once.

    Attributes:
        path: the directory.
        data: everything that ``study.json`` holds.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    @classmethod
    def open(
        cls, path: Path, name: str, settings: Mapping[str, Any], wanted: Mapping[str, Any]
    ) -> Study:
        """Begin a study, or go on with it.

        Args:
            path: its directory.
            name: of the study.
            settings: JSON values that all pieces share; a study goes on with the same only.
            wanted: JSON values that name the pieces; they may differ from start to start.

        Raises:
            FileFormatError: the directory holds another study, or this one with other settings.
            OSError: it cannot be written.
        """
        file = path / FILE
        data: dict[str, Any] = {"format": FORMAT, "version": VERSION, "study": name,
                                "settings": dict(settings), "entries": {}}  # fmt: skip
        if file.is_file():
            data = _read(file, name)
            differ = [
                f"{key} is {data['settings'].get(key)!r} there and {value!r} here"
                for key, value in settings.items()
                if data["settings"].get(key) != value
            ]
            if differ and (data["entries"] or (path / "work").exists()):
                raise FileFormatError(
                    f"{file}: this study was begun with other settings: {'; '.join(differ)}; give "
                    f"the same ones or another --out"
                )
            if differ:  # nothing was done yet, its first start may have failed
                data = {**data, "settings": dict(settings)}
                data.pop("images", None)
        data["wanted"] = dict(wanted)
        data["machine"] = describe_machine()
        study = cls(path, data)
        study.save()  # shows now, not after an hour, whether the directory can be written
        return study

    @property
    def entries(self) -> dict[str, Any]:
        """Finished pieces by name."""
        found: dict[str, Any] = self.data["entries"]
        return found

    def put(self, key: str, value: Any) -> None:
        """Keep a finished piece."""
        self.entries[key] = value
        self.save()

    def drop(self, key: str) -> None:
        """Forget a piece, so that it is done anew."""
        self.entries.pop(key, None)

    def save(self) -> None:
        """Write ``study.json``; an interruption leaves the previous one."""
        write_text_atomic(self.path / FILE, json.dumps(self.data, indent=1) + "\n")

    def work(self, *parts: str) -> Path:
        """A directory for checkpoints and models."""
        folder = self.path.joinpath("work", *parts)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def load_study(path: str | os.PathLike[str], *, finished: bool = True) -> dict[str, Any]:
    """Contents of a study's ``study.json``.

    Args:
        path: output directory of ``adalayer study``.
        finished: refuse one whose pieces are not all there.

    Raises:
        FileFormatError: no such directory, an empty, damaged or half-finished study.
    """
    root = Path(path)
    shown = os.fspath(path)
    if not root.is_dir():
        raise FileFormatError(
            f"study {shown!r} {found_at(root)}; expected the output directory of adalayer study"
        )
    if not (root / FILE).is_file():
        raise FileFormatError(
            f"study {shown!r} is empty: it has no {FILE}; expected the output directory of "
            f"adalayer study"
        )
    data = _read(root / FILE, None)
    missing = data.get("missing", ["everything"])
    if finished and missing:
        raise FileFormatError(
            f"study {shown!r} is not finished: {', '.join(missing[:4])}"
            f"{' and more' if len(missing) > 4 else ''} not done yet; the same command goes on"
        )
    return data


def _read(file: Path, name: str | None) -> dict[str, Any]:
    data = read_json(file, (FORMAT, VERSION))
    if name is not None and data.get("study") != name:
        raise FileFormatError(
            f"{file} belongs to study {data.get('study')!r}, not {name!r}; give another --out"
        )
    if not isinstance(data.get("settings"), dict) or not isinstance(data.get("entries"), dict):
        raise FileFormatError(f'{file}: lacks "settings" or "entries"')
    return data
