"""Checkpoints of a repair: the layers that are done, one safetensors file, replaced as a whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from adalayer_native._files import write_atomic
from adalayer_native.errors import FileFormatError

__all__ = ["load", "save"]

_FORMAT = "adalayer-repair"
_VERSION = "1"

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
    from safetensors.torch import save as serialise

    tensors = {
        f"{key}/{name}": value.cpu().contiguous()
        for name, state in states.items()
        for key, value in state.items()
    }
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "identity": identity,
        "layers": json.dumps(reports),
    }
    write_atomic(path, serialise(tensors, metadata))


def load(
    path: str | os.PathLike[str], identity: str
) -> tuple[dict[str, LayerState], list[dict[str, Any]]]:
    """What :func:`save` wrote; nothing if there is no such file yet.

    Raises:
        FileFormatError: the file is not a checkpoint, is corrupt, or belongs to another run.
    """
    from safetensors import SafetensorError, safe_open

    shown = os.fspath(path)
    if not Path(path).exists():
        return {}, []
    try:
        with safe_open(shown, framework="pt") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
                raise FileFormatError(
                    f"checkpoint {shown!r}: expected format {_FORMAT} version {_VERSION}, got "
                    f"{metadata.get('format')} version {metadata.get('version')}"
                )
            if metadata.get("identity") != identity:
                raise FileFormatError(
                    f"checkpoint {shown!r} belongs to another repair: the model, the plan, the "
                    "calibration data or the options differ (a loader that shuffles gives other "
                    "data each time). Delete it to start again, or name another file"
                )
            reports = json.loads(metadata["layers"])
            states: dict[str, LayerState] = {entry["name"]: {} for entry in reports}
            for stored in handle.keys():  # noqa: SIM118
                key, _, name = stored.partition("/")
                states[name][key] = handle.get_tensor(stored)
        return states, reports
    except FileFormatError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"checkpoint {shown!r} is corrupt ({type(error).__name__}: {error}); delete it to "
            "start again"
        ) from error
