"""An engine for a range of sizes, from a model that is exported at several of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adalayer_native import _C
from adalayer_native.capture import GraphModel, Inputs
from adalayer_native.capture.example import at_least_two
from adalayer_native.capture.exporting import branches_in, broken_guards
from adalayer_native.engine.fitting import (
    Shown,
    Unexplained,
    first_difference,
    fit_nodes,
    fit_output,
)
from adalayer_native.engine.parts import NativePart
from adalayer_native.engine.results import Output, Port
from adalayer_native.engine.runtime import Engine
from adalayer_native.engine.sizes import KEY, Axis, SizeRules, asked_for
from adalayer_native.errors import UnsupportedModelError

__all__ = ["ranged"]

Sizes = tuple[int, ...]


class Lowered(Protocol):
    """A program, and how tensors show its outputs."""

    @property
    def program(self) -> _C.Program: ...
    @property
    def outputs(self) -> Sequence[Output]: ...


Lower = Callable[[Inputs], Lowered]
"""The program of the same model for an example of another size."""

# Results of larger images are not computed to compare two programs.
_MOST_COMPARED = 1 << 22


def ranged(model: nn.Module, engine: Engine, inputs: Inputs, sizes: Any, lower: Lower) -> Engine:
    """The same engine for a range of sizes.

    Args:
        inputs: the example that it was compiled with.
        sizes: see :func:`adalayer_native.compile`.
        lower: lowers the model at another size, with the same layers in float.

    Raises:
        ValueError: ``sizes`` is not understood, or about no input of the model.
        UnsupportedModelError: the model does something else at some sizes, or a node is not known
            to follow them; says which.
    """
    axes, free = asked_for(sizes, engine.inputs)
    part = engine.only_part()
    if part is None:
        raise UnsupportedModelError(
            "sizes: parts of the model run in torch, which are made for one size; compile with "
            "strict=True to see which"
        )
    boundary = _boundary(engine, part, free)
    ranges = [
        (axis.name, range(axis.size.first, axis.size.last + 1, axis.size.multiple_of))
        for axis in axes
    ]
    places = [
        {place + port.batched: item for place, item in enumerate(own) if item is not None}
        for port, own in zip(engine.inputs, free, strict=True)
    ]
    compiled = _sizes_of(engine.inputs, free, len(axes))
    try:
        example = at_least_two(inputs)
        if isinstance(model, GraphModel):  # refuses sizes that its code would branch on
            for other, shown in broken_guards(model.signature.guards, example, places, ranges):
                raise UnsupportedModelError(
                    f"it was captured where {shown}, which {_text(axes, other)} does not meet"
                )
        branches = dict(branches_in(model, example, places, ranges))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"sizes: {type(model).__name__} does not take all of "
            f"{', '.join(f'{axis.name} {axis.size}' for axis in axes)}: {error}"
        ) from error
    probes: dict[Sizes, Lowered] = {compiled: part}
    for other in dict.fromkeys((*_others(axes, compiled), *branches)):
        why = f", where it asks whether {branches[other]}" if other in branches else ""
        try:
            probes[other] = lower(_example(inputs, engine.inputs, free, other))
        except UnsupportedModelError as error:
            text = f"sizes: at {_text(axes, other)}{why}: {error}"
            raise UnsupportedModelError(text) from error
    rules = _rules(axes, free, boundary, probes)
    program = part.program
    program.set_metadata(KEY, rules.as_text())
    for other, wanted in probes.items():
        _check(program, wanted, _text(axes, other), other)
    return engine.with_part(NativePart(program, part.outputs, part.weights, plan=part.plan))


def _text(axes: Sequence[Axis], sizes: Sizes) -> str:
    return ", ".join(f"{axis.name} {n}" for axis, n in zip(axes, sizes, strict=True))


def _sizes_of(ports: Sequence[Port], free: Sequence[Sequence[int | None]], count: int) -> Sizes:
    """Sizes of the axes in the example."""
    found = [0] * count
    for port, axes in zip(ports, free, strict=True):
        for n, axis in zip(port.shape, axes, strict=True):
            if axis is not None:
                if found[axis] not in (0, n):
                    raise ValueError(
                        f"sizes: axes of one name have {found[axis]} and {n} in the example"
                    )
                found[axis] = n
    return tuple(found)


def _boundary(
    engine: Engine, part: NativePart, free: Sequence[Sequence[int | None]]
) -> list[tuple[int | None, int | None]]:
    """Which axes height and width of the program's inputs are."""
    found = []
    values = part.program.values()
    for number, place in zip(part.program.inputs(), engine.order(), strict=True):
        port, axes = engine.inputs[place], free[place]
        c, h, w = values[number][2:5]
        # Sizes go to c, h and w from the front; those of ids to the width.
        ids = values[number][1] == "i32"
        if ids:
            known: dict[int, int] = {len(port.shape) - 1: 1} if port.shape[-1:] == (w,) else {}
        else:
            shown = (*port.shape, 1, 1)[:3] == (c, h, w) and len(port.shape) <= 3
            known = {1: 0, 2: 1} if shown else {}
        sides: list[int | None] = [None, None]
        for axis, item in enumerate(axes):
            if item is None:
                continue
            if axis not in known:
                raise UnsupportedModelError(
                    f"sizes: axis {axis + port.batched} of input {port.name!r} is neither height "
                    "nor width of an image, nor the length of a text"
                )
            sides[known[axis]] = item
        found.append((sides[0], sides[1]))
    return found


