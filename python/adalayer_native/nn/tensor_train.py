"""Layers whose weight is a tensor train: a chain of ordinary ones.

The small layers are what is quantized, repaired and run: a convolution becomes three convolutions,
a linear layer some linear layers with axes exchanged between them. Each has its modes in its name
(``core2_16x32``), and the shapes of the weights give the ranks, so that the file of a compressed
model says by itself which layers were decomposed, and how.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from adalayer_native.ops import packed_info

__all__ = [
    "Modes",
    "TensorTrainConv2d",
    "TensorTrainLinear",
    "emptied",
    "with_trains",
]

Modes = tuple[tuple[int, int], ...]  # (rows, columns) of every core

PACKED = "weight_packed"
_CORE = re.compile(rf"(.+)\.core(\d+)_(\d+)x(\d+)\.(weight|{PACKED})")


class _Train(nn.Module):
    """Cores by number; the last runs first."""

    def __init__(self, modes: Modes) -> None:
        super().__init__()
        self.modes = modes

    def add(self, k: int, core: nn.Module) -> None:
        rows, columns = self.modes[k]
        self.add_module(f"core{k + 1}_{rows}x{columns}", core)

    def cores(self) -> list[nn.Linear | nn.Conv2d]:
        """From the first to the last."""
        names = [f"core{k + 1}_{m}x{n}" for k, (m, n) in enumerate(self.modes)]
        return [cast("nn.Linear | nn.Conv2d", self.get_submodule(name)) for name in names]


class TensorTrainLinear(_Train):
    """A linear layer with its weight in cores; float32 ``[..., columns]`` to ``[..., rows]``.

    Args:
        modes: rows and columns of every core, two cores or more.
        ranks: between the cores.
        bias: whether there is one.
    """

    def __init__(self, modes: Modes, ranks: Sequence[int], bias: bool) -> None:
        super().__init__(modes)
        self.ranks = (1, *ranks, 1)
        # Where the first core makes all rows, their bias is its own.
        own = all(rows == 1 for rows, _ in modes[1:])
        for k, (rows, columns) in reversed(list(enumerate(modes))):  # in the order of the run
            size = columns * self.ranks[k + 1], rows * self.ranks[k]
            self.add(k, nn.Linear(*size, bias=bias and own and k == 0))
        self.out_features = math.prod(rows for rows, _ in modes)
        separate = bias and not own
        self.bias = nn.Parameter(torch.zeros(self.out_features)) if separate else None

    def forward(self, x: Tensor) -> Tensor:
        lead, axes = x.shape[:-1], range(x.dim() - 1)
        if all(1 in mode for mode in self.modes) and len(self.modes) == 2:
            for core in reversed(self.cores()):
                x = core(x)
            return x
        at = len(lead)
        before, rows = x.shape[-1], 1  # columns of the cores to come, rows of those that have run
        for k, core in reversed(list(enumerate(self.cores()))):
            before //= self.modes[k][1]
            if k == len(self.modes) - 1:
                x = x.reshape(*lead, before, self.modes[k][1])
            else:
                # [..., (P, j), rows, (i, r)] -> [..., P, (rows, i), (j, r)]
                i, rank, j = self.modes[k + 1][0], self.ranks[k + 1], self.modes[k][1]
                x = x.reshape(*lead, before, j, rows, i, rank)
                x = x.permute(*axes, at, at + 2, at + 3, at + 1, at + 4)
                rows *= i
                x = x.reshape(*lead, before, rows, j * rank)
            x = core(x)
        x = x.reshape(*lead, self.out_features)
        return x if self.bias is None else x + self.bias


class TensorTrainConv2d(_Train):
    """A convolution as 1x1, the window, 1x1, without channels that nobody needs between them.

    Args:
        layer: what it stands for; its geometry is taken over.
        ranks: input channels of the first core, and of the second; a 1x1 convolution has one rank.
    """

    def __init__(self, layer: nn.Conv2d, ranks: Sequence[int]) -> None:
        columns, rows = layer.in_channels, layer.out_channels
        point = tuple(layer.kernel_size) == (1, 1)
        super().__init__(((rows, 1), (1, columns)) if point else ((rows, 1), (1, 1), (1, columns)))
        bias = layer.bias is not None
        window: dict[str, Any] = {
            "kernel_size": layer.kernel_size,
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "padding_mode": layer.padding_mode,
        }
        if not point:
            self.add(2, nn.Conv2d(columns, ranks[1], 1, bias=False))
        self.add(1, nn.Conv2d(columns if point else ranks[1], ranks[0], bias=False, **window))
        self.add(0, nn.Conv2d(ranks[0], rows, 1, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        for core in reversed(self.cores()):
            x = core(x)
        return x


def emptied(layer: nn.Module, modes: Modes, ranks: Sequence[int]) -> _Train:
    """A train in place of a layer, on its device, its cores not set.

    Raises:
        ValueError: the modes or ranks are not those of such a layer.
    """
    with torch.device(layer.weight.device):  # type: ignore[arg-type]
        if isinstance(layer, nn.Conv2d):
            train: _Train = TensorTrainConv2d(layer, ranks)
            if train.modes != tuple(modes):
                raise ValueError(f"expected modes {train.modes}, got {tuple(modes)}")
        else:
            assert isinstance(layer, nn.Linear)
            sizes = tuple(math.prod(sizes) for sizes in zip(*modes, strict=True))
            if sizes != (layer.out_features, layer.in_features):
                raise ValueError(
                    f"expected modes of a {layer.out_features}x{layer.in_features} matrix, got "
                    f"{tuple(modes)}"
                )
            train = TensorTrainLinear(tuple(modes), ranks, layer.bias is not None)
    return train.to(layer.weight.dtype).train(layer.training)


def with_trains(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The model with the trains that a file has; itself where it has none, or is a graph.

    Args:
        model: not changed.
        tensors: of the file, among them the cores' weights, packed or float.

    Raises:
        ValueError: names a layer whose train is not one of such a layer.
    """
    cores: dict[str, dict[int, tuple[int, int, int]]] = {}
    for key, value in tensors.items():
        match = _CORE.fullmatch(key)
        if match:
            k, rows, columns = (int(match[part]) for part in (2, 3, 4))
            try:
                outputs = packed_info(value)["shape"][0] if match[5] == PACKED else value.shape[0]
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise ValueError(f"{key}: {error}") from error
            cores.setdefault(match[1], {})[k] = (rows, columns, outputs // max(1, rows))
    present = dict(model.named_modules())
    wanted = {n: c for n, c in cores.items() if type(present.get(n)) in (nn.Conv2d, nn.Linear)}
    if not wanted or isinstance(model, torch.fx.GraphModule):
        return model
    model = copy.deepcopy(model)
    for name, found in wanted.items():
        if len(found) < 2 or sorted(found) != list(range(1, len(found) + 1)):
            raise ValueError(f"layer {name!r}: expected cores from 1 on, got {sorted(found)}")
        ordered = [found[k] for k in sorted(found)]
        modes = tuple((rows, columns) for rows, columns, _ in ordered)
        try:
            train = emptied(present[name], modes, [rank for _, _, rank in ordered[1:]])
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
        model.set_submodule(name, train)
    return model
