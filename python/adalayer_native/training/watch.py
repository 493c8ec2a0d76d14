"""Who looks on while a model trains: measures after every epoch, pauses the run or ends it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["Paused", "Watch"]


class Paused(Exception):
    """A :class:`Watch` paused the run; its checkpoint is written, the same call goes on."""


class Watch:
    """Looks on and changes nothing. Subclasses override what they need.

    The time that :meth:`epoch` takes does not count as training time.
    """

    def epoch(self, model: nn.Module, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Called after every epoch with the model in evaluation mode.

        Args:
            model: at its present parameters, not their average.
            entry: of the epoch in :class:`~adalayer_native.training.History`.

        Returns:
            JSON values that are added to the entry, and kept in the checkpoint.
        """
        return {}

    def pause(self) -> bool:
        """Called after every step; true writes the checkpoint and raises :class:`Paused`."""
        return False

    def stop(self, entry: Mapping[str, Any]) -> bool:
        """Called after :meth:`epoch`; true ends the run here, as a time limit would."""
        return False
