"""Rules of a program at other sizes, from programs of a few sizes.

A program holds the numbers of one size, and not where they came from: whether a pooling rounds up,
whether an image was resized by a factor or to the size of another one. So the network is lowered at
a few sizes, and each node gets the rule that explains its parameters at all of them. What the rules
make of the program is then compared with what was lowered (``ranges.py``): a wrong rule is an error
here, and never a wrong result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from adalayer_native import _C
from adalayer_native.engine.results import Output
from adalayer_native.engine.sizes import Monomial, OutputRule
from adalayer_native.operations import operation
from adalayer_native.ops.resizing import linear_tables, nearest_tables

__all__ = ["Shown", "Unexplained", "first_difference", "fit_nodes", "fit_output"]

_Table = npt.NDArray[np.int64]
_POWERS = ((0, 0), (1, 0), (0, 1), (1, 1))
# Factors that a resizing may have, as numerator and denominator.
_FACTORS = [
    (p, q) for q in (1, 2, 3, 4, 5, 8, 10) for p in range(1, 33) if Fraction(p, q).denominator == q
]
_MODES = {"nearest": False, "nearest-exact": False, "linear": True, "linear-aligned": True}
_BORDERS = ("reflect", "edge", "wrap")


class Unexplained(Exception):
    """Parameters that no rule explains.

    Attributes:
        node: number of the node.
    """

    def __init__(self, node: int, reason: str) -> None:
        super().__init__(reason)
        self.node = node


class Shown:
    """A program's nodes, with parameters by name."""

    def __init__(self, program: _C.Program) -> None:
        self.program = program
        self.values = program.values()
        self.nodes = program.nodes()
        self.inputs = program.inputs()
        self.outputs = program.outputs()

    def size(self, value: int) -> tuple[int, int, int]:
        """c, h, w."""
        c, h, w = self.values[value][2:5]
        return c, h, w

    def sides(self, value: int) -> tuple[int, int]:
        """h, w."""
        return self.size(value)[1:]

    def ints(self, node: int) -> dict[str, int]:
        """Whole numbers of a node by name."""
        op, ints = self.nodes[node][0], self.nodes[node][4]
        return dict(zip(operation(op).ints, ints, strict=True))

    def constant(self, node: int, name: str, kind: Any = np.int32) -> npt.NDArray[Any]:
        """A constant of a node by name."""
        op, constants = self.nodes[node][0], self.nodes[node][6]
        names = list(operation(op).constants)
        data = self.program.constant_bytes(constants[names.index(name)])
        return np.frombuffer(data, dtype=kind)


def first_difference(one: Shown, other: Shown) -> str | None:
    """Where two programs differ, in a sentence; None where they are the same but for numbers of
    constants."""
    if one.inputs != other.inputs or one.outputs != other.outputs:
        return "its inputs and results"
    if len(one.nodes) != len(other.nodes):
        return f"{len(one.nodes)} nodes, and {len(other.nodes)} of them"
    for k, (a, b) in enumerate(zip(one.nodes, other.nodes, strict=True)):
        what = f"node {k} ({a[0]} {a[1]!r})"
        if a[:4] != b[:4]:
            return f"{what}: {b[0]} {b[1]!r}"
        if a[4] != b[4]:
            return f"{what}: parameters {a[4]} and {b[4]}"
        if a[5] != b[5]:
            return f"{what}: parameters {a[5]} and {b[5]}"
        pairs = zip(a[6], b[6], strict=True)
        if any(
            (p < 0) != (q < 0)
            or (p >= 0 and one.program.constant_bytes(p) != other.program.constant_bytes(q))
            for p, q in pairs
        ):
            return f"{what}: its constants"
    if one.values != other.values:
        values = zip(one.values, other.values, strict=True)
        mine, its = next((x, y) for x, y in values if x != y)
        return f"value {mine[0]!r}: {mine[2:5]} and {its[2:5]}"
    return None


