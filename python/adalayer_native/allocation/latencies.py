"""The latency table of method "optimal": measured here, or on another machine before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from .. import ops
from ..capture import Inputs
from ..engine.compiler import compile as compile_engine
from ..engine.latency import LayerTimes, TimesByWidth, layer_of
from ..engine.parts import NativePart
from ..engine.runtime import Engine
from ..engine.shapes import WEIGHTED, shapes_of
from ..errors import PlanError
from ..importance.batches import model_digest
from ..plan import MAX_BITS
from ..quantization import calibrate, convert, prepare
from .layer_table import LayerTable, Measured
from .machine_table import MachineTable, Task
from .optimal_settings import Settings
from .options import UNSTRUCTURED, Choice, Option
from .problem import Problem
from .store import Store, cache_dir, machine

__all__ = ["latency_table", "machine_latencies", "program_of", "repeated", "sizes_of"]


def sizes_of(x: Inputs) -> list[Any]:
    """The sizes of one sample, as JSON values; of a single input without a list around it."""
    found = [list(tensor.shape[1:]) for tensor in x.tensors()]
    return found[0] if len(found) == 1 else found


def repeated(x: Inputs, count: int) -> Inputs:
    """A batch of so many equal samples, from one."""

    def grown(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != 1:
            return tensor
        return tensor.expand(count, *tensor.shape[1:]).contiguous()

    return x.map(grown)


def latency_table(
    problem: Problem,
    x: Inputs | torch.Tensor,
    settings: Settings,
    *,
    patterns: Sequence[str] = (UNSTRUCTURED,),
    input_widths: Sequence[int] = (),
    progress: bool = True,
) -> LayerTable:
    """Microseconds of every layer with every option, in the engine on this machine.

    Measured inside the whole program, as the engine's planner does it: all layers get their own
    weights at one width, sparsity and pattern at once, the program is planned for them by the
    clock, and its profile divides the time of a whole call among the layers
    (:class:`~adalayer_native.engine.latency.LayerTimes`). So it is with inputs of other widths;
    layers for which these bring no other form are not measured again.

    Args:
        problem: layers.
        x: an input of one sample.
        settings: batch, threads, widths, sparsities, cache directory.
        patterns: of the zeros.
        input_widths: bits of the inputs, besides the usual ones.
        progress: show a progress bar.
    """
    x = Inputs.of(x)
    key = {
        "model": model_digest(problem.model),
        "input": sizes_of(x),
        "batch": settings.latency_batch,
        "pinned": sorted([n, *o.values] for n, o in problem.pinned.items() if o.bits is not None),
        "float": sorted(set(problem.layers) - set(problem.free) - set(problem.pinned)),
        "activation_bits": problem.activation_bits,
        **machine(settings.threads),
    }
    store = Store(cache_dir(settings.directory), "latency", key)

    def made(width: int | None, beside: LayerTimes | None) -> LayerTimes:
        batch, threads = settings.latency_batch, settings.threads
        engine = program_of(problem, x, batch, width)
        found = LayerTimes(engine, problem.free, batch=batch, threads=threads, beside=beside)
        if width is None and " reference" in store:
            found.reference = store[" reference"]
        return found

    times = TimesByWidth(made)

    def measure(name: str, option: Option) -> float:
        """A column: all layers at once; what is no layer of ours goes by the name ''."""
        assert option.bits is not None
        setting = option.bits, option.sparsity, option.pattern
        usual = option.weight.name  # in front: the widths of inputs are the outer loop
        same = times.same(option.activation_bits, *setting)
        if not same.issuperset(times().layers):
            layers, other = times(option.activation_bits).column(*setting)
        else:
            layers, other = {}, store[f" {usual}"]
        reference = times().reference
        if reference is not None:
            store[" reference"] = reference
        for each in problem.free:
            value = store[f"{each} {usual}"] if each in same else layers.get(each, 0.0)
            store[f"{each} {option.name}"] = value
        store[f" {option.name}"] = other
        return store[f"{name} {option.name}"]

    table = Measured("latency", "µs", problem.free, measure, store).tables(
        settings.widths,
        settings.sparsities_of,
        patterns,
        inputs=(None, *input_widths),
        progress=progress,
    )
    table.constant = float(np.median([store[f" {option.name}"] for option in table.options()]))
    table.about = {"batch": settings.latency_batch, **machine(settings.threads)}
    return table


def machine_latencies(
    problem: Problem,
    x: Inputs | torch.Tensor,
    settings: Settings,
    *,
    patterns: Sequence[str] = (UNSTRUCTURED,),
    input_widths: Sequence[int] = (),
) -> tuple[LayerTable, Callable[[Choice], dict[str, str]]]:
    """The same as :func:`latency_table`, from the file of another machine; nothing is measured.

    Returns:
        The table, and what ran the layers of a choice there.

    Raises:
        FileFormatError: ``settings.latency_table`` cannot be used.
        PlanError: it lacks nodes of this network, or options.
        UnsupportedModelError: a part of the network runs in torch, of whose time nothing is known.
    """
    assert settings.latency_table is not None
    table = MachineTable.load(settings.latency_table)
    if table.activation_bits != problem.activation_bits:
        raise PlanError(
            f"{table.source}: measured with inputs of {table.activation_bits} bits, expected "
            f"{problem.activation_bits} (activation_bits)"
        )
    engine = program_of(problem, Inputs.of(x), settings.latency_batch, strict=True)
    part = engine._steps[0].run
    assert isinstance(part, NativePart)
    tasks = []
    for node, shape in zip(part.program.nodes(), shapes_of(part.program), strict=True):
        op, name, *_, constants = node
        layer = layer_of(name)
        if op not in WEIGHTED:
            tasks.append(Task("", shape))
        elif layer in problem.free:
            tasks.append(Task(layer, shape))
        else:  # it is decided, or no layer of the model but computed as one
            packed = bytearray(part.program.constant_bytes(constants[0]))
            bits = ops.packed_info(torch.frombuffer(packed, dtype=torch.uint8))["bits"]
            tasks.append(Task("", shape, problem.pinned.get(layer, Option(bits))))
    latency = table.latencies(
        tasks,
        problem.free,
        widths=settings.widths,
        sparsities_of=settings.sparsities_of,
        patterns=patterns,
        input_widths=input_widths,
    )
    return latency, partial(table.kernels, tasks)


def program_of(
    problem: Problem, x: Inputs, batch: int, input_width: int | None = None, *, strict: bool = False
) -> Engine:
    """The engine of all layers at 8 bits, but for what is pinned, with inputs of some bits.

    Args:
        problem: layers.
        x: an input of one sample.
        batch: images per call.
        input_width: bits of all free layers' inputs; default: the usual ones.
        strict: nothing may run in torch.

    Raises:
        UnsupportedModelError: ``strict``, and something would have to.
    """
    every = Option(MAX_BITS, activation_bits=input_width)
    plan = problem.plan(dict.fromkeys(problem.free, every))
    prepared = prepare(problem.model, plan)
    calibrate(prepared, [x], observer="minmax", progress=False)
    return compile_engine(convert(prepared), repeated(x, batch), policy="native", strict=strict)
