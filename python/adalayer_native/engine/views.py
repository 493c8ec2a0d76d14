"""Tensors of the exported graph as strided views of program values.

A program value has the axes c, h and w. A tensor of the graph may show the same numbers with its
axes split, merged or in another order (flatten, permute, the three steps of a channel shuffle).
Such operations cost nothing until a reader needs another order in memory; most never do.

A view lists, for every axis of the tensor but the batch, its *atoms* ``(size, stride)`` from the
outermost to the innermost, with strides in elements of the flat c x h x w image. Atoms of size 1
are left out and neighbours that continue each other are merged, so that equal views compare equal.

In most tensors the batch is the first axis and no view mentions it; with other axes merged into it,
these are the view's first. Where it lies elsewhere for a while (``[tokens, batch, features]``), all
axes are listed and the batch is an atom like others, :data:`BATCH`: a prime that divides no size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Atom = tuple[int, int]
Dims = tuple[tuple[Atom, ...], ...]
Size = tuple[int, int, int]  # c, h, w
Positions = npt.NDArray[np.int64]
BATCH: Atom = ((1 << 61) - 1, -1)


@dataclass(frozen=True)
class Ref:
    """A tensor of the graph: a program value and how the tensor shows it."""

    value: int
    dims: Dims


def is_scattered(dims: Dims) -> bool:
    """Whether the view lists the batch, which then is not the tensor's first axis."""
    return any(BATCH in atoms for atoms in dims)


def with_batch(dims: Dims, folds: int) -> Dims:
    """A view with the batch among its axes; ``folds`` as of :meth:`Exported.folds`."""
    if is_scattered(dims):
        return dims
    return ((BATCH, *dims[0]), *dims[1:]) if folds > 1 else ((BATCH,), *dims)


def without_batch(dims: Dims) -> Dims:
    """The same view without the batch, where that comes first; the inverse of the above."""
    first = dims[0]
    if first[:1] != (BATCH,):
        return dims
    return dims[1:] if len(first) == 1 else (first[1:], *dims[1:])


def merged(atoms: Iterable[Atom]) -> tuple[Atom, ...]:
    """The canonical form of one axis."""
    found: list[Atom] = []
    for size, stride in atoms:
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return tuple(found)


def axis_atoms(size: Size) -> dict[str, Atom]:
    """The atom of every axis of a value."""
    c, h, w = size
    return {"c": (c, h * w), "h": (h, w), "w": (w, 1)}


def built(axes: Sequence[str], size: Size) -> Dims:
    """The view whose k-th axis is the axes ``axes[k]`` of the value, in that order."""
    atoms = axis_atoms(size)
    return tuple(merged(atoms[axis] for axis in name) for name in axes)


def image_dims(size: Size) -> Dims:
    """The plain view [batch, c, h, w]."""
    return built(("c", "h", "w"), size)


def axes_of(dims: Dims, size: Size) -> list[str] | None:
    """The inverse of :func:`built`: whole axes in each axis of the view; None if one is split.

    Axes of size 1 are nowhere.
    """
    combinations = {built((name,), size)[0]: name for name in ("chw", "hw", "ch", "w", "h", "c")}
    ones = {axis for axis, (n, _) in axis_atoms(size).items() if n == 1}
    found = []
    for atoms in dims:
        names = ""
        for atom in atoms:
            name = combinations.get((atom,))
            if name is None:
                return None
            names += "".join(axis for axis in name if axis not in ones)
        found.append(names)
    return found


def channel_axis(dims: Dims, size: Size) -> int | None:
    """Which axis of the view is the whole channel axis alone.

    With a single channel any axis of size 1 could be; the first is taken, as in [N, C, H, W].
    """
    target = merged([axis_atoms(size)["c"]])
    for axis, atoms in enumerate(dims):
        if atoms == target:
            return axis
    return None


def reshaped(dims: Dims, sizes: Sequence[int]) -> Dims | None:
    """The view after a reshape to ``sizes`` (batch left out); None if it needs a copy."""
    flat = [list(atom) for atoms in dims for atom in atoms]
    out: list[tuple[Atom, ...]] = []
    for size in reversed(sizes):
        taken: list[Atom] = []
        missing = size
        while missing > 1:
            if not flat:
                return None
            n, stride = flat[-1]
            if missing % n == 0:
                taken.append((n, stride))
                missing //= n
                flat.pop()
            elif n % missing == 0:
                taken.append((missing, stride))
                flat[-1] = [n // missing, stride * missing]
                missing = 1
            else:
                return None
        out.append(merged(reversed(taken)))
    return None if flat else tuple(reversed(out))


def outer_sum(tables: Iterable[Positions]) -> Positions:
    """Every sum of one entry of each table, those of the last table next to each other."""
    found = np.zeros(1, dtype=np.int64)
    for table in tables:
        found = np.add.outer(found, table).reshape(-1)
    return found


def offsets(atoms: Sequence[Atom]) -> Positions:
    """The number in the flat image of every position along one axis of a view; of one sample."""
    return outer_sum(np.arange(n) * stride for n, stride in atoms if (n, stride) != BATCH)


def arranged_as(axes: str, sizes: Sequence[int]) -> tuple[Size, Dims]:
    """Size and view of a value whose axes hold those of a tensor, by a letter for each of them.

    Axes with the same letter become one, the first of them the outermost.
    """
    groups = [[k for k, axis in enumerate(axes) if axis == part] for part in "chw"]
    c, h, w = (math.prod(sizes[k] for k in group) for group in groups)
    dims: list[tuple[Atom, ...]] = [()] * len(axes)
    for group, stride in zip(groups, (h * w, w, 1), strict=True):
        for axis in reversed(group):
            dims[axis] = merged([(sizes[axis], stride)])
            stride *= sizes[axis]
    return (c, h, w), tuple(dims)


def in_order(values: npt.NDArray[Any], dims: Dims, size: Size) -> npt.NDArray[Any]:
    """Elements of a tensor that a view shows, as programs hold constants: ``[h, w, c]``.

    Args:
        values: of one sample, in the order of the tensor.

    Raises:
        ValueError: the view does not show every element of the value once.
    """
    places = outer_sum(offsets(atoms) for atoms in dims)
    shown = np.zeros(math.prod(size), dtype=bool)
    shown[places] = True
    if not values.size == places.size == shown.size or not shown.all():
        raise ValueError(f"a view of {places.size} elements of a value of {size}")
    flat = np.empty_like(values, shape=places.size)
    flat[places] = values.reshape(-1)
    return flat.reshape(size).transpose(1, 2, 0)


def channel_order(dims: Dims, size: Size) -> list[int] | None:
    """Input channel of every channel of the view, if it permutes the channels and nothing else."""
    c, h, w = size
    if len(dims) not in (1, 3) or math.prod(n for n, _ in dims[0]) != c:
        return None
    if len(dims) == 3 and dims[1:] != image_dims(size)[1:]:
        return None
    if len(dims) == 1 and h * w != 1:
        return None
    if any(stride % (h * w) for _, stride in dims[0]):
        return None
    steps = [[i * stride // (h * w) for i in range(n)] for n, stride in dims[0]]
    return [sum(parts) for parts in itertools.product(*steps)]
