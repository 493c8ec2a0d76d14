"""Where a network loses at few bits: EfficientNet-Lite0 with a part of its layers rounded.

    python -m bench.accuracy_parts --data imagenet500.zip

Every layer is repaired by itself, on the inputs that the float network gives it, with three
quarters of half a; the loss is that on the other quarter, in nats per picture, while all other
layers and all activations stay in float. So it says what the rounding of a part costs, before
errors of several parts meet. The table goes to standard output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import adalayer_native as ada
from adalayer_native.capture import GraphModel
from adalayer_native.importance.batches import kl_divergence
from adalayer_native.plan import supported_layers
from adalayer_native.repair import HELD_BACK, layer_hessians
from adalayer_native.repair.streams import Data
from adalayer_native.rounding import layer_form
from bench.accuracy_imagenet import pictures
from bench.markdown import table
from bench.zoo.networks import efficientnet_lite

Rounded = Mapping[str, tuple[Tensor, Tensor]]  # weight, and what is added to the output


def kind_of(layer: Any) -> str:
    """What a layer is for in a network of inverted bottlenecks."""
    if isinstance(layer, nn.Linear):
        return "classifier"
    if layer.groups > 1:
        return "depthwise"
    if layer.in_channels <= 3:
        return "first layer"
    return "expanding" if layer.out_channels > layer.in_channels else "projecting"


def parts_of(layers: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of layers by kind, and by where they are: fifths of the network."""
    parts: dict[str, list[str]] = {}
    for name, layer in layers.items():
        parts.setdefault(kind_of(layer), []).append(name)
    names = list(layers)
    for fifth in range(5):
        own = names[len(names) * fifth // 5 : len(names) * (fifth + 1) // 5]
        parts[f"layers {names.index(own[0]) + 1} to {names.index(own[-1]) + 1}"] = own
    return {**parts, "all": names}


def rounded(model: GraphModel, loader: Sequence[Any], bits: int) -> Rounded:
    """Every layer's weight, repaired by itself."""
    layers = supported_layers(model)
    found = {}
    for name, hessian in layer_hessians(
        model, loader, held_back=HELD_BACK, memory=1 << 30, progress=sys.stderr.isatty()
    ):
        solution = hessian.quantize(bits, passes=2)
        found[name] = layer_form(layers[name], solution.weight), solution.bias_shift
    return found


@torch.no_grad()
def loss_with(model: nn.Module, part: Rounded, batches: Sequence[Tensor]) -> tuple[float, float]:
    """Nats per picture, and percent of pictures with the float network's class."""

    def shifted(shift: Tensor) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return output + (shift if output.dim() == 2 else shift.view(-1, 1, 1))

        return hook

    loss = same = total = 0.0
    for x in batches:
        wanted = model(x)
        handles = [
            model.get_submodule(name).register_forward_hook(shifted(shift))
            for name, (_, shift) in part.items()
        ]
        try:
            weights = {f"{name}.weight": weight for name, (weight, _) in part.items()}
            found = functional_call(model, weights, (x,))
        finally:
            for handle in handles:
                handle.remove()
        loss += kl_divergence(wanted, found) * len(x)
        same += float((wanted.argmax(1) == found.argmax(1)).sum())
        total += len(x)
    return loss / total, 100 * same / total


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy_parts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, type=Path, help="folder or zip of both halves")
    parser.add_argument("--bits", type=int, default=4)
    given = parser.parse_args(arguments)
    loader = pictures(given.data, "a")
    model = ada.capture(efficientnet_lite.ENTRIES[0].make().eval(), loader[0][0][:2])
    data = Data(model, loader, None)
    judging = [
        x.tensors()[0][chosen]
        for x, chosen in zip(data, data.held_back(HELD_BACK), strict=True)
        if bool(chosen.any())
    ]
    judging = list(torch.cat(judging).contiguous(memory_format=torch.channels_last).split(16))
    solutions = rounded(model, loader, given.bits)
    layers = supported_layers(model)
    rows = []
    for part, names in parts_of(layers).items():
        loss, same = loss_with(model, {name: solutions[name] for name in names}, judging)
        weights = sum(layers[name].weight.numel() for name in names)
        rows.append([part, str(len(names)), f"{weights:,}", f"{loss:.3f}", f"{same:.1f} %"])
    print("\n".join(table(["rounded", "layers", "weights", "nats", "agreement"], rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
