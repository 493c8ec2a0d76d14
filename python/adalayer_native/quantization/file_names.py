"""Names of tensors in files that earlier versions wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from adalayer_native.quantization.chains import ACT_ROOT

__all__ = ["with_present_names"]

# What Python calls in-place operators, and what the operators are called.
_OPERATORS = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div"}


def with_present_names(tensors: dict[str, Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
    """A file's tensors under the names that the model has for them now.

    Quantizers are called after the values that they quantize: their module, or the operation with
    a running number. Versions before 0.2 took the operation from the model's Python code
    (``iadd_2``, ``view``) and counted each spelling by itself. What both names have in common is
    the operation and the order.
    """
    prefix = f"{ACT_ROOT}."
    old = [key for key in tensors if key.startswith(prefix) and key not in wanted]
    new = [key for key in wanted if key.startswith(prefix) and key not in tensors]
    if not old or len(old) != len(new):
        return tensors
    renamed: dict[str, str] = {}
    for kind in {_kind(key) for key in old}:
        before = sorted((key for key in old if _kind(key) == kind), key=_number)
        after = sorted((key for key in new if _kind(key) == kind), key=_number)
        if len(before) != len(after):
            return tensors
        renamed.update(zip(before, after, strict=True))
    return {renamed.get(key, key): tensor for key, tensor in tensors.items()}


def _parts(key: str) -> tuple[str, int]:
    name = key.split(".")[1]
    found = re.fullmatch(r"(.+?)_(\d+)", name)
    return (found.group(1), int(found.group(2))) if found else (name, 0)


def _kind(key: str) -> str:
    base = _parts(key)[0]
    return _OPERATORS.get(base, base)


def _number(key: str) -> int:
    return _parts(key)[1]
