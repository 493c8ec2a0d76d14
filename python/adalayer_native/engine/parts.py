"""Programs on this machine: a compiled network's parts that the engine runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adalayer_native import _C, cuda, ops
from adalayer_native.engine.results import Output
from adalayer_native.engine.sizes import KEY, SizeRules
from adalayer_native.errors import InputError

__all__ = ["WEIGHTS", "CudaPart", "NativePart", "program_of", "type_name", "whole_numbers"]

# Forms of weights below 8 bits; csrc/engine/engine.hpp, WeightForm.
WEIGHTS = ("measured", "streamed", "resident")
_MOST_SHOWN = 256


class NativePart:
    """A program on this machine.

    Attributes:
        program: as it would be saved.
        engine: its executor at the level of quality that the part has; safe from many threads.
        level: that one; 0 is the best.
        outputs: how tensors show its outputs.
        rules: what it says about other sizes than the compiled one; None if nothing.
        weights: on the CPU "measured", "streamed" or "resident"; see
            :func:`adalayer_native.compile`.
    """

    def __init__(
        self,
        program: _C.Program,
        outputs: Sequence[Output],
        weights: str = "measured",
        max_memory: int = 0,
        plan: str = "",
        level: int = 0,
    ) -> None:
        """max_memory: bytes that it may take, else MemoryError; 0 for a program of one's own.
        plan: what the clock chose for the same program before; measured anew where it no longer
        fits this machine or the number of threads."""
        self.program = program
        self.weights, self.max_memory = weights, max_memory
        self._plan = plan
        self.level = level
        self.rules: SizeRules | None = None
        self.sized: _C.SizedEngine | None = None
        self.leveled: _C.LeveledEngine | None = None
        self.outputs = tuple(outputs)
        self.engine = self._make()
        # Of sizes that were met lately: elements of inputs and outputs, and views of these.
        self._shown: dict[tuple[int, ...], tuple[list[int], list[int], tuple[Output, ...]]] = {}
        values = program.values()
        self.elements = [math.prod(values[number][2:5]) for number in program.outputs()]
        # The common case: one output in memory order.
        self.single = self.outputs[0].shape if self._is_single() else None
        # Names of inputs that are token ids, which programs hold in 32 bits.
        inputs = [values[number] for number in program.inputs()]
        self._ids = {k: value[0] for k, value in enumerate(inputs) if value[1] == "i32"}
        self._use()

    def _use(self) -> None:
        """What calls need of the engine."""
        self._run = self._run_ids if self._ids else self.engine.run
        # Inputs that may come in channels_last order as they are.
        self._any_order = self.engine.any_order()

    def __reduce__(self) -> tuple[Any, ...]:
        held = self.program.to_bytes(), self.outputs, self.weights, self.max_memory
        best = self.engine if self.leveled is None else self.leveled.at(0).compiled()
        return _native_part, (*held, best.plan(), self.level)

    def __deepcopy__(self, memo: dict[int, Any]) -> NativePart:
        return self  # nothing in it ever changes

    def _make(self) -> Any:
        held, limit, plan = self.program, self.max_memory, self._plan
        text = held.metadata().get(KEY)
        options: dict[str, Any] = {"weights": self.weights, "memory_bytes": limit, "plan": plan}
        if held.levels() > 1:
            self.leveled = _C.LeveledEngine(held, **options)
            self.sized = self.leveled.at(self.level)
        elif text is None:
            return _C.Engine(held, **options)
        else:
            self.sized = _C.SizedEngine(held, **options)
        if text is None:
            engine, self.sized = self.sized.compiled(), None
            return engine
        self.rules = SizeRules.from_text(text)
        if len(self.rules.outputs) != len(self.outputs):
            raise ValueError(f"{KEY}: rules for {len(self.rules.outputs)} results")
        return self.sized.compiled()

    @property
    def levels(self) -> int:
        """How many levels of quality there are."""
        return 1 if self.leveled is None else int(self.program.levels())

    def at_level(self, level: int) -> NativePart:
        """The same at another level, which is made ready where it is not.

        Raises:
            InputError: there is no such level.
        """
        if type(level) is not int or not 0 <= level < self.levels:
            raise InputError(
                f"quality level {level!r} does not exist: expected "
                + (f"0 (the best) to {self.levels - 1}" if self.levels > 1 else "0, the only one")
            )
        if level == self.level or self.leveled is None:
            return self
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        sized = self.leveled.at(level)
        part.level, part.engine = level, sized.compiled()
        part.sized = None if self.rules is None else sized
        part._use()
        return part

    def program_at_level(self) -> _C.Program:
        """The program at the part's level, as one without levels."""
        return self.program if self.levels == 1 else self.program.at_level(self.level)

    @property
    def plan(self) -> str:
        """What the clock has chosen."""
        plan: str = self.engine.plan()
        return plan

    def at(self, key: tuple[int, ...]) -> tuple[Any, list[int], list[int], tuple[Output, ...]]:
        """The executor at sizes of the rules' axes, elements of its inputs and outputs, and how
        tensors show these.

        Raises:
            InputError: a size that is not allowed, or that some node cannot be made for.
        """
        assert self.sized is not None and self.rules is not None
        try:
            engine = self.sized.at(key)
        except ValueError as error:
            raise InputError(f"sizes {list(key)}: {error}") from None
        found = self._shown.get(key)
        if found is None:
            results = engine.output_sizes()
            elements = [math.prod(size) for size in results]
            try:
                outputs = tuple(
                    rule.of(output, *results[output.source][1:])
                    for rule, output in zip(self.rules.outputs, self.outputs, strict=True)
                )
                fits = all(output.fits(elements[output.source]) for output in outputs)
            except ValueError:
                fits = False
            if not fits:  # a file may say anything
                raise InputError(f"sizes {list(key)}: the file's rules do not fit its program")
            found = [math.prod(size) for size in engine.input_sizes()], elements, outputs
            if len(self._shown) >= _MOST_SHOWN:
                self._shown = {}
            self._shown[key] = found
        return engine, *found

    def _run_at(self, sizes: tuple[int, ...], batch: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        engine, wanted, elements, outputs = self.at(sizes)
        operands, nhwc = self._in_order(inputs)
        for x, n in zip(operands, wanted, strict=True):
            if x.numel() != batch * n:
                raise InputError(f"sizes {list(sizes)}: the file's rules do not fit its program")
        addresses, threads = [x.data_ptr() for x in operands], ops.get_num_threads()
        try:
            if self.single is not None and outputs[0].atoms is None:
                out = torch.empty((batch, *outputs[0].shape))
                engine.run(addresses, nhwc, batch, [out.data_ptr()], threads)
                return [out]
            memory = [torch.empty((batch, n)) for n in elements]
            engine.run(addresses, nhwc, batch, [m.data_ptr() for m in memory], threads)
        except ValueError as error:  # an id that a table has no row for
            raise InputError(str(error)) from None
        return [output.view(memory[output.source]) for output in outputs]

    def _is_single(self) -> bool:
        first = self.outputs[0]
        return len(self.outputs) == 1 and first.atoms is None and not first.folded

    def _run_ids(self, *args: Any) -> None:
        try:
            self.engine.run(*args)
        except ValueError as error:  # an id that a table has no row for
            raise InputError(str(error)) from None

    def _in_order(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[bool]]:
        """The inputs in one of the orders that the engine reads, and whether that is NHWC."""
        operands, nhwc = [], []
        if self._ids:
            inputs = [
                whole_numbers(x, torch.int32, f"input {self._ids[k]!r}") if k in self._ids else x
                for k, x in enumerate(inputs)
            ]
        for x, any_order in zip(inputs, self._any_order, strict=True):
            x = x.resolve_neg()  # itself, but for a lazily negative view: memory holds the opposite
            last = (
                any_order
                and not x.is_contiguous()
                and x.dim() == 4
                and x.is_contiguous(memory_format=torch.channels_last)
            )
            operands.append(x if last else x.contiguous())
            nhwc.append(last)
        return operands, nhwc

    def __call__(
        self, batch: int, inputs: Sequence[Tensor], sizes: tuple[int, ...] = ()
    ) -> list[Tensor]:
        """CPU tensors of checked shapes in, float32 or whole numbers as token ids; new ones out.

        Args:
            sizes: of the rules' axes, where they are not those that were compiled.

        Raises:
            InputError: an id that is in no table, or sizes that the program cannot be made for.
        """
        if sizes:
            return self._run_at(sizes, batch, inputs)
        operands, nhwc = self._in_order(inputs)
        addresses = [x.data_ptr() for x in operands]
        if self.single is not None:
            out = torch.empty((batch, *self.single))
            self._run(addresses, nhwc, batch, [out.data_ptr()], ops.get_num_threads())
            return [out]
        memory = [torch.empty((batch, elements)) for elements in self.elements]
        self._run(addresses, nhwc, batch, [m.data_ptr() for m in memory], ops.get_num_threads())
        return [output.view(memory[output.source]) for output in self.outputs]


class CudaPart(NativePart):
    """A program on a GPU.

    Attributes:
        engine: a :class:`~adalayer_native.cuda.CudaEngine`.
        device: number of the GPU.
    """

    def __init__(
        self,
        program: _C.Program,
        outputs: Sequence[Output],
        weights: str,
        device: int,
        **options: Any,
    ) -> None:
        self.device = device
        self._options = options
        super().__init__(program, outputs, weights)

    def __reduce__(self) -> tuple[Any, ...]:
        held = self.program.to_bytes(), self.outputs, self.weights, self.device, self._options
        return _cuda_part, held

    def _make(self) -> Any:
        return cuda.CudaEngine(self.program, self.device, **self._options)

    def __call__(
        self, batch: int, inputs: Sequence[Tensor], sizes: tuple[int, ...] = ()
    ) -> list[Tensor]:
        """Float32 tensors of checked shapes on the GPU in, new tensors out; nothing is awaited."""
        operands, nhwc = self._in_order(inputs)
        addresses = [x.data_ptr() for x in operands]
        where = torch.device("cuda", self.device)
        if batch == 0:
            addresses = [0] * len(operands)
        if self.single is not None:
            out = torch.empty((batch, *self.single), device=where)
            self._run(addresses, nhwc, batch, [out.data_ptr()])
            return [out]
        memory = [torch.empty((batch, elements), device=where) for elements in self.elements]
        self._run(addresses, nhwc, batch, [m.data_ptr() for m in memory])
        return [output.view(memory[output.source]) for output in self.outputs]


def whole_numbers(x: Tensor, dtype: torch.dtype, label: str) -> Tensor:
    """Whole numbers as another integer type.

    Raises:
        InputError: it does not hold them.
    """
    if x.dtype == dtype:
        return x
    found = x.to(dtype)
    wrong = found != x
    if bool(wrong.any()):
        raise InputError(
            f"{label}: expected whole numbers that {type_name(dtype)} holds, got {int(x[wrong][0])}"
        )
    return found


def program_of(data: bytes) -> _C.Program:
    """A program from its bytes, which are copied."""
    held = np.frombuffer(data, dtype=np.uint8)
    return _C.Program.from_bytes(held.ctypes.data, held.size)


def _native_part(
    data: bytes,
    outputs: Sequence[Output],
    weights: str,
    max_memory: int,
    plan: str = "",
    level: int = 0,
) -> NativePart:
    """A pickled part, made ready for the machine that reads it."""
    return NativePart(program_of(data), outputs, weights, max_memory, plan, level)


def _cuda_part(
    data: bytes, outputs: Sequence[Output], weights: str, device: int, options: dict[str, Any]
) -> CudaPart:
    return CudaPart(program_of(data), outputs, weights, device, **options)


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
