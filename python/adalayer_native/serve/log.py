"""The log: with times, and bounded where strangers decide what is logged."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

__all__ = ["StrangersLog", "log_to_stderr"]

_LINES = 10
_SECONDS = 10.0
_LONGEST = 300


def log_to_stderr() -> None:
    """Lines of this package and of uvicorn on stderr, each with its time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z")
    )
    for name in ("adalayer_native", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
    logging.getLogger("adalayer_native").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


class StrangersLog:
    """Warnings about what clients sent: so many lines in a time, then how many were left out.

    To be used in one event loop.
    """

    def __init__(
        self, logger: logging.Logger, *, lines: int = _LINES, seconds: float = _SECONDS
    ) -> None:
        self._logger = logger
        self._lines, self._seconds = lines, seconds
        self._written = 0
        self._left_out = 0
        self._timer: asyncio.TimerHandle | None = None

    def warning(self, address: Any, text: str, error: BaseException | None = None) -> None:
        """One line.

        Args:
            address: the client's host and port, as the socket gives them.
            error: whose traceback follows.
        """
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._seconds, self._next)
        if self._written == self._lines:
            self._left_out += 1
            return
        self._written += 1
        self._logger.warning("%s %s", _place(address), _one_line(text), exc_info=error)

    def _next(self) -> None:
        self._timer = None
        if self._left_out:
            self._logger.warning(
                "%d more bad requests in %g s, not listed", self._left_out, self._seconds
            )
        self._written = self._left_out = 0


def _place(address: Any) -> str:
    if not isinstance(address, (tuple, list)) or len(address) < 2:
        return "?"
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def _one_line(text: str) -> str:
    # A client must not be able to write lines of its own, nor to a terminal.
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:_LONGEST]
    )
    return shown + "…" * (len(text) > _LONGEST)
