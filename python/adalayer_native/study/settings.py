"""What both studies are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["StudySettings"]


@dataclass
class StudySettings:
    """Arguments of every ``adalayer study``; see its help.

    Attributes:
        data: folder or zip of images, or ``"digits"``.
        out: output directory.
        dataset: ``"cifar10"`` or ``"cifar100"``.
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
