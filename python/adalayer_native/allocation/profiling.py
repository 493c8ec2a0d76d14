"""Measures the latencies of this machine for :class:`MachineTable`."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .. import _C, ops
from .._progress import ProgressBar
from ..engine.latency import LayerTimes, NodeTime, TimesByWidth, layer_of
from ..engine.parts import NativePart
from ..engine.runtime import Engine
from ..engine.shapes import WEIGHTED, has_weights, shapes_of
from ..errors import FileFormatError, PlanError, UnsupportedModelError
from .machine_table import MachineTable, ShapeTimes
from .options import UNSTRUCTURED, Option
from .store import machine

__all__ = ["instruction_set", "options_of", "profile"]


def options_of(
    widths: Sequence[int],
    sparsities: Sequence[float],
    patterns: Sequence[str],
    input_widths: Sequence[int] = (),
) -> list[Option]:
    """The columns of a table, the usual inputs first; unpruned weights are there once."""
    return [
        Option(bits, sparsity, pattern if sparsity > 0 else UNSTRUCTURED, activation_bits)
        for activation_bits in (None, *input_widths)
        for pattern in patterns
        for bits in widths
        for sparsity in ((0.0, 0.5) if pattern == "2:4" else sparsities)
        if sparsity > 0 or pattern == UNSTRUCTURED
    ]


@contextmanager
def instruction_set(name: str | None) -> Iterator[None]:
    """One instruction set within; ``None``: the one in use.

    Raises:
        PlanError: this machine lacks it, or has no kernels for it to be measured with.
    """
    before = ops.active_isa()
    known = [isa for isa in ops.isas() if isa != "scalar"]  # its nodes have no profile
    wanted = before if name is None else name
    if wanted not in known:
        raise PlanError(
            f"instruction set {wanted!r} cannot be measured on this machine "
            f"({machine()['cpu']}): expected one of {', '.join(known) or 'none'}"
        )
    ops.force_isa(wanted)
    try:
        yield
    finally:
        ops.force_isa(before)


def profile(
    programs: Mapping[int | None, Engine],
    options: Sequence[Option],
    *,
    batch: int = 1,
    threads: int | None = None,
    partial: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> MachineTable:
    """The latencies of a network's nodes with every option, on this machine.

    All layers get one width and sparsity at once, the program is planned for them by the clock, and
    its profile divides the time of a call among the nodes
    (:class:`~adalayer_native.engine.latency.LayerTimes`).

    Args:
        programs: the network as an engine with inputs of the usual bits (``None``), and of the
            other bits that options name.
        options: what is measured.
        batch: images per call.
        threads: threads per call; default: those of ``ops.get_num_threads()``.
        partial: a file that keeps what is measured until all of it is: an interrupted run goes on
            there. It is removed at the end.
        progress: show a progress bar.

    Raises:
        UnsupportedModelError: a network with parts that run in torch, or without layers.
        PlanError: programs that are not of one network.
        OSError: ``partial`` cannot be written.
    """
    program = _program(programs[None])
    weighted = [node for node in program.nodes() if node[0] in WEIGHTED]
    if not weighted:
        raise UnsupportedModelError("expected a network with layers of packed weights, got none")
    expected = _layer_shapes(programs[None])
    for width, engine in programs.items():
        if _layer_shapes(engine) != expected:
            raise PlanError(
                f"the program with inputs of {width} bits is of another network: expected layers "
                f"{expected}, got {_layer_shapes(engine)}"
            )
    layers = {layer_of(node[1]) for node in weighted}
    values = program.values()
    activation_bits = max(values[node[2][0]][7] for node in weighted).bit_length()
    table = MachineTable(machine(threads), batch, activation_bits, programs=_digest(programs))
    if partial is not None:
        table = _resumed(table, Path(partial))

    def made(width: int | None, beside: LayerTimes | None) -> LayerTimes:
        found = LayerTimes(programs[width], layers, batch=batch, threads=threads, beside=beside)
        if width is None:
            found.reference = table.reference
        return found

    times = TimesByWidth(made)
    missing = [option for option in options if option not in table.options]
    bar = ProgressBar("measuring latencies", len(options), unit="option", enabled=progress)
    with bar:
        bar.advance(len(options) - len(missing))
        for option in missing:
            assert option.bits is not None
            setting = option.bits, option.sparsity, option.pattern
            same = times.same(option.activation_bits, *setting)
            # Where narrower inputs change nothing at all, the column is that of the usual ones.
            width = None if same.issuperset(layers) else option.activation_bits
            if width is None and option.activation_bits is not None:
                _repeat(table, option)
            else:
                _add(table, option, times(width).nodes(*setting), same)
            table.reference = times().reference
            if partial is not None:
                table.save(partial)
            bar.advance(1, option.name)
    if partial is not None:
        Path(partial).unlink(missing_ok=True)
    return table


def _add(table: MachineTable, option: Option, nodes: Sequence[NodeTime], same: set[str]) -> None:
    """One column; layers in ``same``, and what is no layer, take as long as with usual inputs."""
    alike: dict[str, list[NodeTime]] = {}
    for node in nodes:
        alike.setdefault(node.shape, []).append(node)
    if option.activation_bits is not None:
        alike = {shape: found for shape, found in alike.items() if has_weights(shape)}
        usual = table.options.index(option.weight)
        for shape, entry in table.shapes.items():
            if not has_weights(shape):
                entry.microseconds.append(entry.microseconds[usual])
    for shape, found in alike.items():
        entry = table.shapes.setdefault(shape, ShapeTimes())
        times = [
            table.time(shape, option.weight) if node.layer in same else node.microseconds
            for node in found
        ]
        entry.microseconds.append(round(sum(times) / len(times), 4))
        if has_weights(shape):
            entry.kernels.append(found[0].kernel)
    table.options.append(option)


def _repeat(table: MachineTable, option: Option) -> None:
    """A column like that of the usual inputs."""
    column = table.options.index(option.weight)
    for entry in table.shapes.values():
        entry.microseconds.append(entry.microseconds[column])
        if entry.kernels:
            entry.kernels.append(entry.kernels[column])
    table.options.append(option)


def _resumed(fresh: MachineTable, path: Path) -> MachineTable:
    """What an interrupted run left, if it was about the same; else the fresh one."""
    if not path.exists():
        return fresh
    try:
        found = MachineTable.load(path)
    except FileFormatError as error:
        warnings.warn(f"{error}; it is measured anew", stacklevel=3)
        return fresh
    for name in ("machine", "batch", "programs"):
        if getattr(found, name) != getattr(fresh, name):
            warnings.warn(
                f"{path}: left by a run with another {name.rstrip('s')}: expected "
                f"{getattr(fresh, name)}, got {getattr(found, name)}; it is measured anew",
                stacklevel=3,
            )
            return fresh
    return found


def _digest(programs: Mapping[int | None, Engine]) -> str:
    digest = hashlib.sha256()
    for width, engine in programs.items():
        digest.update(f"{width}:".encode() + _program(engine).to_bytes())
    return digest.hexdigest()


def _layer_shapes(engine: Engine) -> list[str]:
    return [shape for shape in shapes_of(_program(engine)) if has_weights(shape)]


def _program(engine: Engine) -> _C.Program:
    part = engine._steps[0].run
    if len(engine._steps) > 1 or not isinstance(part, NativePart):
        raise UnsupportedModelError(
            "expected a network that the engine runs whole, got one with parts in torch "
            "(engine.coverage() names them)"
        )
    return part.program
