"""The CUDA library: finding and loading it, its structs, its errors.

Declarations mirror ``csrc/cuda/adalayer_cuda.h``.
"""

from __future__ import annotations

import ctypes
import os
import threading
from ctypes import (
    POINTER,
    Structure,
    c_char,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

import torch

from adalayer_native.errors import DeviceError, FileFormatError, InputError

__all__ = [
    "Device",
    "Info",
    "NodeProfile",
    "Options",
    "available",
    "check",
    "device_index",
    "library",
    "stream_number",
    "why_unavailable",
]

_NAME = "libadalayer_cuda.so"
_INVALID, _CORRUPT, _OUT_OF_MEMORY = -2, -3, -4


class Device(Structure):
    """AdalayerCudaDevice."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("name", c_char * 256),
        ("compute_major", c_int32),
        ("compute_minor", c_int32),
        ("multiprocessors", c_int32),
        ("shared_bytes", c_int32),
        ("memory_bytes", c_uint64),
    )


class Options(Structure):
    """AdalayerCudaOptions."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("flags", c_uint32),
        ("choice", c_int32),
        ("images_per_pass", c_int64),
        ("on_grid", c_int32),
        ("grid_scale", c_float),
        ("grid_zero_point", c_int32),
        ("grid_qmax", c_int32),
    )


class Info(Structure):
    """AdalayerCudaInfo."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("nodes", c_int64),
        ("weight_bytes", c_int64),
        ("image_bytes", c_int64),
        ("arena_bytes", c_int64),
        ("most_images", c_int64),
    )


class NodeProfile(Structure):
    """AdalayerCudaNodeProfile."""

    _fields_ = (("microseconds", c_double), ("kernel", c_char * 64))


_SIGNATURES: dict[str, list[object]] = {
    "adalayer_cuda_device_count": [POINTER(c_int)],
    "adalayer_cuda_device_info": [c_int, POINTER(Device)],
    "adalayer_cuda_engine_create": [
        c_void_p,
        c_size_t,
        c_int,
        POINTER(Options),
        POINTER(c_void_p),
    ],
    "adalayer_cuda_engine_run": [
        c_void_p,
        POINTER(c_void_p),
        POINTER(c_uint8),
        c_int64,
        POINTER(c_void_p),
        c_uint64,
    ],
    "adalayer_cuda_layer_run": [
        c_void_p,
        c_void_p,
        c_uint8,
        c_int64,
        c_void_p,
        c_void_p,
        c_uint8,
        c_uint64,
    ],
    "adalayer_cuda_engine_info": [c_void_p, POINTER(Info)],
    "adalayer_cuda_engine_profile": [c_void_p, c_int64, c_int, POINTER(NodeProfile)],
    "adalayer_cuda_quantize": [
        c_void_p,
        c_int64,
        c_float,
        c_int32,
        c_int32,
        c_int,
        c_void_p,
        c_int,
        c_uint64,
    ],
    "adalayer_cuda_linear_create": [
        c_void_p,
        c_size_t,
        c_void_p,
        c_void_p,
        c_int,
        POINTER(c_void_p),
    ],
    "adalayer_cuda_linear_run": [c_void_p, c_void_p, c_int64, c_int, c_void_p, c_uint64],
}

_lock = threading.Lock()
_loaded: ctypes.CDLL | None = None


def _path() -> Path:
    named = os.environ.get("ADALAYER_CUDA_LIBRARY")
    return Path(named) if named else Path(__file__).resolve().parent.parent / _NAME


def library() -> ctypes.CDLL:
    """The library, loaded once. ``ADALAYER_CUDA_LIBRARY`` names another file than the package's.

    Raises:
        DeviceError: the package was built without it, or it cannot be loaded.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            path = _path()
            if not path.is_file():
                raise DeviceError(
                    f"this build has no CUDA kernels ({path.name} is missing); build with "
                    "ADALAYER_CUDA=1 pip install ."
                )
            try:
                found = ctypes.CDLL(os.fspath(path))
            except OSError as error:
                raise DeviceError(f"the CUDA kernels cannot be loaded: {error}") from error
            for name, arguments in _SIGNATURES.items():
                function = getattr(found, name)
                function.argtypes = arguments
                function.restype = c_int
            found.adalayer_cuda_last_error.restype = ctypes.c_char_p
            found.adalayer_cuda_engine_destroy.argtypes = [c_void_p]
            found.adalayer_cuda_engine_destroy.restype = None
            found.adalayer_cuda_linear_destroy.argtypes = [c_void_p]
            found.adalayer_cuda_linear_destroy.restype = None
            _loaded = found
        return _loaded


def check(code: int, what: str) -> None:
    """Raises what a code of the library means.

    Raises:
        InputError: an argument out of range. FileFormatError: damaged weights or programs.
        DeviceError: everything that the device refuses. MemoryError: no memory left.
    """
    if code == 0:
        return
    text = library().adalayer_cuda_last_error()
    message = f"{what}: {text.decode(errors='replace') if text else f'error {code}'}"
    if code == _INVALID:
        raise InputError(message)
    if code == _CORRUPT:
        raise FileFormatError(message)
    if code == _OUT_OF_MEMORY:
        raise MemoryError(message)
    raise DeviceError(message)


def why_unavailable() -> str | None:
    """Why nothing can run on a GPU here, or None where it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        library()
    except DeviceError as error:
        return str(error)
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the device has compute capability {major}.{minor}; the kernels need 8.0 or newer"
    return None


def available() -> bool:
    """Whether the library and a GPU that can run it are here."""
    return why_unavailable() is None


def device_index(device: str | int | torch.device) -> int:
    """Number of a CUDA device; ``"cuda"`` is the current one.

    Raises:
        DeviceError: it is no CUDA device, or there is none of that number.
    """
    named = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if named.type != "cuda":
        raise DeviceError(f"expected a CUDA device, got {named}")
    reason = why_unavailable()
    if reason is not None:
        raise DeviceError(f"{named}: {reason}")
    index = torch.cuda.current_device() if named.index is None else named.index
    if index >= torch.cuda.device_count():
        raise DeviceError(f"there is no device {named} (there are {torch.cuda.device_count()})")
    return index


def stream_number(device: int) -> int:
    """The current stream of torch, as the library takes it."""
    return int(torch.cuda.current_stream(device).cuda_stream)
