"""What a random network computes, as data: it can be printed, stored, and made smaller.

A recipe reads like Python. ``v2 = conv2d(x0, w1, stride=2)`` calls the operation ``conv2d`` of
``ops.OPS`` with a value and a part; parts are what the network owns: modules, parameters, buffers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Input:
    """A tensor that a cell is called with.

    Attributes:
        kind: see ``network.draw_input``.
        shape: without the batch.
        given: false for an optional argument that is left at None.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    given: bool = True


@dataclass(frozen=True)
class Part:
    """Something that a cell owns.

    Attributes:
        kind: a class of ``torch.nn`` or ``parts.OWN``, or one of ``parts.TENSORS``.
        args: what it is built with, after ``torch.manual_seed(seed)``.
        dress: functions of ``parts.DRESSES`` that are applied to it afterwards: hooks, pruning.
        tied: another part whose weight it shares.
    """

    name: str
    kind: str
    args: dict[str, Any]
    seed: int
    dress: tuple[str, ...] = ()
    tied: str | None = None

    def __str__(self) -> str:
        words = ", ".join(f"{key}={value!r}" for key, value in self.args.items())
        extra = "".join(f" + {item}" for item in self.dress)
        tied = f" with the weight of {self.tied}" if self.tied else ""
        return f"{self.name} = {self.kind}({words}){extra}{tied}"


@dataclass(frozen=True)
class Step:
    """One operation. It makes one value, several (a tuple is unpacked), or none (it writes)."""

    makes: tuple[str, ...]
    op: str
    operands: tuple[str, ...]
    args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [*self.operands, *(f"{key}={value!r}" for key, value in self.args.items())]
        left = f"{', '.join(self.makes)} = " if self.makes else ""
        return f"{left}{self.op}({', '.join(words)})"


@dataclass(frozen=True)
class Recipe:
    """One small network.

    Attributes:
        returns: a nest of value names; see ``network.nested``.
        odd: it holds something that may be refused, if clearly, but never be wrong.
    """

    seed: int
    inputs: tuple[Input, ...]
    parts: tuple[Part, ...]
    steps: tuple[Step, ...]
    returns: Any
    odd: bool = False

    def __str__(self) -> str:
        lines = [f"# seed {self.seed}" + ", odd" * self.odd]
        lines += [str(part) for part in self.parts]
        words = [
            f"{item.name}: {item.kind}{list(item.shape)}" + ("" if item.given else " = None")
            for item in self.inputs
        ]
        lines.append(f"def forward({', '.join(words)}):")
        lines += [f"    {step}" for step in self.steps]
        lines.append(f"    return {_shown(self.returns)}")
        return "\n".join(lines)

    def as_json(self) -> str:
        return json.dumps(asdict(self))


def _shown(returns: Any) -> str:
    if isinstance(returns, str):
        return returns
    kind, *items = returns
    if kind == "number":
        return str(items[0])
    if kind == "dict":
        return "{" + ", ".join(f'"{key}": {_shown(item)}' for key, item in items) + "}"
    text = ", ".join(map(_shown, items))
    comma = "," if len(items) == 1 else ""
    return {"list": f"[{text}]", "tuple": f"({text}{comma})", "pair": f"Pair({text})"}[kind]


def from_json(text: str) -> Recipe:
    """The inverse of :meth:`Recipe.as_json`."""
    raw = json.loads(text)
    return Recipe(
        seed=raw["seed"],
        inputs=tuple(Input(**_tuples(item)) for item in raw["inputs"]),
        parts=tuple(Part(**_tuples(item)) for item in raw["parts"]),
        steps=tuple(Step(**_tuples(item)) for item in raw["steps"]),
        returns=_tuples(raw["returns"]),
        odd=raw["odd"],
    )


def _tuples(value: Any) -> Any:
    """JSON has no tuples; in recipes there are no lists."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


# ---- smaller recipes ----------------------------------------------------------------------------


def leaves(returns: Any) -> list[str]:
    """Names of the values in a nest: a name, ``("tuple", ...)``, ``("dict", ("key", …), …)``."""
    if isinstance(returns, str):
        return [returns]
    if returns[0] == "number":
        return []
    items = returns[1:] if returns[0] != "dict" else [value for _, value in returns[1:]]
    return [name for item in items for name in leaves(item)]


def smaller(recipe: Recipe) -> Iterator[Recipe]:
    """Recipes with something less, the largest savings first; not all of them can run."""
    names = leaves(recipe.returns)
    if recipe.returns != names[0]:
        for name in reversed(dict.fromkeys(names)):
            yield tidy(replace(recipe, returns=name))
    for position in range(len(recipe.steps) - 1, -1, -1):
        yield from _without(recipe, position)
    for position, part in enumerate(recipe.parts):
        for gone in part.dress:
            kept = tuple(item for item in part.dress if item != gone)
            yield _with_part(recipe, position, replace(part, dress=kept))
        if part.tied:
            yield _with_part(recipe, position, replace(part, tied=None))


def _with_part(recipe: Recipe, position: int, part: Part) -> Recipe:
    parts = list(recipe.parts)
    parts[position] = part
    return replace(recipe, parts=tuple(parts))


def _without(recipe: Recipe, position: int) -> Iterator[Recipe]:
    """Without one step: with its readers gone too, or with another value in its place."""
    step = recipe.steps[position]
    lost = set(step.makes)
    kept = list(recipe.steps[:position])
    for later in recipe.steps[position + 1 :]:
        if lost & set(later.operands):
            lost |= set(later.makes)
        else:
            kept.append(later)
    left = [name for name in leaves(recipe.returns) if name not in lost]
    if left:
        returns = recipe.returns if len(left) == len(leaves(recipe.returns)) else left[0]
        yield tidy(replace(recipe, steps=tuple(kept), returns=returns))
    values = {item.name for item in recipe.inputs} | {n for s in recipe.steps for n in s.makes}
    for other in dict.fromkeys(name for name in step.operands if name in values):
        if step.makes:
            yield tidy(_renamed(recipe, position, dict.fromkeys(step.makes, other)))


def _renamed(recipe: Recipe, position: int, names: dict[str, str]) -> Recipe:
    def new(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(new(item) for item in value)
        return names.get(value, value)

    later = [replace(s, operands=new(s.operands)) for s in recipe.steps[position + 1 :]]
    return replace(recipe, steps=(*recipe.steps[:position], *later), returns=new(recipe.returns))


def tidy(recipe: Recipe) -> Recipe:
    """Without parts and inputs that nothing uses; one input stays."""
    used = {name for step in recipe.steps for name in step.operands} | set(leaves(recipe.returns))
    used |= {part.tied for part in recipe.parts if part.name in used and part.tied}
    inputs = tuple(item for item in recipe.inputs if item.name in used)
    return replace(
        recipe,
        inputs=inputs or recipe.inputs[:1],
        parts=tuple(part for part in recipe.parts if part.name in used),
    )
