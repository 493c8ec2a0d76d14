"""The C library, called as a server would, beside torch fp32 and a call from Python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adalayer_native as ada
from bench import engines
from bench.conftest import Bench
from bench.networks import network
from bench.peers import as_tensor, torch_fp32

# A call through C may cost this much of one from Python, which does the same and a little more.
OF_PYTHON = 1.02


class _Input(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("type", ctypes.c_int32),
        ("layout", ctypes.c_int32),
    ]


class _Output(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


class Library:
    """``libadalayer.so.1`` with one model and one context."""

    def __init__(self, model: Path, threads: int) -> None:
        self._library = ctypes.CDLL(f"{ada.get_library_dir()}/libadalayer.so.1")
        self._library.adalayer_last_error.restype = ctypes.c_char_p
        loaded, self._context = ctypes.c_void_p(), ctypes.c_void_p()
        path = str(model).encode()
        self._check(self._library.adalayer_model_load(path, None, ctypes.byref(loaded)))
        self._check(self._library.adalayer_context_create(loaded, ctypes.byref(self._context)))
        self._library.adalayer_model_free(loaded)
        self._check(self._library.adalayer_context_set_threads(self._context, threads))

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(self._library.adalayer_last_error().decode())

    def call(self, images: Tensor, out: Tensor) -> Callable[[], Tensor]:
        """One run over buffers that stay where they are."""
        source = _Input(images.data_ptr(), images.nbytes, 0, 0)
        target = _Output(out.data_ptr(), out.nbytes)
        arguments = (
            self._context,
            ctypes.c_int64(len(images)),
            ctypes.byref(source),
            ctypes.c_size_t(1),
            ctypes.byref(target),
            ctypes.c_size_t(1),
        )
        run = self._library.adalayer_run

        def step(keep: Any = (images, out, source, target)) -> Tensor:
            self._check(run(*arguments))
            return out

        return step


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_library(bench: Bench, turns: Any, tmp_path: Path, bits: int, threads: int) -> None:
    with bench.cores(threads):
        images = network("resnet18").images(1)
        compiled = engines.engine("resnet18", bits)
        compiled.save(tmp_path / "model.ada")
        want = as_tensor(compiled(images))
        library = Library(tmp_path / "model.ada", threads)
        run = library.call(images, torch.empty_like(want))
        assert torch.equal(run(), want), "the library and Python disagree"
        comparison = turns(
            f"library/resnet18, {bits} bits/{threads}T",
            {
                "ours from C": run,
                "ours from Python": engines.ours("resnet18", bits, images),
                "torch fp32": torch_fp32(network("resnet18"), images, threads),
            },
            threads=threads,
            seconds=12.0,
            side={"ours from Python"},
            least=5,
        )
    table = bench.results.table(comparison.name)
    medians = {name: states.get("fast", states["all"]).median for name, states in table.items()}
    label = f"resnet18, {bits} bits, {threads} threads"
    bench.figure(
        f"the library's call over Python's, {label}",
        medians["ours from C"] / medians["ours from Python"],
        "x",
        at_most=OF_PYTHON,
    )
    bench.figure(
        f"torch fp32 over the library, {label}",
        medians["torch fp32"] / medians["ours from C"],
        "x",
    )
