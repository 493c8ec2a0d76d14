"""Checkpoints of a repair: the layers that are done, one safetensors file, replaced as a whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from adalayer_native._checkpoint import read_checkpoint, write_checkpoint
from adalayer_native.errors import FileFormatError

__all__ = ["load", "save"]

_KIND = ("adalayer-repair", "1")

# Of one layer: weight, weight_scale, mask, bias, running_mean, as far as they exist.
LayerState = dict[str, Tensor]


def save(
    path: str | os.PathLike[str],
    identity: str,
    states: dict[str, LayerState],
    reports: list[dict[str, Any]],
) -> None:
    """Write what is done; an interruption leaves the previous file.

    Args:
        path: file to write.
        identity: hash of what the run depends on.
        states: tensors of every layer that is done.
        reports: one entry per layer, JSON values, with its ``"name"``; in the order of the run.
    """
    tensors = {
        f"{key}/{name}": value for name, state in states.items() for key, value in state.items()
    }
    write_checkpoint(path, _KIND, identity, tensors, layers=json.dumps(reports))


def load(
    path: str | os.PathLike[str], identity: str
) -> tuple[dict[str, LayerState], list[dict[str, Any]]]:
    """What :func:`save` wrote; nothing if there is no such file yet.

    Raises:
        FileFormatError: the file is not a checkpoint, is corrupt, or belongs to another run.
    """
    if not Path(path).exists():
        return {}, []
    with read_checkpoint(path, _KIND) as (metadata, handle):
        if metadata.get("identity") != identity:
            raise FileFormatError(
                f"checkpoint {os.fspath(path)!r} belongs to another repair: the model, the plan, "
                "the calibration data or the options differ (a loader that shuffles gives other "
                "data each time). Delete it to start again, or name another file"
            )
        reports = json.loads(metadata["layers"])
        states: dict[str, LayerState] = {entry["name"]: {} for entry in reports}
        for stored in handle.keys():  # noqa: SIM118
            key, _, name = stored.partition("/")
            states[name][key] = handle.get_tensor(stored)
    return states, reports
