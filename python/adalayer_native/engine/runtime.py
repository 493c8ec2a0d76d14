"""The compiled engine: checks, buffers, and the parts in order."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from adalayer_native import _C, cuda, ops
from adalayer_native._files import replacing
from adalayer_native.engine.call import Call
from adalayer_native.engine.coverage import Coverage, Row
from adalayer_native.engine.results import ID_TYPES, Leaf, Output, Port, described, skeleton
from adalayer_native.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:  # loading a file needs neither the compiler nor torch.export
    from adalayer_native.engine.segments import TorchPart

__all__ = ["WEIGHTS", "CudaPart", "Engine", "NativePart", "Step", "TorchStep"]

# Forms of weights below 8 bits; csrc/engine/engine.hpp, WeightForm.
WEIGHTS = ("measured", "streamed", "resident")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class NativePart:
    """A program on this machine.

    Attributes:
        program: as it would be saved.
        engine: its executor; safe from many threads.
        outputs: how tensors show its outputs.
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
    ) -> None:
        """max_memory: bytes that it may take, else MemoryError; 0 for a program of one's own.
        plan: what the clock chose for the same program before; measured anew where it no longer
        fits this machine or the number of threads."""
        self.program = program
        self.weights, self.max_memory = weights, max_memory
        self._plan = plan
        self.engine = self._make()
        self.outputs = tuple(outputs)
        values = program.values()
        self.elements = [math.prod(values[number][2:5]) for number in program.outputs()]
        # The common case: one output in memory order.
        self.single = self.outputs[0].shape if self._is_single() else None
        self._run = self.engine.run
        # Inputs that may come in channels_last order as they are.
        self._any_order = self.engine.any_order()
        # Names of inputs that are token ids, which programs hold in 32 bits.
        inputs = [values[number] for number in program.inputs()]
        self._ids = {k: value[0] for k, value in enumerate(inputs) if value[1] == "i32"}
        if self._ids:
            self._run = self._run_ids

    def __reduce__(self) -> tuple[Any, ...]:
        held = self.program.to_bytes(), self.outputs, self.weights, self.max_memory
        return _native_part, (*held, self.engine.plan())

    def __deepcopy__(self, memo: dict[int, Any]) -> NativePart:
        return self  # nothing in it ever changes

    def _make(self) -> Any:
        return _C.Engine(
            self.program, weights=self.weights, memory_bytes=self.max_memory, plan=self._plan
        )

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
                _whole(x, torch.int32, f"input {self._ids[k]!r}") if k in self._ids else x
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

    def __call__(self, batch: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """CPU tensors of checked shapes in, float32 or whole numbers as token ids; new ones out.

        Raises:
            InputError: an id that is in no table.
        """
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

    def __call__(self, batch: int, inputs: Sequence[Tensor]) -> list[Tensor]:
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


def _whole(x: Tensor, dtype: torch.dtype, label: str) -> Tensor:
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
            f"{label}: expected whole numbers that {_name(dtype)} holds, got {int(x[wrong][0])}"
        )
    return found


def _program(data: bytes) -> _C.Program:
    held = np.frombuffer(data, dtype=np.uint8)
    return _C.Program.from_bytes(held.ctypes.data, held.size)


def _native_part(
    data: bytes, outputs: Sequence[Output], weights: str, max_memory: int, plan: str = ""
) -> NativePart:
    """A pickled part, made ready for the machine that reads it."""
    return NativePart(_program(data), outputs, weights, max_memory, plan)


def _cuda_part(
    data: bytes, outputs: Sequence[Output], weights: str, device: int, options: dict[str, Any]
) -> CudaPart:
    return CudaPart(_program(data), outputs, weights, device, **options)


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


