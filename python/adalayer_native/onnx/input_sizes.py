"""Sizes of inputs that a file leaves free: fixed by the caller, or left free in a range.

What follows the operators does so with an example, and nothing of the example's size may stay in a
network that takes others. So a network of a range of sizes is followed at several of them, which
have to give the same graph. Where operators ask for remainders (padding that follows the size,
windows that round up), what they do repeats; so all remainders by :data:`PERIOD` are tried, and
the largest size, and images that are no squares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adalayer_native.engine.sizes import Size, as_size
from adalayer_native.errors import UnsupportedModelError
from adalayer_native.onnx.reading import OnnxFile, fixed_size

__all__ = ["NOTHING", "Asked", "asked_sizes"]

PERIOD = 32  # pixels; of strides that follow each other in one network
Place = tuple[str, int]  # an input, and one of its axes


@dataclass(frozen=True)
class Asked:
    """What a caller says about the axes that a file leaves free.

    Attributes:
        fixed: sizes.
        ranged: names of axes that stay free, several places may have one.
        ranges: by name.
    """

    fixed: Mapping[Place, int]
    ranged: Mapping[Place, str]
    ranges: Mapping[str, Size]

    def at(self, sizes: Mapping[str, int] | None = None) -> dict[Place, int]:
        """Sizes of all places; the smallest of the ranges by default."""
        sizes = {name: size.first for name, size in self.ranges.items()} if sizes is None else sizes
        return {**self.fixed, **{place: sizes[name] for place, name in self.ranged.items()}}

    def others(self) -> list[dict[str, int]]:
        """Sizes by name, beside the smallest, at which the network has to be the same."""
        names = list(self.ranges)
        allowed = [
            range(size.first, size.last + 1, size.multiple_of) for size in self.ranges.values()
        ]
        found = []
        count = max(PERIOD // math.gcd(PERIOD, r.step) for r in allowed)
        for k in range(1, count + 1):
            found.append([r[min(k, len(r) - 1)] for r in allowed])
        found.append([r[-1] for r in allowed])
        for k in range(len(names) if len(names) > 1 else 0):  # one of them large, the others small
            found.append([r[-1 if i == k else 0] for i, r in enumerate(allowed)])
        smallest = tuple(r[0] for r in allowed)
        distinct = dict.fromkeys(map(tuple, found))
        return [dict(zip(names, sizes, strict=True)) for sizes in distinct if sizes != smallest]


NOTHING = Asked({}, {}, {})


def asked_sizes(file: OnnxFile, sizes: Any) -> Asked:
    """What ``sizes=`` says about a file's inputs.

    Raises:
        UnsupportedModelError: sizes or ranges that are none, or of no axis.
    """
    items: Mapping[Any, Any] = sizes if isinstance(sizes, Mapping) else {}
    whole = None if isinstance(sizes, Mapping) else _item(file, "height and width", sizes)
    named = {key: _item(file, key, item) for key, item in items.items()}
    fixed: dict[Place, int] = {}
    ranged: dict[Place, str] = {}
    ranges: dict[str, Size] = {}
    known: set[str] = set()
    for value in file.inputs:
        dims = value.type.tensor_type.shape.dim
        for axis, dim in enumerate(dims):
            own = f"{value.name}.{axis}"
            known |= {own, dim.dim_param} - {""}
            item = named.get(dim.dim_param, named.get(own)) if dim.dim_param else named.get(own)
            name = dim.dim_param or own
            if whole is not None and len(dims) == 4 and axis >= 2:
                item, name = whole, ("height", "width")[axis - 2]
            if item is None:
                continue
            said = fixed_size(dim)
            if said is not None:
                if whole is None and item != said:
                    raise UnsupportedModelError(
                        f"{file.name}: sizes: {own} is {said} in the file, got {item}"
                    )
                continue
            if isinstance(item, int):
                fixed[value.name, axis] = item
                continue
            name = item.name or name
            ranged[value.name, axis] = name
            if ranges.setdefault(name, replace(item, name=None)) != replace(item, name=None):
                raise UnsupportedModelError(
                    f"{file.name}: sizes: {name} is both {ranges[name]} and {item}"
                )
    if isinstance(whole, Size) and not ranged:
        raise UnsupportedModelError(
            f"{file.name}: sizes: got {whole}, but no input leaves height and width free"
        )
    unknown = sorted(str(key) for key in set(named) - known)
    if unknown:
        raise UnsupportedModelError(
            f"{file.name}: sizes: {', '.join(unknown)} is no axis of an input; expected some of "
            f"{', '.join(sorted(known))}"
        )
    return Asked(fixed, ranged, ranges)


def _item(file: OnnxFile, name: Any, item: Any) -> int | Size:
    """A size or a range of them."""
    if type(item) is int and item >= 1:
        return item
    try:
        if not isinstance(item, (bool, int)):
            return as_size(item)
    except (TypeError, ValueError):
        pass
    raise UnsupportedModelError(
        f"{file.name}: sizes: expected whole numbers from 1, or ranges (smallest, largest, "
        f"multiple of), got {item!r} for {name}"
    )