def _all(items: Iterable[Any]) -> Any:
    """The one thing that they all are; None if they differ."""
    found = list(items)
    return found[0] if all(item == found[0] for item in found) else None


def monomial(values: Sequence[int], sides: Sequence[tuple[int, int]]) -> Monomial | None:
    """What gives these values at these h and w; the constant first."""
    for a, b in _POWERS:
        share = _all(
            Fraction(value, h**a * w**b) for value, (h, w) in zip(values, sides, strict=True)
        )
        if share is not None and share > 0:
            return Monomial(share.numerator, share.denominator, a, b)
    return None


def _parts(table: _Table) -> list[tuple[int, int]] | None:
    """Counts and steps of a table of positions, from the outermost; None if it is none of those."""
    found: list[tuple[int, int]] = []
    if table[0] != 0:
        return None
    while len(table) > 1:
        n, step = len(table), int(table[1])
        straight = np.flatnonzero(np.diff(table) != step)
        count = n if not straight.size else int(straight[0]) + 1
        if step < 0 or n % count:
            return None
        blocks = table.reshape(-1, count)
        if not np.array_equal(blocks, blocks[:, :1] + blocks[0]):
            return None
        found.append((count, step))
        table = blocks[:, 0]
    return found[::-1]


def fit_parts(
    atoms: Sequence[Sequence[tuple[int, int]]], sides: Sequence[tuple[int, int]]
) -> tuple[tuple[Monomial, Monomial], ...] | None:
    """Counts and steps at several sizes as what follows from h and w."""
    if _all(map(len, atoms)) is None:
        return None
    found = []
    for k in range(len(atoms[0])):
        count = monomial([item[k][0] for item in atoms], sides)
        step = monomial([item[k][1] for item in atoms], sides)
        if count is None or step is None:
            return None
        found.append((count, step))
    return tuple(found)


def fit_output(
    outputs: Sequence[Output], sides: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, ...]]
) -> OutputRule | None:
    """How a tensor of the result shows its value, from several sizes of that (h and w; c, h, w)."""
    shape = [
        monomial([output.shape[k] for output in outputs], sides)
        for k in range(len(outputs[0].shape))
        if _all(len(output.shape) for output in outputs) is not None
    ]
    if not shape and outputs[0].shape:
        return None
    if None in shape:
        return None
    plain = [output.atoms is None for output in outputs]
    atoms = None
    if not all(plain):
        # Where another size lies in the order of memory, this one's order is that one's, too.
        views = [
            output.atoms if output.atoms is not None else ((int(np.prod(size)), 1),)
            for output, size in zip(outputs, sizes, strict=True)
        ]
        atoms = fit_parts(views, sides)
        if atoms is None:
            return None
    return OutputRule(tuple(item for item in shape if item is not None), atoms)


# -- nodes ----------------------------------------------------------------------------------------


def _pool(programs: Sequence[Shown], node: int) -> dict[str, Any]:
    names = []
    _, _, inputs, output, *_ = programs[0].nodes[node]
    maximum = programs[0].nodes[node][0] == "max_pool"
    for axis, (before, after) in enumerate((("top", "bottom"), ("left", "right"))):
        letter = "hw"[axis]

        def size(shown: Shown, up: bool, axis: int = axis, letter: str = letter) -> int:
            a = shown.ints(node)
            n = shown.sides(inputs[0])[axis]
            first = a[f"pad_{before}"]  # noqa: B023
            last = first if maximum else a[f"pad_{after}"]  # noqa: B023
            stride = a[f"stride_{letter}"]
            span = n + first + last - a.get(f"dilation_{letter}", 1) * (a[f"kernel_{letter}"] - 1)
            found = (span - 1 + (stride - 1 if up else 0)) // stride + 1
            return found - int(up and (found - 1) * stride >= n + first)

        def matches(up: bool, axis: int = axis, size: Any = size) -> bool:
            return all(shown.sides(output)[axis] == size(shown, up) for shown in programs)

        kernels = [shown.ints(node)[f"kernel_{letter}"] for shown in programs]
        if _all(kernels) is None:
            sides = [shown.sides(inputs[0])[axis] for shown in programs]
            if kernels != sides or any(shown.sides(output)[axis] != 1 for shown in programs):
                raise Unexplained(node, f"its window of {kernels} follows the image's size")
            names.append("whole")
        elif matches(False):
            names.append("down")
        elif matches(True):
            names.append("up")
        else:
            raise Unexplained(node, "its size follows no rule of poolings")
    return {} if names == ["down", "down"] else {"window": names}


