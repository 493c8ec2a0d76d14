"""Errors that become HTTP answers."""

from __future__ import annotations

__all__ = ["ServeError"]


class ServeError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: what was expected and what came.
        retry_after: seconds, where the same request may succeed later.
        close: whether the connection ends, because the rest of the request was not read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after
        self.close = close
