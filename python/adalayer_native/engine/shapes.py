"""What a node of a program has to do, in words: nodes with the same words take alike long.

Neither weights and grids are in them nor names, so that times can be looked up on another machine,
for another network.
"""

from __future__ import annotations

from collections.abc import Sequence

from adalayer_native import _C
from adalayer_native.operations import operation

__all__ = ["WEIGHTED", "has_weights", "shapes_of"]

# Operations that have packed weights.
WEIGHTED = ("conv", "conv_transpose")

# Where a value lies on its grid, and what it is clamped to: the same work whatever they are.
_GRID = ("lo", "hi", "zero_point", "level")


def shapes_of(program: _C.Program) -> list[str]:
    """A text for each node, such as ``conv kernel 3x3 pad 1,1,1,1: u8 3x8x8 -> u8 8x8x8``.

    Sizes are channels, height and width of one image.
    """
    values = program.values()

    def shown(number: int) -> str:
        _, kind, *sizes = values[number][:5]
        return f"{kind} " + "x".join(map(str, sizes))

    found = []
    for op, _, inputs, output, ints, _, constants in program.nodes():
        words = [op, *_parameters(op, ints)]
        optional = [usual is not None for usual in operation(op).constants.values()]
        if any(asked and c >= 0 for asked, c in zip(optional, constants, strict=False)):
            words.append("with a table")
        read = " + ".join(map(shown, inputs)) or "nothing"
        found.append(f"{' '.join(words)}: {read} -> {shown(output)}")
    return found


def has_weights(shape: str) -> bool:
    """Whether a node of that text has packed weights."""
    return shape.split(" ", 1)[0] in WEIGHTED


def _parameters(op: str, ints: Sequence[int]) -> list[str]:
    """What differs from the usual; pairs of height and width as ``3x3``, sides with commas."""
    given = dict(zip(operation(op).ints, ints, strict=False))
    usual = operation(op).ints
    words, done = [], set()
    for name in given:
        if name in _GRID or name in done:
            continue
        if name.endswith("_h") and f"{name[:-2]}_w" in given:
            members, word, mark = [name, f"{name[:-2]}_w"], name[:-2], "x"
        elif name.startswith("pad_"):
            members, word, mark = [n for n in given if n.startswith("pad_")], "pad", ","
        else:
            members, word, mark = [name], name, ""
        done.update(members)
        if any(given[member] != usual[member] for member in members):
            words.append(f"{word} {mark.join(str(given[member]) for member in members)}")
    return words
