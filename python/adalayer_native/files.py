"""The packed model file: a safetensors file of the native model's ``state_dict``."""

from __future__ import annotations

import os
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn

from adalayer_native import ops
from adalayer_native._files import require_file, write_atomic
from adalayer_native.errors import FileFormatError

__all__ = ["ENGINE", "PACKED", "describe", "kind_of", "save"]

ENGINE, PACKED = "engine", "packed model"  # the two kinds of files that we write
_ADA_MAGIC = b"\x89ADA\r\n\x1a\n"


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """``ENGINE`` for an ``.ada`` file, ``PACKED`` for one of safetensors, ``None`` for others.

    By what it begins with, whatever it is called.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError:
        return None
    if start.startswith(_ADA_MAGIC):
        return ENGINE
    # The length of a JSON object, and its beginning.
    length = int.from_bytes(start[:8], "little")
    return PACKED if start[8:9] == b"{" and length <= os.path.getsize(path) - 8 else None


def save(native: nn.Module, path: str | os.PathLike[str]) -> int:
    """Writes a converted model's tensors: packed weights, scales, biases, grids, and float layers.

    The file is complete or absent: it is written under a temporary name and renamed. Read it back
    with :func:`adalayer_native.restore`.

    Returns:
        Bytes of the file.

    Raises:
        OSError: the directory is not writable or the disk is full; nothing is left behind.
    """
    data = serialize({k: v.resolve_neg().contiguous() for k, v in native.state_dict().items()})
    write_atomic(path, data)
    return len(data)


def describe(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """One entry per native layer of a packed model file, then one for all other tensors.

    Native entries hold name, kind, shape, params, bits, encoding, nonzero (fraction stored),
    bytes (of all its tensors) and input_bits; the last one ``{"name": None, "bytes": …}``.

    Raises:
        FileFormatError: missing, truncated or damaged file, or one without native layers.
    """
    require_file(path)
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path}: not a readable safetensors file ({error})") from None
    layers: list[dict[str, Any]] = []
    used: set[str] = set()
    for key in tensors:
        if not key.endswith(".weight_packed"):
            continue
        name = key.removesuffix(".weight_packed")
        try:
            info = ops.packed_info(tensors[key])
        except FileFormatError as error:
            raise FileFormatError(f"{path}: {key}: {error}") from None
        own = [f"{name}.{part}" for part in ("weight_packed", "weight_scale", "bias")]
        own.append(f"{name}.input_qparams")
        missing = [k for k in own if k not in tensors]
        if missing:
            raise FileFormatError(f"{path}: layer {name!r} lacks {', '.join(missing)}")
        used.update(own)
        out_channels, group_in, kernel_h, kernel_w = info["shape"]
        params = out_channels * group_in * kernel_h * kernel_w
        layers.append(
            {
                "name": name,
                "shape": [out_channels, group_in, kernel_h, kernel_w],
                "params": params,
                "bits": info["bits"],
                "encoding": info["encoding"],
                "nonzero": info["stored"] / params,
                "bytes": sum(tensors[k].nbytes for k in own),
                "input_bits": int(tensors[own[3]][2]),
            }
        )
    if not layers:
        raise FileFormatError(f"{path}: holds no packed layers; is it a float model?")
    rest = sum(t.nbytes for k, t in tensors.items() if k not in used)
    return [*layers, {"name": None, "bytes": rest}]
