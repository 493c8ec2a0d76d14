"""Measurements that a run keeps for the next one: a JSON file that is written every few seconds."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._files import write_text_atomic

__all__ = ["JsonCache"]

SAVE_INTERVAL = 2.0  # seconds between two writes


class JsonCache:
    """``{"key": key, entry: values}`` in a file that is replaced as a whole or not at all.

    What was measured is on disk every few seconds; as a context manager also at the end, after
    Ctrl-C, too, so that the next run goes on there. A file with another key, or one that cannot be
    read, is begun anew.

    Attributes:
        path: of the file; ``None``: nothing is kept.
        values: what is kept, JSON values by name.

    Args:
        key: everything that the values depend on, a JSON value.
        entry: what they are called in the file.
        parse: checks what a file holds; ``ValueError``, ``TypeError`` and the like refuse it.
        report: is told why a file that is there is of no use.
        indent: of the JSON text.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        key: Any,
        entry: str,
        *,
        parse: Callable[[Any], dict[str, Any]] = dict,
        report: Callable[[str], None] = lambda why: None,
        indent: int | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.key, self.entry, self.indent = key, entry, indent
        self.changed, self.saved = False, time.monotonic()
        self.values: dict[str, Any] = self._read(parse, report)

    def _read(
        self, parse: Callable[[Any], dict[str, Any]], report: Callable[[str], None]
    ) -> dict[str, Any]:
        if self.path is None:
            return {}
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["key"] == self.key:
                return parse(data[self.entry])
            report("it belongs to other settings")
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            report(str(error) if isinstance(error, OSError) else repr(error))
        return {}

    def touch(self) -> None:
        """Say that something is new; it is written where the last time was a while ago."""
        self.changed = True
        if time.monotonic() - self.saved >= SAVE_INTERVAL:
            self.save()

    def save(self) -> None:
        """Write the file if something is new."""
        self.saved = time.monotonic()
        if self.path is not None and self.changed:
            data = {"key": self.key, self.entry: self.values}
            write_text_atomic(self.path, json.dumps(data, allow_nan=False, indent=self.indent))
            self.changed = False

    def __enter__(self) -> JsonCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.save()
