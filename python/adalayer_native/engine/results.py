"""What goes in and comes out of an engine: ports, views of outputs, nested results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from adalayer_native.engine.views import Dims, merged
from adalayer_native.errors import UnsupportedModelError

__all__ = [
    "ID_TYPES",
    "INTEGERS",
    "Leaf",
    "Output",
    "Port",
    "described",
    "nest",
    "skeleton",
    "thawed",
]

# Of token ids: one and the same to callers, since tokenizers give either.
ID_TYPES = (torch.int64, torch.int32)
# Types of tensors that reach the parts in torch as they are: token ids, pixels, masks.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class Port:
    """An input.

    Attributes:
        name: as the exported model calls it.
        shape: sizes without the batch.
        dtype: float32, for which bfloat16 and half may come too; or an integer type or bool, which
            is what has to come.
        batched: whether the batch is its first axis; else it is one tensor for all samples.
        axes: of ``shape``, where some sizes are free: an :class:`~.sizes.Axis`, or None where it is
            fixed; empty where all are. ``shape`` is what was compiled.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    batched: bool = True
    axes: tuple[Any, ...] = ()

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether these sizes, without the batch, are allowed."""
        if len(shape) != len(self.shape):
            return False
        free = self.axes or (None,) * len(shape)
        return all(
            n == own if axis is None else axis.size.allowed(n)
            for n, own, axis in zip(shape, self.shape, free, strict=True)
        )

    @property
    def is_float(self) -> bool:
        """Whether it holds floats."""
        return self.dtype is torch.float32

    def sizes(self, batch: int) -> tuple[int, ...]:
        """Sizes of the tensor for a batch."""
        return (batch, *self.shape) if self.batched else self.shape

    def __str__(self) -> str:
        free = self.axes or (None,) * len(self.shape)
        shown = [axis.size if axis else n for n, axis in zip(self.shape, free, strict=True)]
        sizes = ["batch", *shown] if self.batched else shown
        return f"[{', '.join(map(str, sizes))}]"

    def sample(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """A tensor to measure with: noise from 0 to 1, or integers that every model takes.

        Integers are zeros, since an index may not reach beyond a table that nobody here knows, and
        masks are all ones, since a row without anything in it is a case of its own in attention.
        """
        if self.is_float:
            return torch.rand(self.sizes(batch), device=device)
        fill = self.dtype is torch.bool
        return torch.full(self.sizes(batch), fill, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Output:
    """How a tensor shows a program's output.

    Attributes:
        source: which of the program's outputs.
        shape: sizes of the tensor without the batch.
        atoms: sizes and strides that give the tensor its order; None if it is that of memory.
        folded: the first of ``shape`` is merged into the batch. Only between parts of an engine.
    """

    source: int
    shape: tuple[int, ...]
    atoms: tuple[tuple[int, int], ...] | None
    folded: bool = False

    @classmethod
    def of(cls, source: int, shape: Sequence[int], dims: Dims, folded: bool = False) -> Output:
        """From a view, see ``views.py``."""
        flat = tuple(atom for atoms in dims for atom in atoms)
        plain = merged(flat) == merged([(math.prod(shape), 1)])
        return cls(source, tuple(shape), None if plain else flat, folded)

    def fits(self, elements: int) -> bool:
        """Whether it shows each of so many elements once at most, and none outside of them."""
        if math.prod(self.shape) != elements:
            return False
        if self.atoms is None:
            return True
        reach = sum((n - 1) * step for n, step in self.atoms)
        negative = any(n < 1 or step < 0 for n, step in self.atoms)
        return not negative and reach < elements and math.prod(n for n, _ in self.atoms) == elements

    def view(self, memory: Tensor) -> Tensor:
        """The tensor over ``memory``, [batch, elements]: contiguous, as a linear layer's is."""
        n, elements = memory.shape
        if self.atoms is not None:
            sizes = [n, *(size for size, _ in self.atoms)]
            strides = [elements, *(stride for _, stride in self.atoms)]
            memory = memory.as_strided(sizes, strides).contiguous()
        shown = memory.reshape(n, *self.shape)
        return shown.flatten(0, 1) if self.folded else shown


