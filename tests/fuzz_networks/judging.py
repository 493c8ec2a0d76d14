"""How results are compared, and what a finding is."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adalayer_native.errors import AdaError


@dataclass(frozen=True)
class Finding:
    """What is wrong with one model.

    Attributes:
        stage: what was tried, in a word or two.
        kind: "wrong" (another result), "refused" (an error of the package's own, where none is
            due), or "crash" (any other error).
        detail: what was expected and what came.
        cell: the cell whose result is wrong, if it is known.
        error: the type of the exception.
    """

    stage: str
    kind: str
    detail: str
    cell: int | None = None
    error: str = ""

    @property
    def signature(self) -> tuple[str, str, str]:
        """Two findings of one signature are taken for the same mistake while shrinking."""
        return self.stage, self.kind, self.error

    def __str__(self) -> str:
        where = "" if self.cell is None else f" in cell {self.cell}"
        return f"{self.kind} at {self.stage}{where}: {self.detail}"


class Failed(Exception):
    """Carries a finding to whoever asked for the judgement."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Turns whatever the package raises meanwhile into a finding."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # layers that stay in float are announced by warnings
            yield
    except Failed:
        raise
    except AdaError as error:
        text = f"{type(error).__name__}: {error}"
        raise Failed(Finding(name, "refused", text, error=type(error).__name__)) from error
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:1500]}"
        raise Failed(Finding(name, "crash", text, error=type(error).__name__)) from error


# Largest difference that other kernels of torch make, relative to the largest value.
ROUNDING = 64 * torch.finfo(torch.float32).eps


def same(name: str, got: Any, expected: Any, excused: Collection[int] = ()) -> int:
    """Equal bits and equal structure, cell by cell.

    Args:
        excused: cells where values may differ by the order of float sums.

    Returns:
        The number of values that do.
    """
    count = 0
    for cell, path, a, b in pairs(name, got, expected):
        if detail := unequal(a, b):
            if cell not in excused or not _close(a, b):
                raise Failed(Finding(name, "wrong", f"{path}: {detail}", cell))
            count += int((a != b).sum())
    return count


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not a.is_floating_point() or a.shape != b.shape:
        return False
    return torch.allclose(a, b, 0, ROUNDING * float(b.abs().max()), equal_nan=True)


def pairs(name: str, got: Any, expected: Any) -> Iterator[tuple[int, str, Any, Any]]:
    """Corresponding leaves of two results of a group; their structures have to be equal."""
    if type(got) is not type(expected) or len(got) != len(expected):
        raise Failed(Finding(name, "wrong", f"expected {len(expected)} results, got {type(got)}"))
    for cell, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        a, form = pytree.tree_flatten_with_path(mine)
        b, wanted = pytree.tree_flatten_with_path(theirs)
        if form != wanted:
            raise Failed(Finding(name, "wrong", f"expected {wanted}, got {form}", cell))
        for (path, left), (_, right) in zip(a, b, strict=True):
            yield cell, pytree.keystr(path) or "result", left, right


def unequal(a: Any, b: Any) -> str:
    """In which way a leaf differs from what is expected; nothing where it has the same bits."""
    return "" if _equal(a, b) else _difference(a, b)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(a, b) or bool(torch.isclose(a, b, 0, 0, equal_nan=True).all())
    return type(a) is type(b) and a == b


def _difference(a: Any, b: Any) -> str:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return f"expected {b!r}, got {a!r}"
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"expected {b.dtype} {list(b.shape)}, got {a.dtype} {list(a.shape)}"
    differ = int((a != b).sum())
    largest = float((a.double() - b.double()).abs().nan_to_num(torch.inf).max())
    return (
        f"{differ} of {a.numel()} values differ, by {largest:.3g} at most; "
        f"expected {_first(b)}, got {_first(a)}"
    )


def _first(value: Tensor) -> str:
    shown = ", ".join(f"{float(item):.6g}" for item in value.flatten()[:4])
    return f"[{shown}{', ...' if value.numel() > 4 else ''}]"


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a user could notice to have changed, but for tensors' bits.

    torch.export puts copies in the place of tuples and lists, of the same objects; that, and copied
    sets, is nothing to anyone. All else has to be the same object: what removes a hook knows the
    dictionary that it stands in.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"type of {name!r}"] = type(module)
        for key, value in vars(module).items():
            if not isinstance(value, dict):
                found[f"attribute {name}.{key}"] = _identity(value)
                continue
            found[f"keys of {name}.{key}"] = id(value), list(value)
            for item, entry in value.items():
                found[f"{name}.{key}[{item!r}]"] = id(entry), getattr(entry, "requires_grad", None)
    return found


def _identity(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value), [_identity(item) for item in value]
    if isinstance(value, set):
        return value.copy()
    return value if isinstance(value, (int, float, str)) else id(value)


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    """Clones of all parameters, buffers and tensor attributes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value
    return {name: value.detach().clone() for name, value in tensors.items()}


def untouched(before: tuple[Any, Any], model: nn.Module) -> None:
    """The user's model is as it was: the same objects, holding the same bits."""
    state, bits = before
    now = state_of(model)
    for name in [*state, *now]:
        if state.get(name) != now.get(name):
            detail = f"{name}: expected {state.get(name)}, got {now.get(name)}"
            raise Failed(Finding("the user's model", "wrong", detail))
    for name, value in bits_of(model).items():
        if name not in bits or not torch.equal(value, bits[name]):
            raise Failed(Finding("the user's model", "wrong", f"tensor {name!r} changed"))
