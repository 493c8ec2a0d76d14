"""Weights, scales and biases learned together, by what the network's output loses.

Layers that are repaired one by one each have the least error that they can have, and what is left
of all of them adds up at the output. Here it is the output that counts: rounded weights, their
scales and the biases follow the gradient of how far it is from the float model's, for a few passes
over the calibration samples and without labels. Gradients go straight through the rounding
(learned step sizes: Esser et al. 2020), and the integer grid is the one that runs. So few samples
can be learned by heart, and the repair has learned them already: on its own pictures a network is
nearer to the float model than on others, so that their gradients say little. Of pictures it is
other views that are learned from (:mod:`~adalayer_native.repair.views`). Some samples are held
back, the state that is best on those is kept, and nothing is changed where none is better than the
beginning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from adalayer_native._progress import ProgressBar
from adalayer_native.capture import Inputs
from adalayer_native.capture.channels_last import laid_out
from adalayer_native.quantization.fake_quant import QuantLayer
from adalayer_native.quantization.graph import layers_of
from adalayer_native.quantization.lsq import StepSize
from adalayer_native.repair.cells import Cells
from adalayer_native.repair.streams import Data
from adalayer_native.repair.views import has_views, view
from adalayer_native.rounding import conv_form, layer_form, per_channel

__all__ = ["PASSES", "Distance", "Learned", "learn"]

# (float model's output, output) -> how far it is, a scalar; differentiable in the second.
Distance = Callable[[Any, Any], Tensor]

PASSES = 3  # over the samples that are not held back
TOGETHER = 8  # samples per step
RATE = 5e-4  # of the logarithm of scales, and of biases relative to the size of the output
STEP = 0.01  # of weights, in levels
WARM_UP = 5  # steps
GAIN = 0.01  # the least share that the distance has to fall by


@dataclass
class Learned:
    """What learning did.

    Attributes:
        curve: distance on the samples held back, before and after every pass.
        kept: the pass whose state was kept; 0: all was undone.
    """

    curve: list[float] = field(default_factory=list)
    kept: int = 0


def learn(
    prepared: fx.GraphModule,
    twin: fx.GraphModule,
    norms: dict[str, nn.Module | None],
    data: Data,
    apart: list[Tensor],
    distance: Distance,
    *,
    passes: int = PASSES,
    seed: int = 0,
    progress: bool = True,
    cells: Mapping[str, Cells] | None = None,
) -> Learned:
    """Learn weights, scales and biases of a repaired model; masks and ranges stay.

    Args:
        prepared: calibrated and repaired; changed in place. Weights end on their grid.
        twin: the float model.
        norms: batch norm that is folded into a layer, whose bias is learned then.
        data: calibration batches.
        apart: per batch the samples that judge, bool; some of each kind.
        distance: of outputs.
        passes: over the data.
        seed: of the order of samples within a batch, and of the views.
        progress: show a progress bar.
        cells: by layer bounds of its integers.
    """
    run = _Learning(prepared, twin, norms, data, apart, distance, cells or {})
    result = Learned([run.judge()])
    best, state = result.curve[0] * (1 - GAIN), run.state()
    flags = [(p, p.requires_grad) for p in prepared.parameters()]
    total = passes * sum(len(list(run.parts(chosen))) for chosen in apart)
    generator = torch.Generator().manual_seed(seed)
    bar = ProgressBar("Learning", passes * data.batches, unit="batch", enabled=progress)
    try:
        with bar:
            optimizer = run.begin()
            done = 0
            for turn in range(passes):
                for x, chosen in zip(data, apart, strict=True):
                    for part in run.parts(chosen, generator):
                        cosine = 0.5 * (1 + math.cos(math.pi * done / total))
                        share = cosine * min(1.0, (done + 1) / WARM_UP)
                        run.step(optimizer, x, part, share, generator)
                        done += 1
                    bar.advance()
                result.curve.append(run.judge())
                if result.curve[-1] < best:
                    best, state, result.kept = result.curve[-1], run.state(), turn + 1
    finally:
        run.end(state)
        for parameter, wanted in flags:
            parameter.requires_grad_(wanted)
            parameter.grad = None
    return result


class _Learning:
    def __init__(
        self,
        prepared: fx.GraphModule,
        twin: fx.GraphModule,
        norms: dict[str, nn.Module | None],
        data: Data,
        apart: list[Tensor],
        distance: Distance,
        cells: Mapping[str, Cells],
    ) -> None:
        self.prepared, self.twin, self.data, self.apart = prepared, twin, data, apart
        self.distance, self.cells = distance, cells
        self.layers: dict[str, QuantLayer] = layers_of(prepared)
        self.wanted: dict[int, Any] = {}  # the float model's output for samples held back
        # The bias of every layer, and the size of the output that it is a part of.
        self.biases: list[tuple[Any, float]] = []
        for name, layer in self.layers.items():
            norm: Any = norms.get(name)
            if layer.bias is not None:
                rows = conv_form(layer, layer.weight.detach()).flatten(1)
                self.biases.append((layer.bias, float(rows.norm(dim=1).mean())))
            elif norm is not None and norm.bias is not None:
                self.biases.append((norm.bias, float(norm.weight.detach().abs().mean())))

    def parts(self, chosen: Tensor, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """The samples of a batch that are learned from, a step's at a time."""
        places = (~chosen).nonzero().flatten()
        if generator is not None:
            places = places[torch.randperm(len(places), generator=generator)]
        count = -(-len(places) // TOGETHER)
        yield from (part for part in places.tensor_split(max(1, count)) if len(part))

    def begin(self) -> torch.optim.Optimizer:
        """Make what is learned parameters."""
        for parameter in self.prepared.parameters():
            parameter.requires_grad_(False)
        groups: list[dict[str, Any]] = []
        for layer in self.layers.values():
            layer.step = StepSize(layer.weight_scale)
            layer.weight.requires_grad_(True)
            rate = STEP * float(layer.weight_scale.mean())
            groups.append({"params": [layer.weight], "lr": rate})
            groups.append({"params": [layer.step.log], "lr": RATE})
        for bias, size in self.biases:
            bias.requires_grad_(True)
            groups.append({"params": [bias], "lr": RATE * size})
        for group in groups:
            group["peak"] = group["lr"]
        return torch.optim.Adam(groups, betas=(0.9, 0.99))

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        x: Inputs,
        part: Tensor,
        share: float,
        generator: torch.Generator,
    ) -> None:
        """Follow the gradient of some samples, or of views of them."""
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        some = _chosen(x, part)
        some = laid_out(self.prepared, view(some, generator) if has_views(some) else some)
        with torch.no_grad():
            wanted = some(self.twin)
        optimizer.zero_grad()
        with torch.enable_grad():
            self.distance(wanted, some(self.prepared)).backward()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    torch.nan_to_num_(parameter.grad, 0.0, 0.0, 0.0)
        optimizer.step()
        for name, layer in self.layers.items():
            if layer.step is not None:
                layer.weight_scale.copy_(layer.step.value())
            if name in self.cells:
                self._put_back(layer, self.cells[name])

    @torch.no_grad()
    def _put_back(self, layer: QuantLayer, cells: Cells) -> None:
        """Weights whose integers have left their bounds, to the integer that is nearest."""
        scale = per_channel(layer.weight_scale, layer.weight.dim())
        low, high = (layer_form(layer, end * scale) for end in (cells.low, cells.high))
        wide = layer_form(layer, (0.49 * scale).expand_as(cells.low))
        layer.weight.copy_(torch.clamp(layer.weight, low - wide, high + wide))

    @torch.no_grad()
    def judge(self) -> float:
        """Mean distance on the samples held back."""
        total = count = 0.0
        for batch, (x, chosen) in enumerate(zip(self.data, self.apart, strict=True)):
            if bool(chosen.any()):
                some = laid_out(self.prepared, _chosen(x, chosen.nonzero().flatten()))
                if batch not in self.wanted:
                    self.wanted[batch] = some(self.twin)
                value = float(self.distance(self.wanted[batch], some(self.prepared)))
                total += (value if math.isfinite(value) else math.inf) * some.count
                count += some.count
        return total / max(1.0, count)

    @torch.no_grad()
    def state(self) -> list[Tensor]:
        """Copies of what is learned, weights on their grid."""
        found = [layer.quantized_weight().clone() for layer in self.layers.values()]
        found += [layer.weight_scale.clone() for layer in self.layers.values()]
        return found + [bias.detach().clone() for bias, _ in self.biases]

    @torch.no_grad()
    def end(self, state: list[Tensor]) -> None:
        """Take the parameters out again, and a state that was kept."""
        layers = list(self.layers.values())
        for layer in layers:
            if layer.step is not None:
                del layer.step
                layer.step = None
        owners = [layer.weight for layer in layers] + [layer.weight_scale for layer in layers]
        for owner, value in zip([*owners, *(b for b, _ in self.biases)], state, strict=True):
            owner.copy_(value)


def _chosen(x: Inputs, places: Tensor) -> Inputs:
    """Some samples of a batch."""
    count = x.count

    def part(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == count:
            return leaf[places.to(leaf.device)]
        return leaf

    args, kwargs = pytree.tree_map(part, (x.args, x.kwargs))
    return Inputs(tuple(args), dict(kwargs))