@dataclass(frozen=True)
class Leaf:
    """A tensor of a call or a result, by number."""

    number: int


@dataclass(frozen=True)
class _Place:
    """Stands for a leaf while the containers around it are looked at."""

    number: int


def skeleton(spec: Any) -> Any:
    """The containers of a ``TreeSpec``, which is made again with ``pytree.tree_structure``.

    Copies and pickles hold these: the class of a specification differs among versions of torch.
    """
    return pytree.tree_unflatten([_Place(k) for k in range(spec.num_leaves)], spec)


def thawed(spec: Any) -> Any:
    """A ``TreeSpec`` with the model's own lists and dictionaries.

    A ``torch.fx.GraphModule`` returns the containers that its graph holds, which cannot be changed.
    """

    def thaw(item: Any) -> Any:
        children, outer = pytree.tree_flatten(item, is_leaf=lambda other: other is not item)
        if outer.is_leaf():
            return item
        children = [thaw(child) for child in children]
        if isinstance(item, immutable_list):
            return children
        if isinstance(item, immutable_dict):
            return dict(zip(item, children, strict=True))
        return pytree.tree_unflatten(children, outer)

    return pytree.tree_structure(thaw(skeleton(spec)))


def described(spec: Any, leaves: Sequence[Any], what: str) -> tuple[Any, list[Any]]:
    """A nest for JSON: 3, {"tuple": [...]}, {"list": [...]} or {"dict": {...}}, and its leaves.

    Numbers are places in the returned leaves: those given, and behind them what containers hold
    beside their leaves (fields of a dataclass that are None). JSON has no types of ours: a
    dataclass, an ``OrderedDict`` and what derives from it become a dict, a named tuple a tuple.

    Args:
        spec: a ``TreeSpec`` of :mod:`torch.utils._pytree`.
        leaves: one per leaf of ``spec``.
        what: for the error.

    Raises:
        UnsupportedModelError: another kind of container, or keys that are no strings.
    """
    found = list(leaves)

    def walk(item: Any) -> Any:
        if isinstance(item, _Place):
            return item.number
        if item is None or isinstance(item, (bool, int, float, str)):
            found.append(item)
            return len(found) - 1
        if isinstance(item, dict) and all(isinstance(key, str) for key in item):
            return {"dict": {key: walk(value) for key, value in item.items()}}
        if isinstance(item, (list, tuple)):
            kind = "list" if isinstance(item, list) else "tuple"
            return {kind: [walk(value) for value in item]}
        if dataclasses.is_dataclass(item):
            fields = (field.name for field in dataclasses.fields(item))
            return {"dict": {name: walk(getattr(item, name)) for name in fields}}
        raise UnsupportedModelError(
            f"{what}: a file holds tensors in tuples, lists, dataclasses and dictionaries with "
            f"string keys, got a {type(item).__name__}"
        )

    return walk(skeleton(spec)), found


def nest(structure: Any, leaves: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The other way: ``TreeSpec`` and its leaves in order, from what a file says.

    Raises:
        LookupError, TypeError, ValueError: it says something else than :func:`described` does.
    """

    def build(item: Any) -> Any:
        if type(item) is int:
            if not 0 <= item < len(leaves):
                raise IndexError(f"expected a leaf below {len(leaves)}, got {item}")
            return _Place(item)
        ((kind, items),) = item.items()
        if kind == "dict":
            return {key: build(value) for key, value in items.items()}
        if kind not in ("list", "tuple"):
            raise ValueError(f"expected a tuple, list or dict, got {kind!r}")
        built = [build(value) for value in items]
        return built if kind == "list" else tuple(built)

    places, spec = pytree.tree_flatten(build(structure))
    return spec, [leaves[place.number] for place in places]
