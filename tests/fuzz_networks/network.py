"""Recipes as ``nn.Module``, several side by side in one model, and inputs for them.

torch.export costs a tenth of a second for a handful of operators, most of it per call. So several
cells stand in one model and are exported, converted and compiled together; each has inputs and
outputs of its own, so that a wrong result names its cell.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops_blocks, ops_memory, ops_python  # noqa: F401  (they fill OPS)
from .ops import OPS
from .parts import attach
from .recipe import Input, Recipe

Pair = namedtuple("Pair", ("first", "second"))

STYLES = ("positional", "keywords", "nested")
TOKENS = 20  # words that an embedding knows


class Cell(nn.Module):
    """Interprets one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        for part in recipe.parts:
            attach(self, part)

    def forward(self, values: dict[str, Any]) -> Any:
        pool = dict(values)
        for step in self.recipe.steps:
            operands = [pool[n] if n in pool else getattr(self, n) for n in step.operands]
            result = OPS[step.op](*operands, **step.args)
            if len(step.makes) == 1:
                pool[step.makes[0]] = result
            elif step.makes:
                pool.update(zip(step.makes, result, strict=True))
        return nested(self.recipe.returns, pool)


def nested(returns: Any, pool: dict[str, Any]) -> Any:
    """The result of a cell: the values that ``returns`` names, in its containers."""
    if isinstance(returns, str):
        return pool[returns]
    kind, *items = returns
    if kind == "number":
        return items[0]
    if kind == "dict":
        return {key: nested(item, pool) for key, item in items}
    found = [nested(item, pool) for item in items]
    if kind == "pair":
        return Pair(*found)
    return found if kind == "list" else tuple(found)


@dataclass
class Call:
    """Arguments of one call of a group."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def example(self) -> Any:
        """The form in which the package takes examples and batches."""
        if self.kwargs:
            return dict(self.kwargs)
        return self.args[0] if len(self.args) == 1 and _is_tensor(self.args[0]) else self.args

    def __call__(self, function: Any) -> Any:
        """Call with copies: a network may write into its inputs."""
        with torch.no_grad():
            return function(*copied(self.args), **copied(self.kwargs))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def copied(value: Any) -> Any:
    """Clones of all tensors of a nest."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(copied, value))
    return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else value


class Group(nn.Module):
    """Cells side by side, called in one of several styles.

    Args:
        recipes: one for each cell.
        style: "positional" and "keywords" have one argument for every input of every cell, the
            optional ones last; "nested" has one argument that holds them all.
    """

    def __init__(self, recipes: Sequence[Recipe], style: str) -> None:
        super().__init__()
        self.cells = nn.ModuleList(Cell(recipe) for recipe in recipes)
        self.style = style

    # Replaced by class_of(); here so that what it does can be read.
    def forward(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def run(self, values: dict[str, dict[str, Any]]) -> Any:
        return [cell(values[f"c{k}"]) for k, cell in enumerate(self.cells)]


def build(recipes: Sequence[Recipe], style: str) -> Group:
    """A group whose ``forward`` has the signature that a programmer would have written."""
    required, optional, fields = [], [], []
    for k, recipe in enumerate(recipes):
        pairs = []
        for item in recipe.inputs:
            name = f"c{k}_{item.name}"
            pairs.append(f"'{item.name}': {name}")
            if item.given:
                required.append(name)
            else:
                optional.append(f"{name}={_default(item)!r}")
        fields.append(f"'c{k}': {{{', '.join(pairs)}}}")
    if style == "nested":
        source = "def forward(self, batch):\n    return self.run(batch)\n"
    else:
        words = ", ".join(["self", *required, *optional])
        source = f"def forward({words}):\n    return self.run({{{', '.join(fields)}}})\n"
    scope: dict[str, Any] = {}
    exec(source, scope)  # the signature matters to torch.export, and is known only now
    kind = type("Group", (Group,), {"forward": scope["forward"], "__module__": __name__})
    return kind(recipes, style).eval()


def _default(item: Input) -> Any:
    return {"number": 0.75, "flag": True}.get(item.kind)


def draw_call(
    recipes: Sequence[Recipe], style: str, *, seed: int, batch: int, grow: int = 0
) -> Call:
    """Random arguments for the group of these recipes.

    Args:
        grow: pixels that images and tokens that sequences are longer than in the recipe.
    """
    rng = torch.Generator().manual_seed(seed)
    cells = {
        f"c{k}": {
            item.name: draw_input(item, batch, rng, grow) if item.given else _default(item)
            for item in recipe.inputs
        }
        for k, recipe in enumerate(recipes)
    }
    if style == "nested":
        return Call((), {"batch": cells})
    flat = {
        f"c{k}_{item.name}": cells[f"c{k}"][item.name]
        for k, recipe in enumerate(recipes)
        for item in recipe.inputs
        if item.given
    }
    return Call((), flat) if style == "keywords" else Call(tuple(flat.values()), {})


def draw_input(item: Input, batch: int, rng: torch.Generator, grow: int = 0) -> Tensor:
    """One tensor for an input."""
    axes = {"image": 2, "bytes": 2, "sequence": 1, "tokens": 1, "mask": 1, "row": 0}[item.kind]
    first = 0 if item.kind in ("sequence", "tokens", "mask") else len(item.shape) - axes
    shape = [batch, *item.shape]
    for axis in range(first, first + axes):
        shape[1 + axis] += grow
    if item.kind == "tokens":
        return torch.randint(0, TOKENS, shape, generator=rng)
    if item.kind == "bytes":
        return torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)
    if item.kind == "mask":
        return torch.rand(shape, generator=rng) < 0.7
    return torch.randn(shape, generator=rng)
