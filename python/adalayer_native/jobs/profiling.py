"""``profile``: the latencies of this machine in a file, for plans that are made elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .._console import print_table, say
from .._files import found_at, refuse_overwriting
from ..allocation.latencies import program_of
from ..allocation.machine_table import MachineTable
from ..allocation.options import Option
from ..allocation.problem import Problem
from ..allocation.profiling import instruction_set, options_of, profile
from ..capture import Inputs, capture
from ..engine import Engine, load
from ..engine.parts import NativePart
from ..engine.shapes import has_weights, shapes_of
from ..errors import DataError, FileFormatError, PlanError
from ..models import load_weights
from ..plan import MAX_BITS
from .job import ProfileJob
from .opening import build

__all__ = ["run_profile"]

# Engines of one network, by the bits of its layers' inputs.
FILES = "inputs{}.ada"
Programs = dict[int | None, Engine]


def run_profile(job: ProfileJob) -> dict[str, Any]:
    """Measures and writes ``OUT``, or writes the folder ``SHAPES``; returns what it says about it.

    Raises:
        AdaError: a file, model or shape that does not fit, an instruction set that this machine
            lacks, or parts that run in torch. OSError: the output cannot be written.
    """
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    source = Path(job.model)
    if job.out is not None:
        refuse_overwriting(job.out, source, job.weights)
    if job.shapes is not None:
        programs = _built(job)
        for width, engine in programs.items():
            engine.save(job.shapes / FILES.format(width or MAX_BITS))
        say(
            f"written to {job.shapes}: {', '.join(FILES.format(w or MAX_BITS) for w in programs)}; "
            f"on the other machine: adalayer profile {job.shapes.name} --out FILE"
        )
        return {"folder": str(job.shapes), "files": len(programs)}
    with instruction_set(job.isa):
        saved = source.is_dir() or source.suffix == ".ada"
        programs = _saved(source, job.input_bits) if saved else _built(job)
        widths = [width for width in programs if width is not None]
        table = profile(
            programs,
            options_of(job.bits, job.sparsities, job.patterns, widths),
            batch=job.batch,
            threads=job.threads,
            partial=job.out.with_name(f"{job.out.name}.part"),
            progress=job.progress,
        )
        table.save(job.out)
    widest, milliseconds = table.widths[-1], _call(table, programs[None])
    print_table(_shown(table), Console(stderr=True))
    say(
        f"written to {job.out}: {table.title}; {milliseconds:.3g} ms per call with {widest} bits "
        "everywhere"
    )
    return {
        "file": str(job.out),
        "machine": table.machine,
        "batch": table.batch,
        "options": len(table.options),
        "shapes": len(table.shapes),
        "bits": widest,
        "milliseconds": milliseconds,
    }


def _built(job: ProfileJob) -> Programs:
    """The network of a model, with 8 bits everywhere and with every other width of inputs."""
    torch.manual_seed(0)  # so that weights, if they are drawn, are the same in the next run
    model = build(job.model, None, job.classes, job.input_shape[-1])
    if job.weights is not None:
        load_weights(model, job.weights)
    model.eval()
    x = torch.rand(1, *job.input_shape)
    problem = Problem(capture(model, x), None, exclude=job.exclude)
    widths = sorted(set(job.input_bits), reverse=True)
    return {
        width: program_of(problem, Inputs.of(x), job.batch, width, strict=True)
        for width in (None, *widths)
    }


def _saved(source: Path, wanted: tuple[int, ...]) -> Programs:
    """The same from files.

    Raises:
        FileFormatError: there are none. PlanError: none of some width that is wanted.
    """
    if not source.is_dir():
        if not source.is_file():
            raise FileFormatError(f"{source}: {found_at(source)}; expected an .ada file")
        return {None: load(source)}
    found = {}
    for path in source.glob(FILES.format("*")):
        number = path.stem.removeprefix("inputs")
        if number.isdecimal():
            found[int(number)] = path
    if not found:
        raise DataError(
            f"{source}: expected files {FILES.format('8')} and the like, as `adalayer profile "
            "--shapes` writes them; there are none"
        )
    usual = max(found)
    widths = sorted(set(wanted), reverse=True)
    for width in widths:
        if width not in found or width == usual:
            raise PlanError(
                f"{source}: expected {FILES.format(width)} beside {FILES.format(usual)} for inputs "
                f"of {width} bits (--input-bits), got files for {sorted(found)}"
            )
    return {None: load(found[usual]), **{width: load(found[width]) for width in widths}}


def _call(table: MachineTable, engine: Engine) -> float:
    """Milliseconds of the whole network with the most bits everywhere, by the table."""
    part = engine._steps[0].run
    assert isinstance(part, NativePart)
    every = Option(table.widths[-1])
    shapes = shapes_of(part.program)
    return sum(table.time(s, every if has_weights(s) else None) for s in shapes) / 1000


def _shown(table: MachineTable) -> Table:
    """A row per layer shape, at all widths without zeros."""
    shown = Table(title=f"Microseconds per layer: {table.title}")
    shown.add_column("Layer")
    for bits in table.widths:
        shown.add_column(f"{bits} bits", justify="right")
    shown.add_column(f"Ran at {table.widths[-1]} bits")
    for shape, times in table.shapes.items():
        if has_weights(shape):
            cells = [f"{table.time(shape, Option(bits)):.1f}" for bits in table.widths]
            last = table.options.index(Option(table.widths[-1]))
            shown.add_row(shape, *cells, times.kernels[last])
    return shown
