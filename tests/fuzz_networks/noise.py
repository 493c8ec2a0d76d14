"""How far 8 bits may move a result.

Whatever quantization does to a network is to add an error of at most half a level to values, a
level being 1/255 of the range of all values of the tensor. So that much noise is added, at random,
to the result of *every* operator that makes new values, and to inputs and weights. How far the
result of a cell moves says how sensitive it is: cancellation, divisions and softmaxes are in it,
whatever the recipe holds. Quantizers of the package stand at some of these places. Its error is one
draw of such noise, so it stays below a small multiple of the noise's root mean square, where a lost
bias or relu lies far above.

In every second draw all elements of a tensor move by the same amount. Rounding does that, too: the
levels of ``x + 0.3`` may lie between those of ``x``, all by the same fraction of a level, and such
errors do not average out where a mean follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .network import Call, copied

DRAWS = 4


class Noise(TorchDispatchMode):
    """Adds up to half a level of noise to all new values, each its own or all elements the same."""

    def __init__(self, seed: int, *, together: bool) -> None:
        super().__init__()
        self.together = together
        self.rng = torch.Generator().manual_seed(seed)
        self.weights: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(nn.Parameter, self.weight, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if any(isinstance(item, Tensor) for item in pytree.tree_leaves((args, kwargs))):
            for item, schema in zip(
                result if isinstance(result, (tuple, list)) else [result],
                func._schema.returns,
                strict=False,
            ):
                writes = schema.alias_info is not None and schema.alias_info.is_write
                if schema.alias_info is None or writes:
                    self.disturb(item)
        return result

    def weight(self, value: Tensor) -> Tensor:
        """A parameter as it is stored: the same whenever it is read, with a scale per row."""
        key = id(value)
        if key not in self.weights:
            steps = value.abs().flatten(1).amax(1) / 127 if value.dim() > 1 else value.abs() * 0
            shape = (-1, *[1] * (value.dim() - 1)) if value.dim() else ()
            noise = torch.rand(value.shape, generator=self.rng) - 0.5
            self.weights[key] = value.detach() + noise * steps.reshape(shape)
        return self.weights[key]

    def disturb(self, value: Any) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
            return
        finite = value.isfinite()
        kept = torch.where(finite, value, 0.0)
        level = (float(kept.max().clamp(min=0)) - float(kept.min().clamp(max=0))) / 255
        shape = () if self.together else value.shape
        noise = torch.rand(shape, generator=self.rng, dtype=value.dtype) - 0.5
        value.add_(torch.where(finite, noise * level, 0.0))


def deviations(model: nn.Module, call: Call, expected: Any) -> list[float]:
    """Root mean square over draws of the distance by which noise moves every leaf of a result."""
    leaves = pytree.tree_leaves(expected)
    squares = [0.0] * len(leaves)
    for draw in range(DRAWS):
        noise = Noise(draw, together=draw % 2 == 1)
        args, kwargs = copied(call.args), copied(call.kwargs)
        for item in pytree.tree_leaves((args, kwargs)):
            noise.disturb(item)
        with torch.no_grad(), noise:
            found = pytree.tree_leaves(model(*args, **kwargs))
        for k, (a, b) in enumerate(zip(found, leaves, strict=True)):
            squares[k] += distance(a, b) ** 2
    return [(total / DRAWS) ** 0.5 for total in squares]


def distance(a: Any, b: Any) -> float:
    """Euclidean; 0 for what is no float tensor."""
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return 0.0
    return float((a.double() - b.double()).nan_to_num(0.0).norm())
