"""What running a study means, whatever it measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..energy import Meter
from ..errors import PlanError
from .folder import Study
from .splits import Images

__all__ = ["StudySettings", "run_study"]


@dataclass
class StudySettings:
    """Arguments of every ``adalayer study``; see its help.

    Attributes:
        data: folder or zip of images, or ``"digits"``.
        out: output directory.
        dataset: ``"cifar10"`` or ``"cifar100"``; of the data ``"digits"`` always that.
        batch_size: of training.
        seeds: of everything that is drawn.
        minutes: until a clean stop; ``None``: no limit.
        threads: ``None``: torch's.
        only: one part of the study, its timing (anew) or ``"report"``; ``None``: what is missing.
        country: whose electricity.
        energy: whether to meter energy.
        memory: whether to measure peak memory in processes of their own.
        seconds: per timing.
        image_size: pixels per side.
        progress: show progress.
    """

    data: str
    out: Path
    dataset: str = "cifar10"
    batch_size: int = 128
    seeds: Sequence[int] = (0, 1)
    minutes: float | None = None
    threads: int | None = None
    only: str | None = None
    country: str = "ITA"
    energy: bool = True
    memory: bool = True
    seconds: float = 10.0
    image_size: int = 32
    progress: bool = True

    def __post_init__(self) -> None:
        if self.data == "digits":  # tables and pages are about them, whatever the default is
            self.dataset = "digits"


def run_study(
    name: str,
    settings: StudySettings,
    shared: dict[str, Any],
    wanted: dict[str, Any],
    work: Callable[[Study, Images], None],
    missing: Callable[[dict[str, Any]], list[str]],
) -> dict[str, Any]:
    """Open the study in its directory, do what is missing, write down what still is.

    Args:
        shared: what every piece must agree on.
        wanted: what the study is to hold in the end.
        work: does it.
        missing: what is wanted and not done, from the study's data.

    Raises:
        AdaError: other data or settings than the study was begun with, a missing extra. OSError:
            the output cannot be written.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
        ops.set_num_threads(settings.threads)
    study = Study.open(settings.out, name, shared, wanted)
    if settings.only != "report":
        if settings.energy:
            Meter(country=settings.country)  # a missing extra shows now, not after an epoch
        images = Images(settings.data, settings.dataset, settings.image_size, settings.progress)
        known = study.data.setdefault("images", images.describe())
        if known != images.describe():
            raise PlanError(
                f"study {str(settings.out)!r} was begun with other data: {known} there, "
                f"{images.describe()} here"
            )
        study.data["threads"] = torch.get_num_threads()
        work(study, images)
    study.data["missing"] = missing(study.data)
    study.save()
    return study.data
