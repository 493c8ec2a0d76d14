"""What goes in and comes out of an engine: ports, views of outputs, nested results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adalayer_native.engine.views import Dims, merged
from adalayer_native.errors import UnsupportedModelError

__all__ = ["Leaf", "Output", "Port", "mapped", "rebuild", "structure_of"]


@dataclass(frozen=True)
class Port:
    """An input: its name and its sizes without the batch."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Output:
    """How a tensor shows a program's output.

    Attributes:
        source: which of the program's outputs.
        shape: sizes of the tensor without the batch.
        atoms: sizes and strides that give the tensor its order; None if it is that of memory.
    """

    source: int
    shape: tuple[int, ...]
    atoms: tuple[tuple[int, int], ...] | None

    @classmethod
    def of(cls, source: int, shape: Sequence[int], dims: Dims) -> Output:
        """From a view, see ``views.py``."""
        flat = tuple(atom for atoms in dims for atom in atoms)
        plain = merged(flat) == merged([(math.prod(shape), 1)])
        return cls(source, tuple(shape), None if plain else flat)

    def view(self, memory: Tensor) -> Tensor:
        """The tensor over ``memory``, [batch, elements]."""
        n, elements = memory.shape
        if self.atoms is not None:
            sizes = [n, *(size for size, _ in self.atoms)]
            strides = [elements, *(stride for _, stride in self.atoms)]
            memory = memory.as_strided(sizes, strides)
        return memory.reshape(n, *self.shape)


@dataclass(frozen=True)
class Leaf:
    """A tensor of the result, by number."""

    number: int


def structure_of(nested: Any) -> Any:
    """JSON form of a nest of leaf numbers: 3, {"tuple": [...]}, {"list": ...}, {"dict": ...}.

    Raises:
        UnsupportedModelError: another kind of container.
    """
    if isinstance(nested, int):
        return nested
    if isinstance(nested, dict) and all(isinstance(key, str) for key in nested):
        return {"dict": {key: structure_of(value) for key, value in nested.items()}}
    if isinstance(nested, (list, tuple)):
        kind = "list" if isinstance(nested, list) else "tuple"
        return {kind: [structure_of(item) for item in nested]}
    raise UnsupportedModelError(
        "expected a model that returns a tensor, or tensors in tuples, lists and dictionaries with "
        f"string keys, got a {type(nested).__name__}"
    )


def rebuild(structure: Any, leaves: Sequence[Any]) -> Any:
    if isinstance(structure, int):
        return leaves[structure]
    ((kind, items),) = structure.items()
    if kind == "dict":
        return {key: rebuild(value, leaves) for key, value in items.items()}
    built = [rebuild(item, leaves) for item in items]
    return built if kind == "list" else tuple(built)


def mapped(nested: Any, function: Any) -> Any:
    if isinstance(nested, dict):
        return {key: mapped(value, function) for key, value in nested.items()}
    if isinstance(nested, (list, tuple)):
        return type(nested)(mapped(item, function) for item in nested)
    return function(nested)
