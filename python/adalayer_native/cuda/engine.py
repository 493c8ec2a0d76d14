"""A program of the engine on one GPU."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import c_uint8, c_void_p

from adalayer_native import _C
from adalayer_native.cuda.library import (
    Info,
    NodeProfile,
    Options,
    check,
    library,
    stream_number,
)

__all__ = ["CudaEngine"]

_NO_GRAPH, _NO_OVERLAP, _TUNE = 1, 2, 4


class CudaEngine:
    """A :class:`_C.Program` made ready for a GPU; safe to call from many threads.

    Args:
        program: what to run; its bytes cross to the library as an ``.ada`` file has them.
        device: number of the GPU.
        graph: run a batch as one CUDA graph. overlap: let a kernel start before the one in front of
            it has ended, where the hardware can.
        tune: measure the convolution kernels when a batch size is first seen (results are the same
            bits whichever is taken).
        choice: number of the kernel that every product takes, for tests; -1 chooses.
        images_per_pass: larger batches run in parts; 0 is as many as fit 32-bit offsets.
        grid: (scale, zero point, qmax) onto which the output of a single layer is rounded.

    Raises:
        DeviceError, FileFormatError, InputError, MemoryError: see :func:`library.check`.
    """

    def __init__(
        self,
        program: _C.Program,
        device: int,
        *,
        graph: bool = True,
        overlap: bool = True,
        tune: bool = True,
        choice: int = -1,
        images_per_pass: int = 0,
        grid: tuple[float, int, int] | None = None,
    ) -> None:
        options = Options()
        options.struct_size = ctypes.sizeof(Options)
        options.flags = (
            (0 if graph else _NO_GRAPH) | (0 if overlap else _NO_OVERLAP) | (_TUNE if tune else 0)
        )
        options.choice = choice
        options.images_per_pass = images_per_pass
        if grid is not None:
            options.on_grid = 1
            options.grid_scale, options.grid_zero_point, options.grid_qmax = grid
        data = program.to_bytes()
        handle = c_void_p()
        found = library()
        check(
            found.adalayer_cuda_engine_create(
                data, len(data), device, ctypes.byref(options), ctypes.byref(handle)
            ),
            f"cuda:{device}",
        )
        self.device = device
        self._handle = handle
        self._run = found.adalayer_cuda_engine_run
        self._layer_run = found.adalayer_cuda_layer_run
        self._names = [(name, op) for op, name, *_ in program.nodes()]
        self._any_order = _any_order(program)
        self._finalizer = weakref.finalize(self, found.adalayer_cuda_engine_destroy, handle)

    def any_order(self) -> list[bool]:
        """Whether each input may be NHWC."""
        return self._any_order

    def run(
        self, inputs: Sequence[int], nhwc: Sequence[bool], batch: int, outputs: Sequence[int]
    ) -> None:
        """Enqueues one batch on torch's current stream; addresses are device memory of float32."""
        code = self._run(
            self._handle,
            (c_void_p * len(inputs))(*inputs),
            (c_uint8 * len(nhwc))(*nhwc),
            batch,
            (c_void_p * len(outputs))(*outputs),
            stream_number(self.device),
        )
        check(code, f"cuda:{self.device}")

    def run_layer(
        self,
        x: int,
        nhwc: bool,
        batch: int,
        residual: int,
        out: int,
        out_nhwc: bool,
    ) -> None:
        """Enqueues a program that is one layer; ``residual`` is 0 or the address of an addend."""
        code = self._layer_run(
            self._handle,
            x,
            nhwc,
            batch,
            residual,
            out,
            out_nhwc,
            stream_number(self.device),
        )
        check(code, f"cuda:{self.device}")

    def info(self) -> Info:
        """Sizes on the device."""
        found = Info()
        found.struct_size = ctypes.sizeof(Info)
        check(
            library().adalayer_cuda_engine_info(self._handle, ctypes.byref(found)),
            f"cuda:{self.device}",
        )
        return found

    def weight_bytes(self) -> int:
        """Bytes of the packed weights on the device."""
        return int(self.info().weight_bytes)

    def profile(
        self, batch: int, threads: int, rounds: int
    ) -> list[tuple[str, str, str, int, int, int, int, float, str]]:
        """As ``_C.Engine.profile``: every node by itself, median microseconds; ``threads`` is not
        used, and sizes and bits are 0."""
        found = (NodeProfile * len(self._names))()
        check(
            library().adalayer_cuda_engine_profile(self._handle, batch, rounds, found),
            f"cuda:{self.device}",
        )
        return [
            (name, op, kernel, 0, 0, 0, 0, float(entry.microseconds), _why(kernel))
            for (name, op), entry in zip(self._names, found, strict=True)
            for kernel in (entry.kernel.decode(),)
        ]


def _why(kernel: str) -> str:
    """What a kernel's name says about the zeros of its weights."""
    if " 2:4" in kernel:
        return "2:4 on sparse tensor cores"
    return "empty blocks left out" if " blocks" in kernel else ""


def _any_order(program: _C.Program) -> list[bool]:
    """Inputs that only quantization reads."""
    others = {
        number for op, _, inputs, *_ in program.nodes() if op != "quantize" for number in inputs
    } | set(program.outputs())
    return [number not in others for number in program.inputs()]
