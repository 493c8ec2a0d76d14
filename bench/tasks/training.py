"""Training of the three float networks; each is kept under ``build/`` and resumed if halfway.

The classifier comes first. Detector and segmenter begin with its backbone, as such networks do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adalayer_native.training import fit
from bench.record import ROOT
from bench.tasks.losses import classification_loss, detection_loss, segmentation_loss
from bench.tasks.networks import Classifier, Detector, Segmenter
from bench.tasks.scenes import CLASSES, SIZE, SceneBatches, Sources

__all__ = ["FOLDER", "TASKS", "Task", "trained"]

FOLDER = ROOT / "build" / "bench" / "tasks"
BATCH = 64
STEPS = 50  # per epoch
RATE, DECAY = 3e-3, 0.02  # of AdamW


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        name: of the task.
        make: the network.
        loss: ``loss(output, target)``, one value per image.
        epochs: of :data:`STEPS` batches.
    """

    name: str
    make: Callable[[], nn.Module]
    loss: Callable[..., Tensor]
    epochs: int


TASKS = {
    task.name: task
    for task in (
        Task("classification", lambda: Classifier(len(CLASSES)), classification_loss, 10),
        Task("detection", lambda: Detector(len(CLASSES), SIZE), detection_loss, 14),
        Task("segmentation", lambda: Segmenter(1 + len(CLASSES)), segmentation_loss, 6),
    )
}


def trained(
    task: Task, data: Path, folder: Path = FOLDER, *, max_minutes: float | None = None
) -> nn.Module:
    """The trained network of a task, in evaluation mode; trains it if it is not there.

    Args:
        task: one of :data:`TASKS`.
        data: folder with ``cifar10.zip``.
        folder: where networks and checkpoints are kept.
        max_minutes: of training; the learning rate then falls to 0 by the end of them.
    """
    torch.manual_seed(0)
    model = task.make()
    path = folder / f"{task.name}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    if task.name != "classification":
        classifier = trained(TASKS["classification"], data, folder, max_minutes=max_minutes)
        backbone = classifier.get_submodule("backbone").state_dict()
        model.get_submodule("backbone").load_state_dict(backbone)
    folder.mkdir(parents=True, exist_ok=True)
    fit(
        model,
        SceneBatches(Sources.open(data, "train"), task.name, BATCH, STEPS),
        task.epochs,
        loss_fn=task.loss,
        lr=RATE,
        optimizer="adamw",
        weight_decay=DECAY,
        ema=0.99,
        amp=False,
        checkpoint=folder / f"{task.name}.checkpoint.safetensors",
        max_minutes=max_minutes,
    )
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    temporary = path.with_suffix(".tmp")
    save_file(state, temporary)
    temporary.replace(path)
    return model.eval()