class Engine:
    """A compiled network. Build one with :func:`adalayer_native.compile` or ``load``.

    Immutable and safe to call from many threads at once; the work runs without Python's global
    lock. The number of threads of one call is :func:`adalayer_native.get_num_threads`.

    It can be copied and pickled (with ``torch.save``, too; ``torch.load`` then needs
    ``weights_only=False``), gives the same bits and keeps what the clock has chosen, as long as it
    is read by a machine and a number of threads like those that chose. Unlike a ``.ada`` file a
    pickle also holds what runs in torch, and should be read from trusted sources only.

    Attributes:
        inputs: name, sizes and type of every tensor that a call takes, in the order of the model's
            arguments.
        preprocessing: what to do with an image before the first layer, as the writer of the file
            gave it, else None.
        class_names: names of the classes, else None.
        device: where its inputs and results are.
        least_batch: 2 where the model does something else with one sample alone.
    """

    def __init__(
        self,
        steps: list[Step],
        inputs: Sequence[Port],
        leaves: Sequence[Any],
        out_spec: Any,
        *,
        call: Call | None = None,
        preprocessing: Any = None,
        class_names: list[str] | None = None,
        least_batch: int = 1,
    ) -> None:
        """leaves: per leaf of ``out_spec`` (a ``TreeSpec``) its tensor's number as Leaf, or a
        constant. call: default one tensor per input."""
        self._steps = steps
        self.inputs = tuple(inputs)
        self._leaves = list(leaves)
        self._out_spec = out_spec
        self._call = Call.flat(self.inputs) if call is None else call
        self.preprocessing = preprocessing
        self.class_names = class_names
        # The converted model, as long as somebody holds it; see compile().
        self._source: weakref.ref[torch.nn.Module] | None = None
        self._single: NativePart | None = None
        if len(steps) == 1 and isinstance(steps[0].run, NativePart) and len(self.inputs) == 1:
            part = steps[0].run
            alone = out_spec.is_leaf() and isinstance(self._leaves[0], Leaf)
            plain = self._call.plain and self.inputs[0].is_float
            if part.single is not None and alone and steps[0].inputs == [0] and plain:
                self._single = part
        gpus = {step.run.device for step in steps if isinstance(step.run, CudaPart)}
        self.device = torch.device("cuda", gpus.pop()) if gpus else torch.device("cpu")
        self._batch = [port.batched for port in self.inputs].index(True)
        self._shape = self.inputs[0].shape
        self._rank = len(self._shape) + 1
        self.require_batch(least_batch)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_out_spec": skeleton(self._out_spec), "_source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._out_spec = pytree.tree_structure(state["_out_spec"])

    # -- running --------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a batch.

        Args:
            args, kwargs: what the model's ``forward`` takes, by position or name, with tensors
                nested as in the example that it was compiled with. Tensors are on the engine's
                device, ``[batch, ...]`` in any memory format, or, where the example's was not of
                its batch, of the example's shape. Where the example had floats: float32, or
                bfloat16 and half, all of one type, which are computed in the same way and give
                results of their own type. A NaN becomes the lowest level of the input's grid, as
                in the module tree; infinities saturate. Where it had integers or bools: the same
                type, where int64 and int32 stand for each other. None, numbers and texts are what
                they were in the example, and may be left out where that is their default.

        Returns:
            What the model returns: a tensor, or tensors in the model's own containers. They carry
            no gradient.

        Raises:
            InputError: an argument is missing or unknown; number, type, device or shape of an
                input is wrong, or a constant is another one; or the batch does not fit into memory.
        """
        part = self._single
        if part is not None and len(args) == 1 and not kwargs:
            x = args[0]
            # Written out: a small network at batch 1 takes as long as a few of these lines.
            if (
                type(x) is Tensor
                and x.dtype is torch.float32
                and x.device == self.device
                and x.layout is torch.strided
                and len(shape := x.shape) == self._rank
                and shape[1:] == self._shape
            ):
                try:
                    return part(shape[0], args)[0]
                except (RuntimeError, MemoryError) as error:
                    raise self._too_much(args, error) from error
        return self._any(self._call(args, kwargs))

    def require_batch(self, least: int) -> None:
        """Refuse smaller batches from now on."""
        self.least_batch = least
        if least > 1:
            self._single = None  # which checks no batch

    def flat(self, inputs: Sequence[Tensor]) -> Any:
        """The same with one tensor per input, in the order of :attr:`inputs`.

        Raises:
            InputError: as in a call.
        """
        # A call, where it is one, is faster for small networks.
        return self(*inputs) if self._call.plain else self._any(inputs)

    def _any(self, inputs: Sequence[Any]) -> Any:
        tensors, dtype = self._checked(inputs)
        try:
            return self._run(tensors, dtype)
        except (RuntimeError, MemoryError) as error:
            raise self._too_much(inputs, error) from error

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The same as a call for numpy arrays, in and out.

        Float inputs are float32 (or float16) ``[batch, ...]``, others of their own type; results
        are float32 and what else the model computes.

        Raises:
            InputError: as in a call.
        """
        return self.run_flat(self._call(args, kwargs))

    def run_flat(self, inputs: Sequence[Any]) -> Any:
        """:meth:`flat` for numpy arrays.

        Raises:
            InputError: as in a call.
        """
        tensors = []
        for position, item in enumerate(inputs):
            array = np.asarray(item)
            floats = position >= len(self.inputs) or self.inputs[position].is_float
            known = ("float32", "float16") if floats else _alike(self.inputs[position].dtype)
            if array.dtype.name not in known:
                raise InputError(
                    f"{self._label(position)}: expected an array of {known[0]}, got {array.dtype}"
                )
            if not array.flags.writeable or any(stride < 0 for stride in array.strides):
                array = array.copy()
            tensors.append(torch.from_numpy(array).to(self.device))
        return pytree.tree_map(
            lambda leaf: leaf.cpu().numpy() if isinstance(leaf, Tensor) else leaf,
            self.flat(tensors),
        )

    def to(self, device: str | int | torch.device, **options: Any) -> Engine:
        """The same engine on another device; this one stays as it is.

        Weights are repacked from the program's canonical ones, and results have the same bits on
        every device. On a GPU a call enqueues one CUDA graph per batch size on torch's current
        stream and does not wait for it.

        Args:
            device: ``"cpu"``, ``"cuda"`` (the current GPU) or ``"cuda:1"``.
            options: of :class:`~adalayer_native.cuda.CudaEngine`, for GPUs.

        Raises:
            DeviceError: no such device, one that cannot run the kernels, or a build without them.
        """
        on_cpu = not isinstance(device, int) and torch.device(device).type == "cpu"
        gpu = None if on_cpu else cuda.device_index(device)
        where = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
        steps = []
        for step in self._steps:
            run: NativePart | TorchStep
            if isinstance(step.run, TorchStep):
                run = TorchStep(step.run.part.to(where), step.run.rows)
            else:
                held = step.run.program, step.run.outputs, step.run.weights
                run = NativePart(*held) if gpu is None else CudaPart(*held, gpu, **options)
            steps.append(Step(run, step.inputs, step.outputs, step.done))
        return Engine(
            steps,
            self.inputs,
            [leaf.to(where) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves],
            self._out_spec,
            call=self._call,
            preprocessing=self.preprocessing,
            class_names=self.class_names,
            least_batch=self.least_batch,
        )

    def _label(self, position: int) -> str:
        if position < len(self.inputs):
            return f"input {self.inputs[position].name!r}"
        return f"input {position}"

    def _checked(self, inputs: Sequence[Any]) -> tuple[list[Tensor], torch.dtype | None]:
        """The inputs, and the type of those that are floats; None if there are none."""
        if len(inputs) != len(self.inputs):
            names = ", ".join(port.name for port in self.inputs)
            raise InputError(f"expected {len(self.inputs)} inputs ({names}), got {len(inputs)}")
        found: list[Tensor] = []
        batch: int | None = None
        floats: torch.dtype | None = None
        for position, (x, port) in enumerate(zip(inputs, self.inputs, strict=True)):
            label = self._label(position)
            if not isinstance(x, Tensor):
                raise InputError(f"{label}: expected a torch.Tensor, got {type(x).__name__}")
            if port.is_float and x.dtype not in _FLOATS:
                raise InputError(
                    f"{label}: expected torch.float32 (or bfloat16, float16), got {x.dtype}"
                )
            ids = port.dtype in ID_TYPES
            if not port.is_float and x.dtype != port.dtype and not (ids and x.dtype in ID_TYPES):
                raise InputError(f"{label}: expected {port.dtype}, got {x.dtype}")
            if x.device != self.device:
                raise InputError(
                    f"{label}: expected a tensor on {self.device}, got one on {x.device}"
                )
            if x.layout != torch.strided:
                raise InputError(f"{label}: expected a dense tensor, got layout {x.layout}")
            shape = tuple(x.shape)
            if len(shape) != len(port.shape) + port.batched or shape[port.batched :] != port.shape:
                raise InputError(f"{label}: expected shape {port}, got {list(shape)}")
            if port.batched:
                if batch is not None and shape[0] != batch:
                    raise InputError(
                        f"{label}: expected a batch of {batch} as in the first input, got "
                        f"{shape[0]}"
                    )
                batch = shape[0]
            if port.is_float:
                if floats is not None and x.dtype != floats:
                    raise InputError(
                        f"{label}: expected {floats} as in the first input, got {x.dtype}"
                    )
                floats = x.dtype
            found.append(_whole(x, port.dtype, label) if ids else x)
        if batch is not None and 0 < batch < self.least_batch:
            raise InputError(
                f"{self._label(0)}: expected a batch of {self.least_batch} or more, got {batch}; "
                "the model treats one sample otherwise: squeeze() without an axis, for one, drops "
                "the batch, where flatten(1) or squeeze(-1) would not"
            )
        return found, floats

    def _run(self, inputs: list[Tensor], dtype: torch.dtype | None) -> Any:
        batch = inputs[self._batch].shape[0]
        with torch.no_grad():
            tensors: dict[int, Tensor] = {
                number: x.detach().float() if port.is_float else x.detach()
                for number, (x, port) in enumerate(zip(inputs, self.inputs, strict=True))
            }
            for step in self._steps:
                operands = [tensors[number] for number in step.inputs]
                if isinstance(step.run, NativePart):
                    results: Sequence[Tensor] = step.run(batch, operands)
                else:
                    results = step.run.part(batch, *operands)
                tensors.update(zip(step.outputs, results, strict=True))
                for number in step.done:
                    del tensors[number]
            leaves = [
                tensors[leaf.number]
                if isinstance(leaf, Leaf)
                else leaf.clone()  # a caller may write into it
                if isinstance(leaf, Tensor)
                else leaf
                for leaf in self._leaves
            ]
            if dtype is not None and dtype is not torch.float32:
                # Of a result that is no float (a class, a mask) the type says what it is.
                leaves = [
                    leaf.to(dtype)
                    if isinstance(leaf, Tensor) and leaf.is_floating_point()
                    else leaf
                    for leaf in leaves
                ]
        return pytree.tree_unflatten(leaves, self._out_spec)

    def _too_much(self, inputs: Sequence[Any], error: Exception) -> Exception:
        text = str(error)
        short = isinstance(error, MemoryError) or "memory" in text or "allocate" in text
        if not short:
            return error
        shapes = [list(x.shape) for x in inputs]
        return InputError(
            f"a batch of shape {shapes} does not fit into memory ({text.strip()[:200]})"
        )

    # -- what it consists of ----------------------------------------------------------------------

    def coverage(self, batch: int = 1, *, rounds: int = 5, threads: int | None = None) -> Coverage:
        """What runs for every node, why, with how many bits and microseconds.

        Args:
            batch: images per measured run. rounds: runs of which the median counts; 0 measures
                nothing. threads: default :func:`adalayer_native.get_num_threads`.
        """
        workers = ops.get_num_threads() if threads is None else threads
        rows: list[Row] = []
        tensors: dict[int, Tensor] = {}
        if any(isinstance(step.run, TorchStep) for step in self._steps):
            tensors = {k: p.sample(batch, self.device) for k, p in enumerate(self.inputs)}
        for step in self._steps:
            operands = [tensors[number] for number in step.inputs if number in tensors]
            if isinstance(step.run, NativePart):
                rows += _native_rows(step.run, batch, workers, rounds)
                if tensors:
                    results: Sequence[Tensor] = step.run(batch, operands)
            else:
                rows += _torch_rows(step.run, batch, operands, rounds)
                results = step.run.part(batch, *operands)
            if tensors:
                tensors.update(zip(step.outputs, results, strict=True))
        return Coverage(tuple(rows), batch, workers)

    @property
    def source(self) -> torch.nn.Module | None:
        """The converted model that it was compiled from, as long as somebody holds that."""
        return None if self._source is None else self._source()

    def came_from(self, model: torch.nn.Module) -> None:
        """Remember the converted model, without keeping it."""
        self._source = weakref.ref(model)

    def packed_weights(self) -> dict[str, Tensor]:
        """The canonical packed weights of every quantized layer by its name, uint8."""
        found = {}
        for step in self._steps:
            if not isinstance(step.run, NativePart):
                continue
            program = step.run.program
            kinds = program.constants()
            for op, name, _, _, _, _, constants in program.nodes():
                layer = op in ("conv", "conv_transpose", "float_conv")
                if layer and kinds[constants[0]][0] == "weights":
                    data = bytearray(program.constant_bytes(constants[0]))
                    found[name] = torch.frombuffer(data, dtype=torch.uint8)
        return found

    @property
    def native_share(self) -> float:
        """Share of the multiply-accumulates that run natively, 0 to 1."""
        return self.coverage(rounds=0).native_share

    @property
    def tables(self) -> dict[str, int]:
        """By name of an input of token ids, the rows of the smallest table that they index; 2 for a
        mask of zeros and ones.

        Ids from 0 on, below that number, are in every table. Tables in torch are not among them.
        """
        found: dict[str, int] = {}
        for step in self._steps:
            if not isinstance(step.run, NativePart):
                continue
            program, sizes = step.run.program, step.run.program.constants()
            names = {
                value: self.inputs[number].name
                for value, number in zip(program.inputs(), step.inputs, strict=True)
                if number < len(self.inputs)
            }
            for op, _, inputs, output, ints, _, constants in program.nodes():
                flags = op == "choose" and not ints[0]
                if (op == "embedding" or flags) and inputs[0] in names:
                    table = 0 if flags else sizes[constants[0]][1]
                    rows = 2 if flags else table // program.values()[output][2]
                    name = names[inputs[0]]
                    found[name] = min(rows, found.get(name, rows))
        return found

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights as this machine holds them, shared by all threads."""
        return sum(
            s.run.engine.weight_bytes() for s in self._steps if isinstance(s.run, NativePart)
        )

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        preprocessing: Mapping[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> int:
        """Write a ``.ada`` file, which :func:`adalayer_native.load` and the C API read.

        Args:
            preprocessing: what the images need, JSON data; default: what the engine was loaded
                with. class_names: one name per class.

        Returns:
            Bytes of the file.

        Raises:
            UnsupportedModelError: some nodes run in torch; names them.
            OSError: the file cannot be written; nothing is left behind.
        """
        rest = [
            row.name for s in self._steps if isinstance(s.run, TorchStep) for _, row in s.run.rows
        ]
        if rest or len(self._steps) != 1:
            raise UnsupportedModelError(
                f"{len(rest)} nodes run in torch, which a file cannot hold: {', '.join(rest[:8])}"
                f'{", ..." if len(rest) > 8 else ""}; compile with policy="native" and strict=True '
                "to see why"
            )
        part = self._steps[0].run
        assert isinstance(part, NativePart)
        program = part.program
        structure, leaves = described(self._out_spec, self._leaves, "the model's result")
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            raise UnsupportedModelError(
                "the model returns a tensor that is the same in every call, which a file cannot "
                "hold; leave it out of the results"
            )
        computed = self._steps[0].outputs
        for leaf in leaves:
            if isinstance(leaf, Leaf) and leaf.number not in computed:
                raise UnsupportedModelError(
                    f"the model returns its input {self.inputs[leaf.number].name!r} as it is, "
                    "which a file cannot hold; leave it out of the results"
                )
        metadata = {
            "adalayer.inputs": [_port_row(port) for port in self.inputs],
            "adalayer.outputs": [
                [output.source, list(output.shape), output.atoms] for output in part.outputs
            ],
            "adalayer.order": self._steps[0].inputs,
            "adalayer.leaves": [
                {"tensor": computed.index(leaf.number)}
                if isinstance(leaf, Leaf)
                else {"constant": leaf}
                for leaf in leaves
            ],
            "adalayer.structure": structure,
        }
        call = self._call.as_json(self.inputs)
        if call is not None:
            metadata["adalayer.call"] = call
        if self.least_batch > 1:
            metadata["adalayer.least_batch"] = self.least_batch
        shown = self.preprocessing if preprocessing is None else dict(preprocessing)
        names = self.class_names if class_names is None else [str(name) for name in class_names]
        if shown is not None:
            metadata["preprocessing"] = shown
        if names is not None:
            metadata["classes"] = names
        for key, value in metadata.items():
            program.set_metadata(key, json.dumps(value))
        with replacing(path) as temporary:
            program.save(os.fspath(temporary))
            return os.stat(temporary).st_size

    def __repr__(self) -> str:
        ports = ", ".join(f"{port.name}{port}" for port in self.inputs)
        kinds = [isinstance(step.run, NativePart) for step in self._steps]
        parts = (
            "native" if all(kinds) else f"{sum(kinds)} native and {kinds.count(False)} torch parts"
        )
        where = "" if self.device.type == "cpu" else f" on {self.device}"
        return f"Engine({ports}; {parts}{where})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _alike(dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the types that an input of whole numbers may have, its own first."""
    others = [item for item in ID_TYPES if item != dtype] if dtype in ID_TYPES else []
    return tuple(map(_name, (dtype, *others)))


def _port_row(port: Port) -> list[Any]:
    """For a file; batches of floats are name and sizes, as they have always been."""
    row: list[Any] = [port.name, list(port.shape)]
    if not port.batched:
        return [*row, _name(port.dtype), False]
    return row if port.is_float else [*row, _name(port.dtype)]


# -- coverage -------------------------------------------------------------------------------------


def _native_rows(part: NativePart, batch: int, threads: int, rounds: int) -> list[Row]:
    # With 0 rounds the CPU's engine says what runs and times nothing.
    untimed = isinstance(part.engine, _C.Engine)
    measured = part.engine.profile(batch, threads, rounds) if rounds > 0 or untimed else []
    found = {entry[0]: (entry[2], entry[7], entry[8]) for entry in measured}
    program = part.program
    values, sizes = program.values(), program.constants()
    rows = []
    for op, name, inputs, output, _, _, constants in program.nodes():
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
