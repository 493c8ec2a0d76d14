"""What the jobs are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..allocation import Budget
from ..allocation.layer_table import BITS, SPARSITIES
from ..allocation.optimal_settings import BLOCKS, NARROW
from ..allocation.options import UNSTRUCTURED

__all__ = ["CompareJob", "CompileJob", "CompressJob", "ProfileJob", "TrainJob", "arguments"]


@dataclass(kw_only=True)
class _Job:
    """What the commands that look at images share: classes and normalisation, threads, a seed."""

    classes: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    scale: float | None = None
    seed: int = 0
    threads: int | None = None
    progress: bool = True


@dataclass
class CompressJob(_Job):
    """Arguments of ``adalayer compress``; see its help."""

    model: str
    weights: Path | None
    data: str
    out: Path
    budget: Budget | None
    method: str = "adalayer"
    levels: Sequence[float] | None = None
    layer_bits: Sequence[int] | None = None
    stages: Sequence[str] | None = None
    fixed: Mapping[str, int] | None = None
    exclude: Sequence[str] = ()
    epochs: int = 2
    lr: float = 0.01
    distill: bool = True
    repair: bool = True
    calibration: int = 512
    effort: str = "normal"
    image_size: int = 32
    batch_size: int = 128
    criterion: str | None = None
    latency_table: Path | None = None
    frontier: bool | None = None
    energy: bool = False
    country: str | None = None


@dataclass
class TrainJob(_Job):
    """Arguments of ``adalayer train``; see its help."""

    model: str
    data: str
    out: Path
    epochs: int
    lr: float = 0.1
    label_smoothing: float = 0.1
    weight_decay: float = 5e-4
    augment: bool = True
    image_size: int = 32
    batch_size: int = 128


@dataclass
class CompileJob(_Job):
    """Arguments of ``adalayer compile``; see its help."""

    source: Path
    output: Path | None = None
    model: str | None = None
    input_shape: Sequence[int] | None = None
    weights: str = "measured"
    batch: int = 1


@dataclass
class CompareJob(_Job):
    """Arguments of ``adalayer compare``; see its help. What is None is what the run says."""

    source: Path
    model: str | None = None
    weights: Path | None = None
    data: str | None = None
    out: Path | None = None
    picture: Path | None = None
    samples: int = 256
    suggest: bool = True
    task: Mapping[str, str] | None = None
    detection: str | None = None
    image_size: int | None = None


@dataclass
class ProfileJob:
    """Arguments of ``adalayer profile``; see its help."""

    model: str
    out: Path
    shapes: Path | None = None
    weights: Path | None = None
    input_shape: Sequence[int] = (3, 32, 32)
    classes: int = 10
    exclude: Sequence[str] = ()
    isa: str | None = None
    bits: tuple[int, ...] = BITS
    sparsities: tuple[float, ...] = SPARSITIES
    patterns: tuple[str, ...] = (UNSTRUCTURED, *BLOCKS)
    input_bits: tuple[int, ...] = NARROW
    batch: int = 1
    threads: int | None = None
    progress: bool = True


def arguments(job: CompressJob | TrainJob) -> dict[str, Any]:
    """The job as JSON values, for a reader of the work directory."""
    return {key: value if _plain(value) else str(value) for key, value in vars(job).items()}


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, dict))
