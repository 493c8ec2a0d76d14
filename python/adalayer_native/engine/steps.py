"""The parts of an engine in order, and what coverage says about their nodes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adalayer_native import _C, ops
from adalayer_native.engine.coverage import Row
from adalayer_native.engine.parts import NativePart

if TYPE_CHECKING:  # loading a file needs neither the compiler nor torch.export
    from adalayer_native.engine.segments import TorchPart

__all__ = ["Step", "TorchStep", "rows_of"]


@dataclass
class TorchStep:
    """A part in torch between native ones, and what coverage says about its nodes by name."""

    part: TorchPart
    rows: list[tuple[str, Row]]


@dataclass
class Step:
    """One part, with the numbers of the tensors that it reads and writes."""

    run: NativePart | TorchStep
    inputs: list[int]
    outputs: list[int]
    done: list[int]  # tensors that nobody reads after it

    def results(
        self, batch: int, operands: list[Tensor], sizes: tuple[int, ...] = ()
    ) -> Sequence[Tensor]:
        """What it computes.

        Args:
            sizes: free ones of the engine, where they are not those that were compiled.
        """
        if isinstance(self.run, NativePart):
            return self.run(batch, operands, sizes)
        return self.run.part(batch, *operands)


def rows_of(step: Step, batch: int, threads: int, operands: list[Tensor], rounds: int) -> list[Row]:
    """Coverage of a step's nodes, with the median times of some rounds."""
    if isinstance(step.run, NativePart):
        return _native_rows(step.run, batch, threads, rounds)
    return _torch_rows(step.run, batch, operands, rounds)


def _native_rows(part: NativePart, batch: int, threads: int, rounds: int) -> list[Row]:
    # With 0 rounds the CPU's engine says what runs and times nothing.
    untimed = isinstance(part.engine, _C.Engine)
    measured = part.engine.profile(batch, threads, rounds) if rounds > 0 or untimed else []
    found = {entry[0]: (entry[2], entry[7], entry[8]) for entry in measured}
    program = part.program_at_level()
    values, sizes = program.values(), program.constants()
    rows = []
    for op, name, inputs, output, ints, _, constants in program.nodes():
        bits = input_bits = packed = macs = 0
        kind = "native"
        if op == "float_conv":
            # One product per weight and position of the result, too.
            form, packed = sizes[constants[0]]
            data = program.constant_bytes(constants[0]) if form == "weights" else b""
            count = math.prod(_header(data)["shape"]) if data else packed // 4
            bits = int(_header(data)["bits"]) if data else 32
            macs, kind = count * math.prod(values[output][3:5]), "float"
        elif op in ("conv", "conv_transpose"):
            header = _header(program.constant_bytes(constants[0]))
            bits, packed = int(header["bits"]), sizes[constants[0]][1]
            # One product per weight and position of the result, or of the operand if transposed.
            pixels = values[output if op == "conv" else inputs[0]][3:5]
            macs = math.prod(header["shape"]) * math.prod(pixels)
            input_bits = int(values[inputs[0]][7]).bit_length()
        elif op == "linear":
            header = _header(program.constant_bytes(constants[0]))
            bits, packed = int(header["bits"]), sizes[constants[0]][1]
            macs = math.prod(header["shape"]) * math.prod(values[output][3:5])
            input_bits = int(values[inputs[0]][7]).bit_length()
        elif op == "recurrence":
            header = _header(program.constant_bytes(constants[0]))
            bits, packed = int(header["bits"]), sizes[constants[0]][1]
            macs = math.prod(header["shape"]) * math.prod(values[output][3:5])
            input_bits = (int(ints[4])).bit_length()  # hi: of the state's grid
        elif op == "embedding":
            bits, packed = int(values[output][7]).bit_length(), sizes[constants[0]][1]
        kernel, microseconds, why = found.get(name, ("", 0.0, ""))
        rows.append(Row(name, op, kind, kernel, bits, microseconds, packed, macs, why, input_bits))
    return rows


def _header(data: bytes) -> dict[str, Any]:
    return ops.packed_info(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def _torch_rows(step: TorchStep, batch: int, inputs: list[Tensor], rounds: int) -> list[Row]:
    samples: dict[str, list[float]] = {}
    with torch.no_grad():
        for _ in range(rounds):
            for name, seconds in step.part.times(batch, inputs, time.perf_counter).items():
                samples.setdefault(name, []).append(seconds)
    rows = []
    for name, row in step.rows:
        times = samples.get(name)
        spent = 1e6 * statistics.median(times) if times else 0.0
        rows.append(replace(row, microseconds=spent))
    return rows
