"""Measurements that are kept between runs: one file per table, in the user's cache directory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import _C, ops
from .._files import user_cache
from .._json_cache import JsonCache

__all__ = ["Store", "cache_dir", "machine", "processor"]

FORMAT = "adalayer-table-1"
BOARD = Path("/proc/device-tree/model")


def cache_dir(explicit: str | os.PathLike[str] | None = None) -> Path | None:
    """Where tables are kept: ``explicit``, else in the user's cache directory."""
    return user_cache() if explicit is None else Path(explicit)


def machine(threads: int | None = None) -> dict[str, Any]:
    """What a latency depends on besides the layer: processor, kernels, threads."""
    return {
        "kernels": _C.kernels_key(),
        "cpu": processor(),
        "isa": ops.active_isa(),
        "threads": ops.get_num_threads() if threads is None else threads,
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo"), board: Path = BOARD) -> str:
    """Its name; of ARM the kernel says the board, or who made it and its number."""
    words: dict[str, str] = {}
    try:
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            words.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    if "model name" in words:
        return words["model name"]
    part = " ".join(words[key] for key in ("CPU implementer", "CPU part") if key in words)
    try:
        name = board.read_text(encoding="utf-8").strip("\0 \n")
    except OSError:
        name = platform.processor() or platform.machine()
    return f"{name} ({part})" if part else name


class Store(JsonCache):
    """Numbers by name in ``<directory>/<kind>-<hash of key>.json``.

    One that cannot be read is reported with a warning and built anew; one that cannot be written,
    too, and kept in memory: it saves time to later runs, and is no reason to lose this one.

    Args:
        directory: see :func:`cache_dir`; None: only in memory.
        kind: what the numbers are, a part of the file's name.
        key: everything the numbers depend on; JSON values.
    """

    def __init__(self, directory: Path | None, kind: str, key: dict[str, Any]) -> None:
        text = json.dumps({"format": FORMAT, "kind": kind, **key}, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        path = None if directory is None else directory / f"{kind}-{name}.json"

        def damaged(why: str) -> None:
            warnings.warn(
                f"the table '{path}' cannot be used ({why}); it is measured anew",
                stacklevel=5,
            )

        super().__init__(path, json.loads(text), "values", parse=_numbers, report=damaged, indent=1)

    def save(self) -> None:
        """Write what is new, if it can be written."""
        try:
            super().save()
        except OSError as error:
            warnings.warn(
                f"the table '{self.path}' cannot be kept ({error.strerror or error}); a later run "
                "will measure it again",
                RuntimeWarning,
                stacklevel=2,
            )
            self.path = None

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> float:
        return float(self.values[name])

    def __setitem__(self, name: str, value: float) -> None:
        self.values[name] = value
        self.touch()

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    found = {str(name): float(value) for name, value in values.items()}
    if not all(math.isfinite(value) for value in found.values()):
        raise ValueError("it holds a number that is not finite")
    return found
