"""Where a network loses at few bits: EfficientNet-Lite0 with a part of its layers rounded.

    python -m bench.accuracy_parts --data imagenet500.zip
    python -m bench.accuracy_parts --data imagenet500.zip --inputs 6

Every layer is repaired by itself, on the inputs that the float network gives it, with three
quarters of half a; the loss is that on the other quarter, in nats per picture, while all other
layers and all activations stay in float. So it says what the rounding of a part costs, before
errors of several parts meet. With ``--inputs`` it is the layers' inputs that have few bits, a part
of them at a time; all weights and the other inputs have 8. Ranges are of three quarters of half a,
and the logits' error is that on the other quarter. The table goes to standard output.
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
from adalayer_native.plan import MAX_BITS, layer_kind, supported_layers
from adalayer_native.quantization.fake_quant import ActivationQuantizer
from adalayer_native.quantization.graph import layers_of, metadata, quantizers_of
from adalayer_native.quantization.observing import observers_for
from adalayer_native.repair import HELD_BACK, layer_hessians
from adalayer_native.repair.streams import Data
from adalayer_native.rounding import layer_form
from bench.accuracy_imagenet import judged, pictures
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


def inputs_of(prepared: GraphModel) -> dict[str, list[ActivationQuantizer]]:
    """What layers read, by the kind of the first reader; the first layer's is the picture."""
    layers, quantizers = layers_of(prepared), quantizers_of(prepared)
    found: dict[str, dict[str, ActivationQuantizer]] = {}
    taken: set[str] = set()
    for name, entry in metadata(prepared, "layers").items():
        target = entry["input"]
        if target not in taken:
            kind = kind_of(layers[name])
            kind = "the picture" if kind == "first layer" else f"read by {kind}"
            found.setdefault(kind, {})[target] = quantizers[target]
            taken.add(target)
    parts = {kind: list(own.values()) for kind, own in found.items()}
    activations = [q for kind, own in parts.items() if kind != "the picture" for q in own]
    wide = {id(q) for q in parts.get("read by depthwise", [])}
    parts["all but the picture and those of depthwise"] = [
        q for q in activations if id(q) not in wide
    ]
    parts["all but those of depthwise"] = [
        *parts.get("the picture", []), *parts["all but the picture and those of depthwise"],
    ]  # fmt: skip
    return parts


@torch.no_grad()
def narrow_inputs(
    model: GraphModel, loader: Sequence[Tensor], judging: Sequence[Tensor], bits: int
) -> list[list[str]]:
    """Rows of the table: part, values, the logits' error, percent of pictures with their class."""
    layers = supported_layers(model)
    entries = {
        name: ada.LayerPlan(name, layer_kind(layer), layer.weight.numel(), MAX_BITS)
        for name, layer in layers.items()
    }
    prepared = ada.prepare(model, ada.Plan(entries))
    quantizers = quantizers_of(prepared)
    observers = observers_for(prepared, "mse")  # what they have seen serves every width
    for name, quantizer in quantizers.items():
        quantizer.observer = observers[name]
    for x in loader:
        prepared(x)
    names = {id(quantizer): name for name, quantizer in quantizers.items()}

    def narrowed(part: Sequence[ActivationQuantizer], width: int) -> None:
        for quantizer in part:
            observer = observers[names[id(quantizer)]]
            observer.bits = quantizer.bits = width
            quantizer.set_range(*observer.range())

    for quantizer in quantizers.values():
        quantizer.observer = None
    narrowed(list(quantizers.values()), MAX_BITS)
    rows = []
    for title, part in {"none": [], **inputs_of(prepared)}.items():
        narrowed(part, bits)
        found = judged(prepared, [(x, torch.zeros(len(x))) for x in judging], model)
        narrowed(part, MAX_BITS)
        rows.append([title, str(len(part)), f"{found['error']:.4f}", f"{found['agreement']:.1f} %"])
    return rows


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


def _split(parts: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.cat(list(parts)).contiguous(memory_format=torch.channels_last).split(16))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy_parts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, type=Path, help="folder or zip of both halves")
    parser.add_argument("--bits", type=int, default=4, help="of weights")
    parser.add_argument("--inputs", type=int, help="of layers' inputs, in place of weights")
    given = parser.parse_args(arguments)
    loader = pictures(given.data, "a")
    model = ada.capture(efficientnet_lite.ENTRIES[0].make().eval(), loader[0][0][:2])
    data = Data(model, loader, None)
    apart = list(zip(data, data.held_back(HELD_BACK), strict=True))
    judging = _split([x.tensors()[0][chosen] for x, chosen in apart])
    if given.inputs is not None:
        using = _split([x.tensors()[0][~chosen] for x, chosen in apart])
        heading = ["narrow", "values", "logit error", "agreement"]
        body = narrow_inputs(model, using, judging, given.inputs)
        print("\n".join(table(heading, body)))
        return 0
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
