"""Checkpoints of a training run: one safetensors file, replaced as a whole, no pickle.

Tensors are stored as ``model.<key>``, ``optimizer.<parameter>.<state>``, ``average.<parameter>``
and ``rng``; everything else (where the run stands, its history) is JSON in the file's metadata.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native._checkpoint import read_checkpoint, write_checkpoint
from adalayer_native.training.average import Average

_KIND = ("adalayer-training", "2")


@dataclass
class Progress:
    """Where a run stands: ``step`` batches of ``epoch`` are done.

    Attributes:
        epoch: epochs completed.
        step: batches of the present epoch completed.
        seconds: training time so far, over all starts of the run.
        loss: sum of sample losses in the present epoch.
        correct: correctly classified samples in the present epoch.
        labelled: samples with a label in the present epoch.
        samples: samples in the present epoch.
        ended: the time limit is reached; no step follows.
        finished: the run is complete.
        stage: of the compression schedule.
        width: position in the schedule of widths.
        dynamic: state of widths that follow statistics.
        choice: bits and zeros that were learned, once they are whole.
        averaged: steps in the moving average.
        history: one entry per completed epoch.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    correct: int = 0
    labelled: int = 0
    samples: int = 0
    ended: bool = False
    finished: bool = False
    stage: int = -1
    width: int = -1
    dynamic: dict[str, Any] | None = None
    choice: dict[str, Any] | None = None
    averaged: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average,
    progress: Progress,
    identity: str,
) -> None:
    """Write the state of a run; an interruption leaves the previous file."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
    tensors |= {f"average.{name}": value for name, value in average.values.items()}
    progress.averaged = average.steps
    tensors["rng"] = torch.get_rng_state()
    texts = {"progress": json.dumps(asdict(progress))}
    write_checkpoint(path, _KIND, identity, tensors, **texts)


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average,
    identity: str,
) -> tuple[Progress, Tensor] | None:
    """Restore a run into ``model``, ``optimizer`` and ``average``.

    Returns:
        Where it stands and the random state, or ``None`` if the file belongs to another run
        (other options, plan, data seed or initial weights); nothing is changed then.

    Raises:
        FileFormatError: the file cannot be read or is not a checkpoint.
    """
    with read_checkpoint(path, _KIND) as (metadata, handle):
        if metadata.get("identity") != identity:
            return None
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        progress = Progress(**json.loads(metadata["progress"]))
        model.load_state_dict(_part(tensors, "model."))
        average.load(_part(tensors, "average."), progress.averaged)
        rng: Tensor = tensors["rng"]
        parameters = dict(model.named_parameters())
        for key, value in _part(tensors, "optimizer.").items():
            name, _, entry = key.rpartition(".")
            parameter = parameters[name]
            if value.dim() == parameter.dim() and value.dim():
                # Same memory layout as the parameter, or sums could be ordered differently.
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            optimizer.state[parameter][entry] = value
    return progress, rng


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
