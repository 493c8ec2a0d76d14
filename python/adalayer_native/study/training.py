"""Training of one configuration of the second paper, and what is measured meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..data import Batches
from ..energy import Meter
from ..measure import accuracy
from ..quantization import calibrate, prepare
from ..training import History, Watch, finetune, fit, narrow_for_ranges
from .configurations import Configuration, plan_of
from .folder import Clock

__all__ = ["RunWatch", "prepared_of", "train"]


def prepared_of(model: nn.Module, chosen: Configuration, data: Iterable[Any]) -> nn.Module:
    """The model to train: itself in full precision, else its simulation with calibrated ranges.

    Where widths change over time, ranges are chosen for the fewest bits, a step follows the number
    of its levels, and what is best is learned.

    Args:
        model: float network.
        chosen: configuration.
        data: batches to calibrate on.
    """
    plan = plan_of(model, chosen)
    if plan is None:
        return model
    prepared: nn.Module = prepare(model, plan)
    if chosen.time is not None:
        narrow_for_ranges(prepared, chosen.time)
    return calibrate(prepared, data, progress=False)


def train(
    model: nn.Module,
    chosen: Configuration,
    loader: Iterable[Any],
    epochs: int,
    *,
    lr: float,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    watch: Watch | None = None,
    progress: bool = True,
) -> History:
    """SGD with momentum 0.9 as in the paper; no decay, distillation, pruning or averaging.

    All configurations train in float32, so that their times compare. Scales of weights and
    activations are learned.

    Args:
        model: from :func:`prepared_of`; trained in place.
        chosen: its configuration.
        loader: training batches.
        epochs: passes.
        lr: peak of the learning rate, which rises over 3 % of the run and falls as a half cosine.
        seed, checkpoint, watch, progress: as for :func:`~adalayer_native.training.fit`.
    """
    common: dict[str, Any] = {
        "lr": lr, "momentum": 0.9, "weight_decay": 0.0, "ema": 0.0, "amp": False, "seed": seed,
        "checkpoint": checkpoint, "watch": watch, "progress": progress,
    }  # fmt: skip
    if chosen.depth is None:
        return fit(model, loader, epochs, **common)
    return finetune(
        model,
        loader,
        epochs,
        widths=chosen.dynamic or chosen.time,
        ramp=0.0,
        reestimate_norms=False,
        **common,
    )


class RunWatch(Watch):
    """Per epoch: test accuracy, energy and CO2; ends at a training accuracy, pauses on time.

    Args:
        test: test images of the curves.
        clock: when to pause.
        stop: training accuracy, 0 to 1, after whose first epoch the run ends; ``None``: never.
        first: the first epoch after which it may: what it ends with has to have been trained.
        country: whose electricity.
        energy: whether to meter.
    """

    def __init__(
        self,
        test: Batches,
        clock: Clock,
        *,
        stop: float | None = None,
        first: int = 1,
        country: str | None = None,
        energy: bool = True,
    ) -> None:
        self.test, self.clock, self.limit, self.first = test, clock, stop, first
        self.country, self.energy = country, energy
        self.meter: Meter | None = None

    def __enter__(self) -> RunWatch:
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.meter is not None:
            meter, self.meter = self.meter, None
            meter.__exit__(*error)  # type: ignore[arg-type]

    def _start(self) -> None:
        if self.energy:
            self.meter = Meter(country=self.country)
            self.meter.__enter__()

    def epoch(self, model: nn.Module, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Accuracy on the test images of the curves, and what the epoch used."""
        found: dict[str, Any] = {}
        if self.meter is not None:
            self.meter.__exit__(None, None, None)
            use = self.meter.use
            # What an interruption left unmetered of the epoch is counted like the rest of it.
            share = max(1.0, float(entry["seconds"]) / max(use.seconds, 1e-9))
            co2 = use.co2_grams
            found = {
                "joules": use.joules * share,
                "co2_grams": None if co2 is None else co2 * share,
                "metered_seconds": use.seconds,
                "energy_label": use.label,
            }
        found["test_accuracy"] = accuracy(model, self.test, progress=False)
        self._start()
        return found

    def pause(self) -> bool:
        """Whether the time is up."""
        return self.clock.over()

    def stop(self, entry: Mapping[str, Any]) -> bool:
        """Whether the training accuracy is reached."""
        over = self.limit is not None and entry["accuracy"] >= self.limit
        return over and entry["epoch"] >= self.first
