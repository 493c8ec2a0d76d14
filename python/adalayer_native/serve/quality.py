"""Levels of quality: what a client asks for, and what the others get while many wait."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ServeError

__all__ = ["HEADER", "Quality", "asked_level"]

HEADER = b"quality"


class Quality:
    """The level of requests that ask for none.

    With ``n`` levels a lower one is taken whenever another ``n``-th of the queue is full, and left
    when half of that is empty again, so that a queue at the edge does not switch with every
    request.

    Attributes:
        level: of the batch that is sent next; 0 is the best.
    """

    def __init__(self, levels: int, most_waiting: int) -> None:
        self.level = 0
        self._levels, self._most = levels, most_waiting

    def update(self, waiting: int) -> int:
        """The level while so many requests wait."""
        while self.level + 1 < self._levels and waiting >= self._limit(self.level + 1):
            self.level += 1
        while self.level and waiting < self._limit(self.level) / 2:
            self.level -= 1
        return self.level

    def _limit(self, level: int) -> float:
        return self._most * level / self._levels


def asked_level(
    headers: Mapping[bytes, bytes], parameters: Mapping[str, Any] | None, levels: int
) -> int | None:
    """The level that a request asks for, in its header or among its parameters; None for none.

    Raises:
        ServeError: 400, no such level, or two different ones.
    """
    text = headers.get(HEADER)
    found: list[int] = []
    if text is not None:
        if not (text.isdigit() and len(text) < 4):
            shown = text[:20].decode("latin-1")
            raise ServeError(400, f"Quality: expected 0 to {levels - 1}, got {shown!r}")
        found.append(int(text))
    given = (parameters or {}).get("quality")
    if given is not None:
        if type(given) is not int:
            raise ServeError(400, f"quality: expected a whole number, got {str(given)[:20]!r}")
        found.append(given)
    for level in found:
        if not 0 <= level < levels:
            raise ServeError(
                400,
                f"quality: level {level} does not exist: expected "
                + (f"0 (the best) to {levels - 1}" if levels > 1 else "0, the only one"),
            )
    if len(set(found)) > 1:
        raise ServeError(
            400, f"quality: the header says {found[0]} and the parameters say {found[1]}"
        )
    return found[0] if found else None