def _adaptive(programs: Sequence[Shown], node: int) -> dict[str, Any]:
    _, _, inputs, output, *_ = programs[0].nodes[node]
    keeps = []
    for axis in range(2):
        outs = [shown.sides(output)[axis] for shown in programs]
        if _all(outs) is not None:
            keeps.append(0)
        elif outs == [shown.sides(inputs[0])[axis] for shown in programs]:
            keeps.append(1)
        else:
            raise Unexplained(node, f"its output of {outs} follows the image's size")
    return {"keeps": keeps} if any(keeps) else {}


def _slice(programs: Sequence[Shown], node: int) -> dict[str, Any]:
    _, _, inputs, output, *_ = programs[0].nodes[node]
    a = programs[0].ints(node)
    if a["axis"] == 0:
        return {}
    axis, step = a["axis"] - 1, a["step"]
    sizes = [shown.sides(inputs[0])[axis] for shown in programs]
    counts = [shown.sides(output)[axis] for shown in programs]
    begins = [shown.ints(node)["begin"] for shown in programs]
    found: dict[str, int] = {}
    if _all(begins) is None:
        back = _all(n - begin for n, begin in zip(sizes, begins, strict=True))
        if back is None:
            raise Unexplained(node, f"it begins at {begins} of {sizes}")
        found["from_back"] = back
    if _all(counts) is None:
        rest = min(n - b - (c - 1) * step for n, b, c in zip(sizes, begins, counts, strict=True))
        for leaves in range(max(rest, 0)):
            ends = zip(sizes, begins, strict=True)
            if counts == [-(-(n - leaves - b) // step) for n, b in ends]:
                found["leaves"] = leaves
                break
        else:
            raise Unexplained(node, f"it takes {counts} of {sizes}")
    return found


def _like(programs: Sequence[Shown], node: int, axis: int, sizes: list[int]) -> list[Any] | None:
    """A value that is as large along that axis: an input of the program, or what came earlier."""
    before = [n[3] for n in programs[0].nodes[:node]]
    for value in (*programs[0].inputs, *before):
        if sizes == [shown.sides(value)[axis] for shown in programs]:
            return ["like", value]
    return None


def _resize(programs: Sequence[Shown], node: int) -> dict[str, Any]:
    _, _, inputs, output, *_ = programs[0].nodes[node]
    bilinear = bool(programs[0].ints(node)["bilinear"])
    reasons = []
    for mode, linear in _MODES.items():
        if linear != bilinear:
            continue
        axes = []
        for axis, letter in enumerate("hw"):
            ins = [shown.sides(inputs[0])[axis] for shown in programs]
            outs = [shown.sides(output)[axis] for shown in programs]

            def right(factor: float | None, ins: Any = ins, outs: Any = outs) -> bool:
                return all(
                    _same_tables(shown, node, letter, mode, n, out, factor)  # noqa: B023
                    for shown, n, out in zip(programs, ins, outs, strict=True)
                )

            axes.append(_resized_by(programs, node, axis, ins, outs, right))
        if None not in axes:
            return {"mode": mode, "resize": axes}
        reasons.append(mode)
    raise Unexplained(node, "its tables follow no factor and no other tensor's size")


def _resized_by(
    programs: Sequence[Shown],
    node: int,
    axis: int,
    ins: list[int],
    outs: list[int],
    right: Callable[[float | None], bool],
) -> list[Any] | None:
    if right(None):
        if _all(outs) is not None:
            return ["fixed"]
        share = _all(Fraction(out, n) for n, out in zip(ins, outs, strict=True))
        if share is not None:
            return ["ratio", share.numerator, share.denominator]
        like = _like(programs, node, axis, outs)
        if like is not None:
            return like
    for p, q in _FACTORS:
        factor = p / q
        if outs == [int(n * factor) for n in ins] and right(factor):
            return ["factor", factor]
    return None


def _same_tables(
    shown: Shown, node: int, letter: str, mode: str, n: int, out: int, factor: float | None
) -> bool:
    if _MODES[mode]:
        tables = linear_tables(n, out, factor, mode == "linear-aligned")
    else:
        tables = nearest_tables(n, out, factor, mode == "nearest-exact")
    names = (f"low_{letter}", f"high_{letter}", f"part_{letter}")
    return all(
        shown.constant(node, name, table.dtype).tobytes() == table.tobytes()
        for name, table in zip(names, tables, strict=True)
    )


def _border(table: _Table, n: int) -> tuple[str, int, int, int] | None:
    """Mode, amounts and step of a table of ``n`` positions with a border around them."""
    extra = len(table) - n
    if extra <= 0 or n < 2:
        return None
    for before in range(extra + 1):
        step = int(table[before + 1] - table[before])
        if not np.array_equal(table[before : before + n], np.arange(n) * step):
            continue
        for mode in _BORDERS:
            after = extra - before
            if mode == "reflect" and max(before, after) >= n:
                continue
            if mode == "wrap" and max(before, after) > n:
                continue
            places = np.pad(np.arange(n), (before, after), mode=mode)  # type: ignore[call-overload]
            if np.array_equal(table, places * step):
                return mode, before, after, step
    return None


def _rearrange(programs: Sequence[Shown], node: int) -> dict[str, Any]:
    value = programs[0].nodes[node][2][0]
    sides = [shown.sides(value) for shown in programs]
    rules: list[Any] = []
    for name in ("channel", "row", "column"):
        tables = [shown.constant(node, name).astype(np.int64) for shown in programs]
        atoms = [_parts(table) for table in tables]
        known = [item for item in atoms if item is not None]
        fitted = fit_parts(known, sides) if len(known) == len(atoms) else None
        if fitted is not None:
            rules.append({"parts": [[n.as_json(), s.as_json()] for n, s in fitted]})
            continue
        rule = _fit_border(tables, sides, name)
        if rule is None:
            raise Unexplained(node, f"its order of {name}s follows no rule that is known")
        rules.append(rule)
    return {"rearrange": rules}


def _fit_border(
    tables: Sequence[_Table], sides: Sequence[tuple[int, int]], name: str
) -> dict[str, Any] | None:
    if name == "channel":
        return None
    for axis in (0, 1):
        found = [_border(table, side[axis]) for table, side in zip(tables, sides, strict=True)]
        known = [item for item in found if item is not None]
        if len(known) < len(found):
            continue
        amounts = _all(item[:3] for item in known)
        step = monomial([item[3] for item in known], sides)
        if amounts is None or step is None:
            continue
        count = Monomial(1, 1, 1 - axis, axis)
        return {"parts": [[count.as_json(), step.as_json()]], "border": list(amounts)}
    return None


_FITS: dict[str, Callable[[Sequence[Shown], int], dict[str, Any]]] = {
    "max_pool": _pool,
    "avg_pool": _pool,
    "adaptive_avg_pool": _adaptive,
    "slice": _slice,
    "resize": _resize,
    "rearrange": _rearrange,
}


def fit_nodes(programs: Sequence[Shown]) -> dict[int, dict[str, Any]]:
    """Rules by number of the node, from programs that differ in sizes alone.

    Raises:
        Unexplained: naming the node.
    """
    rules = {}
    for number, node in enumerate(programs[0].nodes):
        fit = _FITS.get(node[0])
        rule = {} if fit is None else fit(programs, number)
        if rule:
            rules[number] = rule
    return rules
