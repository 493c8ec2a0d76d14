"""The compiled engine: checks, buffers, and the parts in order."""

from __future__ import annotations

import json
import math
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from adalayer_native import _C, cuda, ops
from adalayer_native._files import replacing
from adalayer_native.detection import Detection, named
from adalayer_native.engine.coverage import Coverage, Row
from adalayer_native.engine.interface import Interface
from adalayer_native.engine.metadata import metadata_of
from adalayer_native.engine.parts import CudaPart, NativePart, program_of
from adalayer_native.engine.results import Leaf, Port, skeleton
from adalayer_native.engine.sizes import Size, SizeRules
from adalayer_native.engine.steps import Step, TorchStep, rows_of
from adalayer_native.errors import InputError, UnsupportedModelError

__all__ = ["Engine"]

_MOST_SHOWN = 256
# Held while an engine's parts are exchanged for those of another level, which takes no time.
_SWITCH = threading.Lock()


class Engine:
    """A compiled network. Build one with :func:`adalayer_native.compile` or ``load``.

    Immutable but for its quality, and safe to call from many threads at once; the work runs without
    Python's global lock. The number of threads of one call is
    :func:`adalayer_native.get_num_threads`.

    It can be copied and pickled (with ``torch.save``, too; ``torch.load`` then needs
    ``weights_only=False``), gives the same bits and keeps what the clock has chosen, as long as it
    is read by a machine and a number of threads like those that chose. Unlike a ``.ada`` file a
    pickle also holds what runs in torch, and should be read from trusted sources only.

    Attributes:
        device: where its inputs and results are.
    """

    def __init__(self, steps: list[Step], interface: Interface) -> None:
        self._steps = steps
        self._interface = interface
        alone = self.only_part()
        self._rules: SizeRules | None = None
        if alone is not None and alone.rules is not None:
            self._rules = alone.rules
            ranged = alone.rules.ranged(interface.inputs, alone.program)
            self._interface = replace(interface, inputs=ranged)
        # Sizes of the first input that were met lately, and what the free sizes were then.
        self._met: dict[Any, tuple[int, ...]] = {}
        # Of free sizes: input, axis of its shape, number of the axis.
        self._free = [
            (k, place, axis)
            for k, axes in enumerate(() if self._rules is None else self._rules.ports)
            for place, axis in enumerate(axes)
            if axis is not None
        ]
        # The converted model, as long as somebody holds it; see compile().
        self._source: weakref.ref[torch.nn.Module] | None = None
        self._single = self._short_cut()
        gpus = {step.run.device for step in steps if isinstance(step.run, CudaPart)}
        self.device = torch.device("cuda", gpus.pop()) if gpus else torch.device("cpu")
        self._batch = [port.batched for port in self.inputs].index(True)
        self._shape = self.inputs[0].shape
        self._rank = len(self._shape) + 1
        self.require_batch(interface.least_batch)

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Name, sizes and type of every tensor that a call takes, in the order of the model's
        arguments."""
        return self._interface.inputs

    @property
    def preprocessing(self) -> Any:
        """What to do with an image before the first layer, as the writer of the file gave it, else
        None."""
        return self._interface.preprocessing

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes, else None."""
        return self._interface.class_names

    @property
    def detection(self) -> Detection | None:
        """Which outputs of a detector are boxes and scores, else None."""
        return self._interface.detection

    @property
    def least_batch(self) -> int:
        """2 where the model does something else with one sample alone."""
        return self._interface.least_batch

    def _short_cut(self) -> NativePart | None:
        """The part of a network of one tensor in and one out, which needs few checks."""
        part = self.only_part()
        if part is None or len(self.inputs) != 1 or part.single is None:
            return None
        called = self._interface
        one_result = called.out_spec.is_leaf() and isinstance(called.leaves[0], Leaf)
        plain = called.call.plain and self.inputs[0].is_float
        return part if one_result and self._steps[0].inputs == [0] and plain else None

    def __getstate__(self) -> dict[str, Any]:
        held = replace(self._interface, out_spec=skeleton(self._interface.out_spec))
        return {**self.__dict__, "_interface": held, "_source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        spec = pytree.tree_structure(self._interface.out_spec)
        self._interface = replace(self._interface, out_spec=spec)

    # -- quality --------------------------------------------------------------------------------

    @property
    def levels(self) -> int:
        """How many levels of quality it has: 0 is the best, the others read fewer bits of the same
        stored weights (``compile(levels=…)``). 1 without."""
        part = self.only_part()
        return 1 if part is None else part.levels

    @property
    def quality(self) -> int:
        """The level that calls have now."""
        part = self.only_part()
        return 0 if part is None else part.level

    def set_quality(self, level: int) -> None:
        """Switch to another level. Any thread may, while others call: a call that has begun ends at
        the level that it began with.

        A level that is used for the first time is made ready before the switch, which takes as long
        as loading the file does; then it is kept, and a switch costs microseconds.

        Args:
            level: from 0, the best, to ``levels - 1``.

        Raises:
            InputError: there is no such level; the engine keeps its own.
        """
        made = self._at_level(level)
        with _SWITCH:
            self._steps = made
            if self._single is not None:
                self._single = self.only_part()

    def at_quality(self, level: int) -> Engine:
        """An engine at a level, which stays there; weights in memory are shared with this one.

        Raises:
            InputError: there is no such level.
        """
        part = self._at_level(level)[0].run
        assert isinstance(part, NativePart)
        return self._with(part, self.inputs)

    def _at_level(self, level: int) -> list[Step]:
        part = self.only_part()
        if part is None:
            raise UnsupportedModelError(
                "parts of the model run in torch, which have one quality; compile with strict=True "
                "to see which"
            )
        step = self._steps[0]
        return [Step(part.at_level(level), step.inputs, step.outputs, step.done)]

    def quality_cache(
        self, entries: int | None = None, max_bytes: int | None = None
    ) -> dict[str, int]:
        """What is kept for levels beside the best one; sets limits where they are given.

        Returns:
            ``entries``, ``bytes`` (of weights as this machine holds them, and tables), how many
            were ``made`` so far, and the limits (``most_entries``, ``most_bytes``), above which the
            levels used longest ago leave; the one used last stays.

        Raises:
            ValueError: a limit below 1.
            UnsupportedModelError: the engine has one level.
        """
        part = self.only_part()
        if part is None or part.leveled is None:
            raise UnsupportedModelError("the engine has one level of quality")
        return _cache(part.leveled, entries, max_bytes)

    # -- sizes ----------------------------------------------------------------------------------

    @property
    def sizes(self) -> dict[str, Size]:
        """Free sizes of its inputs by name; empty where it was compiled for one size."""
        return {} if self._rules is None else {a.name: a.size for a in self._rules.axes}

    def _sized_part(self) -> NativePart:
        part = self._steps[0].run
        if self._rules is None or not isinstance(part, NativePart) or part.sized is None:
            raise UnsupportedModelError(
                "the engine was compiled for one size; compile with sizes=(min, max)"
            )
        return part

    def warm_up(self, *sizes: Any) -> None:
        """Make ready for sizes that will come, and choose every layer's algorithm by the clock.

        A size that was not warmed up is ready within milliseconds of its first call, and its layers
        run as they do at the nearest size that was: a few sizes do for a range. The compiled one is
        one of them.

        Args:
            sizes: each one number per free size, in the order of :attr:`sizes`, or a dictionary by
                name.

        Raises:
            InputError: sizes that are not allowed, or that some layer cannot be made for.
            UnsupportedModelError: the engine was compiled for one size.
        """
        part = self._sized_part()
        assert part.rules is not None and part.sized is not None
        for item in sizes:
            wanted = part.rules.named(item)
            try:
                part.sized.warm_up(wanted)
            except ValueError as error:
                raise InputError(f"sizes {wanted}: {error}") from None

    def size_cache(
        self, entries: int | None = None, max_bytes: int | None = None
    ) -> dict[str, int]:
        """What is kept for sizes beside the compiled one; sets limits where they are given.

        Weights and the memory of calls are shared by all sizes and not counted here.

        Returns:
            ``entries``, ``bytes``, how many were ``made`` so far, and the limits
            (``most_entries``, ``most_bytes``), above which the sizes used longest ago leave.

        Raises:
            ValueError: a limit below 1.
            UnsupportedModelError: the engine was compiled for one size.
        """
        part = self._sized_part()
        assert part.sized is not None
        return _cache(part.sized, entries, max_bytes)

    def fixed(self, sizes: Any) -> Engine:
        """An engine for one of the sizes alone, at the present quality, with weights of its own.

        Args:
            sizes: one number per free size, or a dictionary by name.

        Raises:
            InputError: as :meth:`warm_up`.
            UnsupportedModelError: the engine was compiled for one size.
        """
        part = self._sized_part()
        assert part.rules is not None
        wanted = part.rules.named(sizes)
        *_, outputs = part.at(tuple(wanted))
        program = part.program_at_level().at_size(wanted)
        made = NativePart(program, outputs, part.weights, part.max_memory)
        ports = list(self.inputs)
        for k, place, axis in self._free:
            shape = list(ports[k].shape)
            shape[place] = wanted[axis]
            ports[k] = replace(ports[k], shape=tuple(shape))
        return self._with(made, [replace(port, axes=()) for port in ports])

    def following_outputs(self) -> list[tuple[bool, ...]]:
        """Per tensor of the result, of its axes but the batch, which follow from the inputs' sizes.

        Empty where the engine was compiled for one size.
        """
        if self._rules is None:
            return []
        computed = self._steps[0].outputs
        rules = [
            self._rules.outputs[computed.index(leaf.number)]
            for leaf in self._interface.leaves
            if isinstance(leaf, Leaf)
        ]
        return [tuple(bool(n.h_power or n.w_power) for n in rule.shape) for rule in rules]

    def most_output_bytes(self) -> int:
        """Bytes of one sample's results at the largest sizes; 0 of an engine for one size."""
        if self._rules is None:
            return 0
        part = self._sized_part()
        largest = [axis.size.last for axis in self._rules.axes]
        try:
            program = part.program.at_size(largest)
        except (ValueError, MemoryError):  # some layer cannot be made for all of them at once
            return 1 << 40
        values = program.values()
        elements = [math.prod(values[number][2:5]) for number in program.outputs()]
        return 4 * sum(elements[output.source] for output in part.outputs)

    def only_part(self) -> NativePart | None:
        """The program that is all of the engine; None where parts run in torch."""
        part = self._steps[0].run if len(self._steps) == 1 else None
        return part if isinstance(part, NativePart) else None

    def order(self) -> list[int]:
        """Which of :attr:`inputs` each input of the program is; of an engine that is one part."""
        return self._steps[0].inputs

    def with_part(self, part: NativePart) -> Engine:
        """The same engine with another program in the place of its only one."""
        return self._with(part, self.inputs)

    def _with(self, part: NativePart, ports: Sequence[Port]) -> Engine:
        step = self._steps[0]
        steps = [Step(part, step.inputs, step.outputs, step.done)]
        return Engine(steps, replace(self._interface, inputs=tuple(ports)))

    def _sizes_of(self, inputs: Sequence[Tensor]) -> tuple[int, ...]:
        """Free sizes of a call; none where they are those that were compiled.

        Raises:
            InputError: axes of one name have different sizes.
        """
        assert self._rules is not None
        found = [0] * len(self._rules.axes)
        compiled = True
        for k, place, axis in self._free:
            port = self.inputs[k]
            n = inputs[k].shape[place + port.batched]
            if found[axis] not in (0, n):
                label, name = self._interface.label(k), self._rules.axes[axis].name
                raise InputError(
                    f"{label}: expected {found[axis]} at axis {place + port.batched} ({name}) as "
                    f"in another input, got {n}"
                )
            found[axis] = n
            compiled = compiled and n == port.shape[place]
        if compiled:
            return ()
        if len(self._met) >= _MOST_SHOWN:
            self._met = {}
        sizes = self._met[inputs[0].shape[self.inputs[0].batched :]] = tuple(found)
        return sizes

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
                and (sizes := () if shape[1:] == self._shape else self._met.get(shape[1:]))
                is not None
            ):
                try:
                    return part(shape[0], args, sizes)[0]
                except (RuntimeError, MemoryError) as error:
                    raise self._too_much(args, error) from error
        return self._any(self._interface.call(args, kwargs))

    def require_batch(self, least: int) -> None:
        """Refuse smaller batches from now on."""
        self._interface = replace(self._interface, least_batch=least)
        if least > 1:
            self._single = None  # which checks no batch

    def flat(self, inputs: Sequence[Tensor]) -> Any:
        """The same with one tensor per input, in the order of :attr:`inputs`.

        Raises:
            InputError: as in a call.
        """
        # A call, where it is one, is faster for small networks.
        return self(*inputs) if self._interface.call.plain else self._any(inputs)

    def _any(self, inputs: Sequence[Any]) -> Any:
        tensors, dtype = self._interface.checked(inputs, self.device)
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
        return self.run_flat(self._interface.call(args, kwargs))

    def run_flat(self, inputs: Sequence[Any]) -> Any:
        """:meth:`flat` for numpy arrays.

        Raises:
            InputError: as in a call.
        """
        tensors = self._interface.tensors_of(inputs, self.device)
        return pytree.tree_map(
            lambda leaf: leaf.cpu().numpy() if isinstance(leaf, Tensor) else leaf,
            self.flat(tensors),
        )

    def to(self, device: str | int | torch.device, **options: Any) -> Engine:
        """The same engine on another device; this one stays as it is.

        Weights are repacked from the program's canonical ones, and results have the same bits on
        every device. On a GPU a call enqueues one CUDA graph per batch size on torch's current
        stream and does not wait for it, and there is the present quality alone.

        Args:
            device: ``"cpu"``, ``"cuda"`` (the current GPU) or ``"cuda:1"``.
            options: of :class:`~adalayer_native.cuda.CudaEngine`, for GPUs.

        Raises:
            DeviceError: no such device, one that cannot run the kernels, or a build without them.
            UnsupportedModelError: to a GPU, of an engine for a range of sizes (:meth:`fixed`).
        """
        on_cpu = not isinstance(device, int) and torch.device(device).type == "cpu"
        if not on_cpu and self._rules is not None:
            raise UnsupportedModelError(
                "an engine for a range of sizes runs on the CPU; engine.fixed(sizes).to(...) takes "
                "one of them to a GPU"
            )
        gpu = None if on_cpu else cuda.device_index(device)
        where = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
        steps = []
        for step in self._steps:
            run: NativePart | TorchStep
            if isinstance(step.run, TorchStep):
                run = TorchStep(step.run.part.to(where), step.run.rows)
            else:
                part = step.run
                held = part.outputs, part.weights
                if gpu is None:
                    run = NativePart(part.program, *held, level=part.level)
                else:  # of one level: the present one
                    run = CudaPart(part.program_at_level(), *held, gpu, **options)
            steps.append(Step(run, step.inputs, step.outputs, step.done))
        known = self._interface.leaves
        leaves = [leaf.to(where) if isinstance(leaf, Tensor) else leaf for leaf in known]
        return Engine(steps, replace(self._interface, leaves=leaves))

    def _run(self, inputs: list[Tensor], dtype: torch.dtype | None) -> Any:
        batch = inputs[self._batch].shape[0]
        sizes = () if self._rules is None else self._sizes_of(inputs)
        with torch.no_grad():
            tensors: dict[int, Tensor] = {
                number: x.detach().float() if port.is_float else x.detach()
                for number, (x, port) in enumerate(zip(inputs, self.inputs, strict=True))
            }
            for step in self._steps:
                operands = [tensors[number] for number in step.inputs]
                results = step.results(batch, operands, sizes)
                tensors.update(zip(step.outputs, results, strict=True))
                for number in step.done:
                    del tensors[number]
            leaves = [
                tensors[leaf.number]
                if isinstance(leaf, Leaf)
                else leaf.clone()  # a caller may write into it
                if isinstance(leaf, Tensor)
                else leaf
                for leaf in self._interface.leaves
            ]
            if dtype is not None and dtype is not torch.float32:
                # Of a result that is no float (a class, a mask) the type says what it is.
                leaves = [
                    leaf.to(dtype)
                    if isinstance(leaf, Tensor) and leaf.is_floating_point()
                    else leaf
                    for leaf in leaves
                ]
        return pytree.tree_unflatten(leaves, self._interface.out_spec)

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
            rows += rows_of(step, batch, workers, operands, rounds)
            if tensors:
                results = step.results(batch, operands)
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
            program = step.run.program_at_level()
            kinds = program.constants()
            for op, name, _, _, _, _, constants in program.nodes():
                layer = op in ("conv", "conv_transpose", "float_conv", "recurrence", "linear")
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
        detection: Mapping[str, Any] | Detection | None = None,
    ) -> int:
        """Write a ``.ada`` file, which :func:`adalayer_native.load` and the C API read.

        Args:
            preprocessing: what the images need, JSON data; default: what the engine was loaded
                with. class_names: one name per class.
            detection: of a detector which outputs are boxes and scores, with the fields that
                :mod:`adalayer_native.detection` lists.

        Returns:
            Bytes of the file.

        Raises:
            FileFormatError: ``detection`` makes no sense, or the model has no such outputs.
            UnsupportedModelError: some nodes run in torch; names them.
            OSError: the file cannot be written; nothing is left behind.
        """
        part = self._part_of_a_file()
        # A copy: what one file says, the next one need not.
        program = program_of(part.program.to_bytes())
        said: dict[str, Any] = {}
        if preprocessing is not None:
            said["preprocessing"] = dict(preprocessing)
        if class_names is not None:
            said["class_names"] = [str(name) for name in class_names]
        if detection is not None:
            said["detection"] = self._fitting(detection)
        interface = replace(self._interface, **said)
        metadata = metadata_of(interface, self._steps[0], part.outputs)
        for key, value in metadata.items():
            program.set_metadata(key, json.dumps(value))
        with replacing(path) as temporary:
            program.save(os.fspath(temporary))
            return os.stat(temporary).st_size

    def _fitting(self, detection: Mapping[str, Any] | Detection) -> Detection:
        """What is said of a detector, if it fits the results."""
        given = detection.as_dict() if isinstance(detection, Detection) else detection
        found = Detection.from_dict(given)
        zeros = [np.zeros((self.least_batch, *port.shape), np.float32) for port in self.inputs]
        result = named(self.run_flat(zeros))
        found.check({name: value.shape[1:] for name, value in result.items()})
        return found

    def _part_of_a_file(self) -> NativePart:
        """All there is, or an error that says what runs in torch."""
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
        return part

    def __repr__(self) -> str:
        ports = ", ".join(f"{port.name}{port}" for port in self.inputs)
        if self.levels > 1:
            ports += f"; level {self.quality} of {self.levels}"
        kinds = [isinstance(step.run, NativePart) for step in self._steps]
        parts = (
            "native" if all(kinds) else f"{sum(kinds)} native and {kinds.count(False)} torch parts"
        )
        where = "" if self.device.type == "cpu" else f" on {self.device}"
        return f"Engine({ports}; {parts}{where})"


def _cache(
    held: _C.SizedEngine | _C.LeveledEngine, entries: int | None, max_bytes: int | None
) -> dict[str, int]:
    """What a cache holds, with limits that are set where they are given."""
    info: dict[str, int] = held.info()
    if entries is None and max_bytes is None:
        return info
    limits = (
        info["most_entries"] if entries is None else entries,
        info["most_bytes"] if max_bytes is None else max_bytes,
    )
    if min(limits) < 1:
        raise ValueError(f"expected limits of 1 or more, got {limits}")
    held.set_limits(*limits)
    return dict(held.info())
