"""Accuracy and time of models, measured the same way everywhere."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native._progress import ProgressBar
from adalayer_native.capture import Inputs, batch_inputs
from adalayer_native.energy import EnergyUse, Meter
from adalayer_native.errors import CalibrationError
from adalayer_native.importance.batches import tokens_of
from adalayer_native.importance.outputs import Pick, logits_of

__all__ = [
    "Hits",
    "Timing",
    "accuracy",
    "hits",
    "inference_energy",
    "interleaved",
    "model_milliseconds",
]


@dataclass(frozen=True)
class Hits:
    """Right answers, by the number of the class.

    Attributes:
        right: of the images of each class, those that the model named so.
        seen: images of each class.
    """

    right: tuple[int, ...]
    seen: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy over all of them in percent."""
        return 100 * sum(self.right) / sum(self.seen)


def accuracy(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    output: Pick = None,
    title: str = "measuring",
    progress: bool = True,
) -> float:
    """Top-1 accuracy in percent over batches with class labels, in inference mode.

    Args:
        model: float or native.
        loader: batches as for ``analyze``; a label below 0 does not count.
        output: which output holds the logits, where the rules of
            :mod:`~adalayer_native.importance.outputs` would take another one.
        title: of the progress bar.
        progress: show one.

    Raises:
        CalibrationError: an empty loader, batches without labels, or no logits.
    """
    return hits(model, loader, output=output, title=title, progress=progress).accuracy


def hits(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    output: Pick = None,
    title: str = "measuring",
    progress: bool = True,
) -> Hits:
    """Right answers class by class; arguments and errors are those of :func:`accuracy`."""
    was_training = model.training
    model.eval()
    right = seen = torch.zeros(0, dtype=torch.int64)
    steps = len(loader) if hasattr(loader, "__len__") else None  # type: ignore[arg-type]
    try:
        with torch.inference_mode(), ProgressBar(title, steps, unit="batch", enabled=progress) as b:
            for batch in loader:
                x, y = batch_inputs(model, batch)
                if not isinstance(y, Tensor):
                    raise CalibrationError("accuracy needs batches with class labels")
                out = _channels_last(x)(model)
                answers = logits_of(out, output, tokens_of(x), y).argmax(1)
                right = _counted(right, y[(answers == y) & (y >= 0)])
                seen = _counted(seen, y[y >= 0])
                b.advance(note=f"{100 * int(right.sum()) / max(1, int(seen.sum())):.2f} %")
    finally:
        model.train(was_training)
    if not int(seen.sum()):
        raise CalibrationError("accuracy needs at least one image, the loader is empty")
    return Hits(tuple(_counted(right, seen[:0], len(seen)).tolist()), tuple(seen.tolist()))


def _counted(counts: Tensor, labels: Tensor, least: int = 0) -> Tensor:
    """Counts by class, and those of more labels added."""
    more = torch.bincount(labels.flatten().cpu(), minlength=max(least, len(counts)))
    more[: len(counts)] += counts
    return more


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate."""

    median: float
    lowest: float
    samples: int


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, warmup: int = 3
) -> dict[str, Timing]:
    """Times several callables in turn in one process, so that all see the same neighbours.

    Every timed call follows an untimed one of the same callable: its own caches, not another's.

    Args:
        seconds: how long to go on in all; every candidate is run at least 5 times.
    """
    for run in candidates.values():
        for _ in range(warmup):
            run()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(next(iter(samples.values()))) < 5:
        for name, run in candidates.items():
            run()
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    return {
        name: Timing(statistics.median(values), min(values), len(values))
        for name, values in samples.items()
    }


def model_milliseconds(
    models: Mapping[str, Callable[..., Any]], x: Any, *, seconds: float = 2.0
) -> dict[str, float]:
    """Median milliseconds per call of each model or engine on ``x`` (channels_last), interleaved.

    ``x`` is a tensor, a tuple or a dictionary of arguments.
    """
    inputs = _channels_last(Inputs.of(x))
    with torch.inference_mode():

        def runner(model: Callable[..., Any]) -> Callable[[], Any]:
            if isinstance(model, nn.Module):
                model.eval()
            return lambda: inputs(model)

        times = interleaved({k: runner(m) for k, m in models.items()}, seconds=seconds)
    return {name: 1000 * t.median for name, t in times.items()}


def inference_energy(
    models: Mapping[str, nn.Module],
    x: Any,
    *,
    seconds: float = 5.0,
    country: str | None = None,
    images: float = 1000.0,
) -> dict[str, EnergyUse]:
    """What each model uses for so many images: it runs on ``x`` again and again for ``seconds``.

    The machine's own use while it runs is in it, as it would be in service.

    Raises:
        MissingExtraError: see :class:`~adalayer_native.energy.Meter`.
    """
    inputs = _channels_last(Inputs.of(x))
    found = {}
    with torch.inference_mode():
        for name, model in models.items():
            model.eval()
            inputs(model)
            seen = 0
            with Meter(country=country) as meter:
                deadline = time.monotonic() + seconds
                while seen == 0 or time.monotonic() < deadline:
                    inputs(model)
                    seen += inputs.count
            found[name] = meter.use.per(seen / images)
    return found


def _channels_last(x: Inputs) -> Inputs:
    """Images in the layout in which they are fastest on a CPU."""
    return x.map(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t)
