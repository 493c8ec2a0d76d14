"""The data of a comparison: checked, and divided into a half that chooses and one that judges."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from adalayer_native.capture import GraphModel, Inputs
from adalayer_native.capture.loading import checked_batches
from adalayer_native.errors import CalibrationError, InputError

__all__ = ["Halves", "read"]

FEWEST = 4  # samples of a batch that is divided: two on either side, since some models take no one


@dataclass
class Halves:
    """Samples as arguments of the model, in batches.

    Attributes:
        choosing: what the table is measured on, and suggestions are chosen by.
        judging: what their effect is measured on; empty where all data goes into the table.
    """

    choosing: list[Inputs]
    judging: list[Inputs]

    @property
    def counts(self) -> tuple[int, int]:
        """Samples on either side."""
        return sum(x.count for x in self.choosing), sum(x.count for x in self.judging)


def read(model: GraphModel, data: Iterable[Any], samples: int, divide: bool) -> Halves:
    """Read at most so many samples; labels are left out.

    Of every batch every second sample judges, so that both halves have what the data has, in
    whatever order it comes; batches of fewer than 4 samples go to the sides in turn.

    Raises:
        CalibrationError: no sample, NaN or infinity, a batch of another kind, size or type; names
            the batch.
    """
    found = Halves([], [])
    room = samples
    fewest = 1 if model.signature.single else 2
    for index, x, _ in checked_batches(data, model, what="comparison"):
        if room < fewest:
            break
        x = x[:room]
        try:
            leaves = model.signature.leaves(x.args, x.kwargs)
            model.signature.check(leaves)
        except InputError as error:
            raise CalibrationError(
                f"comparison batch {index} does not fit the model: {error}"
            ) from None
        room -= x.count
        if not divide:
            found.choosing.append(x)
        elif x.count >= FEWEST:
            found.choosing.append(x[slice(0, None, 2)])
            found.judging.append(x[slice(1, None, 2)])
        else:
            counts = found.counts
            (found.choosing if counts[0] <= counts[1] else found.judging).append(x)
    if not found.choosing:
        raise CalibrationError(
            "the data is empty: expected at least one sample"
            if room == samples
            else f"the model takes no batch of one sample: expected at least 2, got {samples}"
        )
    return found
