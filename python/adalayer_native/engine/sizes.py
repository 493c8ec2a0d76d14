"""Which sizes of images an engine takes, and how its tensors follow from them.

An engine is compiled at the size of its example. With a range of sizes its program also says what
its nodes do at others (``csrc/engine/size_rules.hpp``; ``fitting.py`` finds that out), and the
engine makes plans and tables for a size when it first meets it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adalayer_native import _C
from adalayer_native.engine.results import Output, Port
from adalayer_native.errors import InputError

__all__ = ["KEY", "Axis", "Monomial", "OutputRule", "Size", "SizeRules", "as_size", "asked_for"]

KEY = "adalayer.sizes"
LARGEST = 1 << 20


@dataclass(frozen=True)
class Size:
    """Sizes that an axis of an input may have; like ``torch.export.Dim``.

    Attributes:
        min, max: the smallest and the largest one.
        multiple_of: only multiples of it: a network that halves its images five times and joins
            them again wants multiples of 32.
        name: axes of one name have one size. By default every axis has its own.
    """

    min: int
    max: int
    multiple_of: int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        numbers = (self.min, self.max, self.multiple_of)
        if any(type(n) is not int or not 1 <= n <= LARGEST for n in numbers):
            raise ValueError(f"expected whole numbers from 1 to {LARGEST}, got {numbers}")
        if self.min > self.max:
            raise ValueError(f"the smallest size, {self.min}, is above the largest, {self.max}")
        if not self.allowed(self.last):
            raise ValueError(
                f"there is no multiple of {self.multiple_of} from {self.min} to {self.max}"
            )

    @property
    def first(self) -> int:
        """The smallest one that is a multiple."""
        return -(-self.min // self.multiple_of) * self.multiple_of

    @property
    def last(self) -> int:
        """The largest one that is a multiple."""
        return self.max // self.multiple_of * self.multiple_of

    def allowed(self, n: int) -> bool:
        """Whether an axis may have that size."""
        return self.min <= n <= self.max and n % self.multiple_of == 0

    def __str__(self) -> str:
        step = "" if self.multiple_of == 1 else f" by {self.multiple_of}"
        return f"{self.first}..{self.last}{step}"


@dataclass(frozen=True)
class Axis:
    """A free size of a network."""

    name: str
    size: Size


# factor * h^a * w^b / divisor, of the value that something shows.
@dataclass(frozen=True)
class Monomial:
    """A size that follows from height and width of a value."""

    factor: int
    divisor: int = 1
    h_power: int = 0
    w_power: int = 0

    def at(self, h: int, w: int) -> int:
        """Its value. Raises ValueError where it is no whole number."""
        product = self.factor * h**self.h_power * w**self.w_power
        if product % self.divisor:
            raise ValueError(f"{product} cannot be divided by {self.divisor}")
        return int(product // self.divisor)

    def as_json(self) -> Any:
        """For a file."""
        if (self.divisor, self.h_power, self.w_power) == (1, 0, 0):
            return self.factor
        return [self.factor, self.divisor, self.h_power, self.w_power]

    @classmethod
    def from_json(cls, item: Any) -> Monomial:
        """From a file; the engine has checked the numbers."""
        return cls(int(item)) if isinstance(item, (int, float)) else cls(*map(int, item))


@dataclass(frozen=True)
class OutputRule:
    """Shape and order of a tensor of the result, of the value (h x w) that it shows."""

    shape: tuple[Monomial, ...]
    atoms: tuple[tuple[Monomial, Monomial], ...] | None

    def of(self, output: Output, h: int, w: int) -> Output:
        """The output at another size."""
        atoms = self.atoms
        return replace(
            output,
            shape=tuple(size.at(h, w) for size in self.shape),
            atoms=None if atoms is None else tuple((n.at(h, w), s.at(h, w)) for n, s in atoms),
        )

    def as_json(self) -> Any:
        """For a file."""
        atoms = self.atoms
        return {
            "shape": [size.as_json() for size in self.shape],
            "atoms": None if atoms is None else [[n.as_json(), s.as_json()] for n, s in atoms],
        }

    @classmethod
    def from_json(cls, item: Any) -> OutputRule:
        """From a file."""
        atoms = item["atoms"]
        read = Monomial.from_json
        return cls(
            tuple(map(read, item["shape"])),
            None if atoms is None else tuple((read(n), read(s)) for n, s in atoms),
        )


@dataclass(frozen=True)
class SizeRules:
    """All that a program says about sizes.

    Attributes:
        axes: its free sizes.
        inputs: per input of the program the numbers of the axes that are its h and w, or None.
        ports: per input of a call, and axis of its shape, the number of the free axis, or None.
        nodes: rules by number of the node, as the engine reads them.
        outputs: one per output of the native part.
    """

    axes: tuple[Axis, ...]
    inputs: tuple[tuple[int | None, int | None], ...]
    ports: tuple[tuple[int | None, ...], ...]
    nodes: Mapping[int, Mapping[str, Any]]
    outputs: tuple[OutputRule, ...]

    def as_text(self) -> str:
        """For the program."""
        return json.dumps(
            {
                "axes": [[a.name, a.size.min, a.size.max, a.size.multiple_of] for a in self.axes],
                "inputs": self.inputs,
                "ports": self.ports,
                "nodes": {str(number): rule for number, rule in self.nodes.items()},
                "outputs": [rule.as_json() for rule in self.outputs],
            }
        )

    @classmethod
    def from_text(cls, text: str) -> SizeRules:
        """From a program whose text the engine has read already."""
        held = json.loads(text)
        return cls(
            tuple(Axis(str(n), Size(int(a), int(b), int(m))) for n, a, b, m in held["axes"]),
            tuple((h, w) for h, w in held["inputs"]),
            tuple(tuple(port) for port in held["ports"]),
            {int(number): rule for number, rule in held["nodes"].items()},
            tuple(map(OutputRule.from_json, held["outputs"])),
        )

    def ranged(self, ports: Sequence[Port], program: _C.Program) -> tuple[Port, ...]:
        """Inputs of a call that know what their sizes may be.

        Args:
            program: whose rules these are.

        Raises:
            ValueError: these are not the inputs that the rules are about.
        """
        values = program.values()
        compiled: dict[int | None, int] = {}
        for number, sides in zip(program.inputs(), self.inputs, strict=True):
            compiled.update(zip(sides, values[number][3:5], strict=True))
        if len(ports) != len(self.ports):
            raise ValueError(f"sizes of {len(self.ports)} inputs, expected {len(ports)}")
        found = []
        for port, axes in zip(ports, self.ports, strict=True):
            if len(axes) != len(port.shape):
                raise ValueError(f"sizes of {len(axes)} axes of {port.name!r}")
            free = tuple(None if k is None else self.axes[k] for k in axes)
            pairs = zip(axes, port.shape, strict=True)
            if any(k is not None and n != compiled[k] for k, n in pairs):
                raise ValueError(f"sizes of {port.name!r} are not those of the program")
            found.append(replace(port, axes=free if any(free) else ()))
        return tuple(found)

    def named(self, sizes: Any) -> list[int]:
        """Sizes of all axes in their order, from a sequence or by name.

        Raises:
            InputError: an unknown or missing axis, or a size that is not allowed.
        """
        names = [axis.name for axis in self.axes]
        if isinstance(sizes, Mapping):
            if set(sizes) != set(names):
                raise InputError(f"expected sizes of {names}, got {list(sizes)}")
            found = [sizes[name] for name in names]
        else:
            found = [sizes] if isinstance(sizes, int) else list(sizes)
        if len(found) != len(names):
            raise InputError(f"expected a size for each of {names}, got {found}")
        for axis, n in zip(self.axes, found, strict=True):
            if type(n) is not int or not axis.size.allowed(n):
                raise InputError(f"{axis.name}: expected {axis.size}, got {n!r}")
        return found


def as_size(item: Any) -> Size:
    """What a caller may write for a range.

    Raises:
        ValueError: it is none.
    """
    if isinstance(item, Size):
        return item
    if isinstance(item, (tuple, list)) and len(item) in (2, 3):
        return Size(*item)
    if hasattr(item, "__name__") and hasattr(item, "min"):  # a torch.export.Dim
        base, factor = getattr(item, "root", item), 1
        if base is not item:
            factor = int(item.fn(1))
            if item.fn(2) != 2 * factor:
                raise ValueError(f"expected a Dim or a multiple of one, got {item}")
        # As in torch.export, a Dim that says nothing begins at 0 and has no end.
        most = min(int(base.max) * factor, LARGEST)
        return Size(max(1, int(base.min) * factor), most, factor, base.__name__)
    raise ValueError(
        "expected (min, max), (min, max, multiple_of), an adalayer_native.Size or a "
        f"torch.export.Dim, got {item!r}"
    )


def asked_for(sizes: Any, ports: Sequence[Port]) -> tuple[list[Axis], list[list[int | None]]]:
    """The free axes that a caller asks for, and for every axis of every input's shape which it is.

    Args:
        sizes: one range, of height and width of all images; or by name of an input, by number of an
            axis (the batch is axis 0) a range.

    Raises:
        ValueError: something else, an unknown input or axis, or an example outside of its range.
    """
    wanted: dict[tuple[int, int], Size] = {}
    if isinstance(sizes, Mapping):
        names = {port.name: k for k, port in enumerate(ports)}
        for name, axes in sizes.items():
            if name not in names:
                raise ValueError(f"sizes: there is no input {name!r}, only {list(names)}")
            port = ports[names[name]]
            if not isinstance(axes, Mapping):
                raise ValueError(f"sizes[{name!r}]: expected ranges by axis, got {axes!r}")
            for axis, item in axes.items():
                place = axis - port.batched if type(axis) is int else -1
                if not 0 <= place < len(port.shape):
                    first = int(port.batched)
                    raise ValueError(
                        f"sizes[{name!r}]: expected axes {first} to "
                        f"{first + len(port.shape) - 1}, got {axis!r}"
                    )
                wanted[names[name], place] = as_size(item)
    else:
        one = as_size(sizes)
        images = [k for k, port in enumerate(ports) if port.is_float and len(port.shape) == 3]
        if not images:
            raise ValueError("sizes: no input is an image; give ranges by input and axis")
        for k in images:
            for place, name in ((1, "height"), (2, "width")):
                wanted[k, place] = replace(one, name=one.name or name)
    found: dict[str, Axis] = {}
    free: list[list[int | None]] = [[None] * len(port.shape) for port in ports]
    for (k, place), size in wanted.items():
        port = ports[k]
        name = size.name or f"{port.name}.shape[{place + port.batched}]"
        axis = found.setdefault(name, Axis(name, size))
        if replace(axis.size, name=None) != replace(size, name=None):
            raise ValueError(f"sizes: {name} is both {axis.size} and {size}")
        if not size.allowed(port.shape[place]):
            raise ValueError(
                f"sizes: the example has {port.shape[place]} at {name}, which is not in {size}"
            )
        free[k][place] = list(found).index(name)
    if not found:
        raise ValueError("sizes: expected a range of at least one axis")
    return list(found.values()), free
