"""What running a study means, whatever it measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import ops
from ..energy import Meter
from ..errors import PlanError
from .images import Images
from .settings import StudySettings
from .store import Study

__all__ = ["run_study"]


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