def _others(axes: Sequence[Axis], compiled: Sizes) -> list[Sizes]:
    """Sizes to lower the model at beside the compiled one.

    The ends of the ranges: a size inside of a network that is the same there is the same in
    between, since none shrinks where an image grows. Others between them tell height, width and
    constants apart, and what is rounded up from what is rounded down.
    """

    def near(axis: Axis, wanted: float) -> int:
        step, size = axis.size.multiple_of, axis.size
        return min(max(round(wanted / step) * step, size.first), size.last)

    pairs = list(zip(axes, compiled, strict=True))
    found = []
    for flip in (0, 1):
        found.append(
            tuple(a.size.last if (k + flip) % 2 == 0 else a.size.first for k, a in enumerate(axes))
        )
    for small, large in ((0.7, 1.4), (1.25, 0.8)):
        # (The next odd number of steps.)
        found.append(
            tuple(
                near(a, (large if k % 2 else small) * n + a.size.multiple_of)
                for k, (a, n) in enumerate(pairs)
            )
        )
    found.append(tuple(near(a, n + a.size.multiple_of * (k + 1)) for k, (a, n) in enumerate(pairs)))
    found.append(tuple(axis.size.first for axis in axes))
    return [sizes for sizes in dict.fromkeys(found) if sizes != compiled]


def _example(
    inputs: Inputs, ports: Sequence[Port], free: Sequence[Sequence[int | None]], sizes: Sizes
) -> Inputs:
    """An example of other sizes, of zeros."""
    pending = iter(zip(ports, free, strict=True))

    def resized(tensor: Tensor) -> Tensor:
        port, own = next(pending)
        shape = list(tensor.shape)
        for place, axis in enumerate(own):
            if axis is not None:
                shape[place + port.batched] = sizes[axis]
        if port.batched:
            shape[0] = max(2, shape[0])
        # (Values do not matter to an export, and a batch of images may be large.)
        return tensor.new_zeros([1] * len(shape)).expand(shape)

    return inputs.map(resized)


def _rules(
    axes: Sequence[Axis],
    free: Sequence[Sequence[int | None]],
    boundary: Sequence[tuple[int | None, int | None]],
    probes: dict[Sizes, Lowered],
) -> SizeRules:
    shown = {sizes: Shown(probe.program) for sizes, probe in probes.items()}
    first = next(iter(shown.values()))
    # Where a map has shrunk to one pixel, steps are left out that do nothing there. What the rules
    # make of such a size is compared by results.
    alike = {
        sizes: other
        for sizes, other in shown.items()
        if [node[:4] for node in other.nodes] == [node[:4] for node in first.nodes]
    }
    if len(alike) < min(3, len(shown)):
        raise UnsupportedModelError(
            f"sizes: the model is another program at "
            f"{' and '.join(_text(axes, s) for s in shown if s not in alike)}"
        )
    try:
        nodes = fit_nodes(list(alike.values()))
    except Unexplained as error:
        op, name = first.nodes[error.node][:2]
        raise UnsupportedModelError(
            f"sizes: node {error.node} ({op} {name!r}): {error} (compiled at "
            f"{'; '.join(_text(axes, s) for s in alike)})"
        ) from None
    outputs = []
    for k, output in enumerate(next(iter(probes.values())).outputs):
        value = first.outputs[output.source]
        sides = [item.sides(value) for item in alike.values()]
        whole = [item.size(value) for item in alike.values()]
        views: list[Output] = [probes[sizes].outputs[k] for sizes in alike]
        rule = fit_output(views, sides, whole)
        if rule is None:
            raise UnsupportedModelError(
                f"sizes: the shape of result {k}, {[list(view.shape) for view in views]}, follows "
                "no rule that is known"
            )
        outputs.append(rule)
    return SizeRules(tuple(axes), tuple(boundary), tuple(map(tuple, free)), nodes, tuple(outputs))


def _check(program: _C.Program, wanted: Lowered, text: str, sizes: Sizes) -> None:
    """Whether the rules make of the program what was lowered at some sizes."""
    try:
        made = program.at_size(list(sizes))
    except (ValueError, RuntimeError) as error:
        raise UnsupportedModelError(f"sizes: at {text}: {error}") from None
    one, other = Shown(made), Shown(wanted.program)
    difference = first_difference(one, other)
    if difference is None:
        return
    if len(one.nodes) == len(other.nodes) or not _same_results(made, wanted.program):
        raise UnsupportedModelError(f"sizes: at {text} the model is another program ({difference})")


def _same_results(made: _C.Program, wanted: _C.Program) -> bool:
    """Whether two programs compute the same bits from noise."""
    values = wanted.values()
    sizes = [values[number][2:5] for number in wanted.inputs()]
    kinds = {values[number][1] for number in wanted.inputs()}
    same = [made.values()[number][2:5] for number in made.inputs()] == sizes
    if not same or kinds != {"f32"} or sum(map(math.prod, sizes)) > _MOST_COMPARED:
        return False
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, *size, generator=generator) for size in sizes]
    results = []
    for program in (made, wanted):
        shown = program.values()
        outs = [torch.empty(2, *shown[number][2:5]) for number in program.outputs()]
        engine = _C.Engine(program, weights="streamed")
        addresses, targets = ([t.data_ptr() for t in group] for group in (inputs, outs))
        engine.run(addresses, [False] * len(inputs), 2, targets, 1)
        results.append(outs)
    return all(
        a.shape == b.shape and bool((a.view(torch.int32) == b.view(torch.int32)).all())
        for a, b in zip(*results, strict=True)
    )
