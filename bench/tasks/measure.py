"""One row: a network compressed in one way, judged by its task's own figure on test scenes."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.allocation.size import float_bytes
from adalayer_native.detection import Boxes, Detection
from bench.tasks.metrics import Truth, confusion, mean_average_precision, mean_iou
from bench.tasks.scenes import CLASSES, MEAN, SIZE, STD, Scenes, Sources
from bench.tasks.training import FOLDER, TASKS, trained

__all__ = [
    "DETECTION",
    "LOSSES",
    "ROWS",
    "Row",
    "average_precisions",
    "detected",
    "measure",
    "saved",
]

CALIBRATION, TEST = 384, 1000  # scenes
BATCH = 32
# Which outputs of the detector are what; thresholds as for a figure over all scores.
DETECTION = Detection.from_dict(
    {"boxes": ["boxes0", "boxes1"], "scores": ["scores0", "scores1"], "score_threshold": 0.25}
)


def softmax_over_everything(output: Any, target: Any) -> Tensor:
    """What not to do with a detector: KL of one softmax over all of its numbers."""
    flat = [
        torch.cat([part.flatten(1) for part in found.values()], dim=1).log_softmax(dim=1)
        for found in (target, output)
    ]
    return (flat[0].exp() * (flat[0] - flat[1])).sum(dim=1)


# By what plans are judged: the loss of the training, with labels; what tells the outputs apart,
# without; what the library does unasked, without; and a warning.
LOSSES = {
    "task": "labels",
    "distilled": "no labels",
    "default": "no labels, nothing said",
    "softmax": "one softmax over all numbers",
}
DISTILLED = {
    "classification": ada.TaskLoss.of({"output": "classes"}),
    "detection": ada.TaskLoss.of_detection(DETECTION),
    "segmentation": ada.TaskLoss.of({"output": "classes"}),
}


@dataclass(frozen=True)
class Row:
    """How one network is compressed.

    Attributes:
        task: of :data:`~bench.tasks.training.TASKS`.
        bits: in every layer, or on average; 0: not at all.
        loss: of :data:`LOSSES`; empty: the same bits in every layer.
    """

    task: str
    bits: int
    loss: str = ""

    @property
    def name(self) -> str:
        """As files call it."""
        return "-".join([self.task, str(self.bits), *([self.loss] if self.loss else [])])


def _rows(task: str, *losses: str) -> list[Row]:
    searched = [Row(task, bits, loss) for bits in (4, 3) for loss in losses]
    return [Row(task, 0), Row(task, 8), Row(task, 4), Row(task, 3), *searched]


ROWS = (
    *_rows("classification", "task", "distilled"),
    *_rows("detection", "task", "distilled", "default", "softmax"),
    *_rows("segmentation", "task", "distilled"),
)


@cache
def scenes(data: Path, part: str, most: int) -> Scenes:
    """Calibration or test scenes."""
    count, seed = (CALIBRATION, 1) if part == "calibration" else (TEST, 2)
    return Scenes.drawn(Sources.open(data, part), count, seed, most)


def _scenes_of(task: str, data: Path, part: str) -> Scenes:
    return scenes(data, part, 1 if task == "classification" else 3)


def measure(row: Row, data: Path, folder: Path = FOLDER) -> dict[str, Any]:
    """Figures, bytes of the packed file, bits per layer and what the plan protects."""
    task = TASKS[row.task]
    model = trained(task, data, folder)
    if not row.bits:
        return {"figures": figures(row.task, model, data), "bytes": float_bytes(model)}
    begin = time.monotonic()
    result = _compressed(row, model, data, folder)
    seconds = time.monotonic() - begin
    program = folder / "engines" / f"{row.name}.ada"  # kept: it can be served
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        packed = Path(temporary) / "packed.safetensors"
        ada.save(result.model, packed)
        saved(row.task, result.model, program)
        engine = ada.load(program)
        found = {
            "figures": figures(row.task, engine, data),
            "bytes": packed.stat().st_size,
            "engine": all(layer.kernel for layer in engine.coverage(rounds=0)),
        }
    plan = result.plan
    return found | {
        "seconds": round(seconds),
        "average_bits": plan.average_bits,
        "bits": {name: layer.bits for name, layer in plan.layers.items()},
        "weights": {name: layer.params for name, layer in plan.layers.items()},
        "need": {name: score.get("E_even") for name, score in (plan.scores or {}).items()},
        "protected": plan.protected(),
    }


def _compressed(row: Row, model: nn.Module, data: Path, folder: Path) -> ada.Compressed:
    shown = _scenes_of(row.task, data, "calibration")
    pairs = list(zip(shown.images.split(BATCH), shown.targets(row.task).split(BATCH), strict=True))
    labelled = row.loss == "task"
    losses: dict[str, Callable[..., Tensor] | None] = {
        "task": TASKS[row.task].loss,
        "softmax": softmax_over_everything,
        "default": None,
    }
    loss = losses.get(row.loss, DISTILLED[row.task])
    budget = ada.Budget(bits=row.bits) if row.loss else row.bits
    options = {"options": {"sparsities": (0.0,)}} if row.loss else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="output of the model")  # that is the row's point
        return ada.compress(
            model,
            pairs if labelled else [x for x, _ in pairs],
            budget,
            method="optimal",
            loss_fn=loss,
            effort="low",
            allocate_options=options,
            work_dir=folder / "work" / row.task,
            progress=False,
        )


def saved(task: str, native: nn.Module, path: Path) -> ada.Engine:
    """The compiled engine, with all that a server needs to know in its file."""
    x = torch.zeros(1, 3, SIZE, SIZE)
    engine = ada.compile(native, x, policy="native", strict=True)
    engine.save(
        path,
        preprocessing={"mean": [MEAN] * 3, "std": [STD] * 3},
        class_names=CLASSES if task != "segmentation" else ("background", *CLASSES),
        detection=DETECTION if task == "detection" else None,
    )
    return engine


@torch.no_grad()
def figures(task: str, network: Callable[[Tensor], Any], data: Path) -> dict[str, float]:
    """What the task is judged by, from 0 to 100."""
    if task == "detection":
        return average_precisions(*detected(network, data))
    shown = _scenes_of(task, data, "test")
    outputs = [network(x) for x in shown.images.split(BATCH)]
    if task == "classification":
        right = torch.cat(outputs).argmax(dim=1) == shown.targets(task)
        return {"accuracy": 100 * float(right.float().mean())}
    masks = torch.cat([y.argmax(dim=1) for y in outputs])
    counts = confusion(shown.masks.numpy(), masks.numpy(), 1 + len(CLASSES))
    return {"mIoU": 100 * mean_iou(counts)}


@torch.no_grad()
def detected(network: Callable[[Tensor], Any], data: Path) -> tuple[list[Boxes], list[Truth]]:
    """What a detector finds in the test scenes, weak boxes too, and what is there."""
    shown = _scenes_of("detection", data, "test")
    every = DETECTION.changed(score_threshold=0.01)
    found = [boxes for x in shown.images.split(BATCH) for boxes in every(network(x))]
    there = [rows[rows[:, 0] >= 0] for rows in shown.boxes.numpy()]
    return found, [Truth(rows[:, 1:], rows[:, 0].astype(np.int64)) for rows in there]


def average_precisions(found: list[Boxes], truth: list[Truth]) -> dict[str, float]:
    """AP50 and AP, from 0 to 100."""
    values = mean_average_precision(found, truth, len(CLASSES))
    return {"AP50": 100 * values[0.5], "AP": 100 * float(np.mean(list(values.values())))}
