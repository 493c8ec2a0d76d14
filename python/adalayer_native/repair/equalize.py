r"""Cross-layer equalization: channels between two layers scaled so that both round better.

Between two layers with nothing but a batch norm, a ReLU and pooling, which commute with positive
factors, every channel may be divided by ``s`` before and multiplied by ``s`` after without changing
the network (Nagel et al., 2019, "Data-Free Quantization Through Weight Equalization and Bias
Correction"). It does change what rounding costs: the channels share one activation grid, and the
second layer's rows share one weight grid over all their input channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from adalayer_native._progress import ProgressBar
from adalayer_native.capture import TensorInfo, info_of
from adalayer_native.capture import vocabulary as table
from adalayer_native.pruning.patterns import pattern_mask
from adalayer_native.quantization.fake_quant import ActivationQuantizer, QuantLayer
from adalayer_native.quantization.graph import layers_of, metadata
from adalayer_native.quantization.observers import make_observer
from adalayer_native.repair.hessian import LayerHessian
from adalayer_native.repair.input_rows import groups_of
from adalayer_native.repair.streams import Data, float_twin, in_order, norm_gain, rows_per_image
from adalayer_native.rounding import conv_form, layer_form

__all__ = ["EqualizedPair", "Pair", "equalize_layers", "pairs_of", "scale_pair"]

# Images that errors are measured on, and how much a pair's error has to fall.
IMAGES = 32
GAIN = 0.02
CHANNELS = 64  # output channels of the second layer that are looked at
# Factors are only measured where the estimate of :meth:`_Trial.expected` falls so far.
PROMISING = 0.9
LARGEST = 64.0  # factors are kept within [1 / LARGEST, LARGEST]
# Powers of a channel's root mean square that are tried as factors.
POWERS = (0.25, 0.5)
_SCALED = frozenset(
    f"aten.{name}.default"
    for name in (
        "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Two layers whose channels in between may be scaled.

    Attributes:
        first, second: layers.
        norm: batch norm of the first one, or ``None``.
        quantizers: of the tensors between them; the second layer reads the last one's grid.
        channels: output channels of the first layer.
    """

    first: str
    second: str
    norm: str | None
    quantizers: tuple[str, ...]
    channels: int


@dataclass(frozen=True)
class EqualizedPair:
    """What was decided for a pair.

    Attributes:
        first, second: layers.
        kind: ``"none"``, ``"weights"`` (factors of Nagel et al.), or ``"inputs 0.5"``: channels
            divided by that power of their root mean square.
        before, after: output error of the second layer, quantized input included, over the
            variance of its output; ``None`` where no factors promised to lower it.
    """

    first: str
    second: str
    kind: str
    before: float | None
    after: float | None


def pairs_of(prepared: fx.GraphModule) -> list[Pair]:
    """Pairs of a prepared model, in graph order.

    Both layers are quantized and called once. Between them stand a batch norm with affine
    parameters, a ReLU, pooling, dropout, flattening: each the only reader of what is before it.
    """
    entries = metadata(prepared, "layers")
    modules = dict(prepared.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in prepared.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    found = []
    for name in in_order(prepared):
        if len(calls[name]) != 1:
            continue
        pair = _follow(name, entries, modules, calls)
        if pair is not None:
            found.append(pair)
    return found


def _follow(
    name: str,
    entries: dict[str, Any],
    modules: dict[str, nn.Module],
    calls: dict[str, list[fx.Node]],
) -> Pair | None:
    layer: Any = modules[name]
    channels = conv_form(layer, layer.weight).shape[0]
    norm = entries[name]["batch_norm"]
    quantizers: list[str] = []
    flat = isinstance(layer, nn.Linear)
    node = calls[name][0]
    while True:
        if len(node.users) != 1:
            return None
        node = next(iter(node.users))
        module = table.module_of(node, modules)
        target = str(node.target)
        if target in entries and node.op == "call_module":
            break
        if isinstance(module, ActivationQuantizer):
            if len(calls[target]) != 1:
                return None  # a grid that another tensor shares
            quantizers.append(target)
        elif target == norm and node.op == "call_module":
            if len(calls[target]) != 1 or getattr(module, "weight", None) is None:
                return None
        elif _flattens(node):
            flat = True
        elif not _scales(node, modules):
            return None
    second: Any = modules[target]
    inputs = second.in_features if isinstance(second, nn.Linear) else second.in_channels
    fits = inputs % channels == 0 and flat if isinstance(second, nn.Linear) else inputs == channels
    if not quantizers or len(calls[target]) != 1 or not fits:
        return None
    if isinstance(layer, nn.Linear) and inputs != channels:
        return None
    return Pair(name, target, norm, tuple(quantizers), channels)


def _scales(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether an operation turns ``x / s`` into its result over ``s``, channel by channel."""
    if table.is_identity(node, modules) or table.clamp_range(node) == (0.0, float("inf")):
        return True
    if node.op != "call_function":
        return False
    if table.op_name(node) in ("aten.constant_pad_nd.default", "aten.pad.default"):
        return table.is_grid_preserving(node, modules)
    if table.op_name(node) == "aten.mean.dim":
        rank = _rank(node.args[0])
        return rank == 4 and sorted(axis % 4 for axis in node.args[1]) == [2, 3]  # type: ignore[union-attr, operator]
    return table.op_name(node) in _SCALED


def _flattens(node: fx.Node) -> bool:
    """Whether ``[N, C, H, W]`` becomes ``[N, C * H * W]``."""
    if node.op != "call_function" or table.op_name(node) not in table.RESHAPES:
        return False
    before, after = info_of(node.args[0]), info_of(node)
    return (
        isinstance(before, TensorInfo)
        and isinstance(after, TensorInfo)
        and len(before.shape) == 4
        and len(after.shape) == 2
        and before.sizes[0] == after.sizes[0]
    )


def _rank(node: Any) -> int:
    info = info_of(node)
    return len(info.shape) if isinstance(info, TensorInfo) else 0


@torch.no_grad()
def scale_pair(prepared: nn.Module, pair: Pair, factor: Tensor) -> None:
    """Divide the channels between two layers by ``factor``, ``[channels]`` and positive.

    The float function of the model stays what it is. Ranges of the quantizers between them, and
    scales and masks of the layers, are the caller's business.
    """
    first: Any = prepared.get_submodule(pair.first)
    second: Any = prepared.get_submodule(pair.second)
    if pair.norm is not None:
        norm: Any = prepared.get_submodule(pair.norm)
        norm.weight.div_(factor)
        norm.bias.div_(factor)
    else:
        form = conv_form(first, first.weight)
        shape = (-1, *([1] * (form.dim() - 1)))
        first.weight.copy_(layer_form(first, form / factor.view(shape)))
        if first.bias is not None:
            first.bias.div_(factor)
    second.weight.copy_(_scaled_inputs(second, second.weight, factor))
    _note(prepared, pair, factor)


def _note(prepared: nn.Module, pair: Pair, factor: Tensor) -> None:
    """Values between the layers are no longer the float model's: who compares them has to know."""
    assert isinstance(prepared, fx.GraphModule)
    known = prepared.meta.setdefault("equalized", {})
    before = known.get(pair.first)
    known[pair.first] = {
        "second": pair.second,
        "quantizers": list(pair.quantizers),
        "factor": factor.clone() if before is None else before["factor"] * factor,
    }


def _scaled_inputs(layer: Any, weight: Tensor, factor: Tensor) -> Tensor:
    form = conv_form(layer, weight)
    if isinstance(layer, nn.Linear):
        return form * factor.repeat_interleave(form.shape[1] // len(factor))
    groups = groups_of(layer)
    grouped = form.reshape(groups, -1, *form.shape[1:])
    scaled = grouped * factor.view(groups, 1, -1, 1, 1)
    return layer_form(layer, scaled.reshape(form.shape))


@torch.no_grad()
def equalize_layers(
    prepared: fx.GraphModule,
    data: Data,
    *,
    images: int = IMAGES,
    keep_masks: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> list[EqualizedPair]:
    """Equalize the pairs of a prepared model where the second layer's measured error falls.

    The error is that of the second layer's output on real inputs, quantized as they will be and
    with the weight rounded and pruned as :class:`LayerHessian` does it; the factors that are tried
    are those of the weights' ranges (Nagel et al.) and powers of the channels' root mean squares,
    which give channels of large values a finer share of the weight's grid.

    Args:
        prepared: from :func:`prepare`, calibrated. Changed in place: batch norms or first layers,
            second layers with their scales and masks, and ranges of the quantizers between them.
        data: calibration batches.
        images: errors are measured on so many at most.
        keep_masks: leave pruned what is pruned; else masks are by magnitude of the new weights.
        seed: of the draw of output positions.
        progress: show a progress bar.

    Returns:
        What was decided, a pair at a time in graph order.
    """
    pairs = pairs_of(prepared)
    entries, layers = metadata(prepared, "layers"), layers_of(prepared)
    found = []
    with ProgressBar("Equalizing", len(pairs), unit="pair", enabled=progress) as bar:
        for pair in pairs:
            trial = _Trial(prepared, pair, layers, entries, keep_masks, seed)
            trial.collect(data, images)
            found.append(trial.run())
            bar.advance(note=pair.second)
    return found


class _Trial:
    """One pair: its inputs, and what factors make of its second layer."""

    def __init__(
        self,
        prepared: fx.GraphModule,
        pair: Pair,
        layers: dict[str, QuantLayer],
        entries: dict[str, Any],
        keep_masks: bool,
        seed: int,
    ) -> None:
        self.prepared, self.pair, self.seed = prepared, pair, seed
        self.keep_masks = keep_masks
        self.layers, self.entries = layers, entries
        self.first, self.second = layers[pair.first], layers[pair.second]
        norm = entries[pair.second]["batch_norm"]
        self.gain = norm_gain(None if norm is None else prepared.get_submodule(norm))
        self.quantizers: list[Any] = [prepared.get_submodule(name) for name in pair.quantizers]
        # Float tensors: what the quantizers read, and last the second layer's input.
        self.seen: list[list[Tensor]] = [[] for _ in (*pair.quantizers, pair.second)]
        self.inputs = self.seen[-1]

    def collect(self, data: Data, images: int) -> None:
        """Float tensors between the layers."""
        twin = float_twin(self.prepared)
        room = images

        def into(seen: list[Tensor]) -> Any:
            def see(_: nn.Module, args: tuple[Any, ...]) -> None:
                seen.append(args[0].detach().clone())

            return see

        places = (*self.pair.quantizers, self.pair.second)
        for name, seen in zip(places, self.seen, strict=True):
            twin.get_submodule(name).register_forward_pre_hook(into(seen))
        for x in data:
            if room <= 0:
                break
            x[:room](twin)
            room -= x.count

    def run(self) -> EqualizedPair:
        """Try all factors and keep the best, or none."""
        ones = torch.ones(self.pair.channels, device=self.second.weight.device)
        usual = self.expected(ones)
        candidates = [
            (label, factor)
            for label, factor in self.candidates()
            if self.expected(factor) < PROMISING * usual
        ]
        if not candidates:
            return EqualizedPair(self.pair.first, self.pair.second, "none", None, None)
        before = self.error(ones)
        best, kind, least = ones, "none", before
        for label, factor in candidates:
            error = self.error(factor)
            if error < least and error < before * (1 - GAIN):
                best, kind, least = factor, label, error
        if kind != "none":
            scale_pair(self.prepared, self.pair, best)
            for quantizer, seen in zip(self.quantizers, self.seen, strict=False):
                quantizer.set_range(*self.range(quantizer, seen, best))
            if self.pair.norm is None:
                self.refresh(self.pair.first)
            self.refresh(self.pair.second)
        return EqualizedPair(self.pair.first, self.pair.second, kind, before, least)

    def refresh(self, name: str) -> None:
        """Mask and scales of a weight that has changed."""
        layer, entry = self.layers[name], self.entries[name]
        if layer.mask is not None and not self.keep_masks:
            form = conv_form(layer, layer.weight.detach())
            mask = pattern_mask(form, entry["sparsity"], entry["pattern"])
            layer.mask = layer_form(layer, mask)
        layer.refresh_scales()

    def candidates(self) -> list[tuple[str, Tensor]]:
        """Factors to try."""
        first = conv_form(self.first, self.first.weight).flatten(1).abs().amax(dim=1)
        if self.pair.norm is not None:
            gain = norm_gain(self.prepared.get_submodule(self.pair.norm))
            assert gain is not None
            first = first * gain.abs()
        second = self._per_channel(self.second.weight.abs())
        rms = self.squares().sqrt()
        found = [("weights", _limited((first / second).sqrt()))]
        found += [(f"inputs {power:g}", _limited(rms**power)) for power in POWERS]
        return found

    def squares(self) -> Tensor:
        """Mean square of every channel between the layers."""
        total, count = torch.zeros(self.pair.channels, device=self.second.weight.device), 0
        for x in self.inputs:
            # [N, C, taps] of an image, [N, C, taps] of what was flattened.
            values = (
                x.reshape(x.shape[0], self.pair.channels, -1)
                if x.dim() == 4
                else (x.reshape(-1, self.pair.channels, x.shape[-1] // self.pair.channels))
            )
            total += values.square().sum(dim=(0, 2))
            count += values.shape[0] * values.shape[2]
        return total / max(1, count)

    def _blocks(self, weight: Tensor) -> Tensor:
        """The second layer's weight as ``[G, O/G, channels/G, taps]``."""
        form = conv_form(self.second, weight)
        groups = groups_of(self.second)
        return form.reshape(groups, form.shape[0] // groups, self.pair.channels // groups, -1)

    def _per_channel(self, weight: Tensor) -> Tensor:
        """Largest entry of the second layer's weight per channel between the two."""
        return self._blocks(weight).amax(dim=(1, 3)).reshape(-1)

    def expected(self, factor: Tensor) -> float:
        """Rounding noise of the second layer's output if rounding errors were independent.

        Steps of ``2 max|w| / 2^b`` per row and ``range / 2^a`` for the input each add a twelfth of
        their square, times the energy of what they are multiplied with.
        """
        blocks = self._blocks(self.second.weight)
        scaled = blocks * factor.view(blocks.shape[0], 1, -1, 1)
        energy = (self.squares() / factor.square()).view(blocks.shape[0], 1, -1, 1)
        step = scaled.abs().amax(dim=(2, 3)) * 2.0 ** (1 - self.second.bits)
        noise = step.square() * (energy * torch.ones_like(scaled)).sum(dim=(2, 3))
        last = self.quantizers[-1]
        low, high = 0.0, 0.0
        for x in self.seen[-2]:
            ends = torch.aminmax(x / self._broadcast(factor, x))
            low, high = min(low, float(ends.min)), max(high, float(ends.max))
        grid = (high - low) * 2.0**-last.bits
        noise = noise + grid**2 * scaled.square().sum(dim=(2, 3))
        if self.gain is not None:
            noise = noise * self.gain.reshape(noise.shape).square()
        return float(noise.sum())

    def range(self, quantizer: Any, seen: list[Tensor], factor: Tensor) -> tuple[float, float]:
        """Range of a quantizer for what it read, divided by a factor."""
        observer = make_observer("mse", quantizer.bits, quantizer.name)
        for x in seen:
            observer.observe(x / self._broadcast(factor, x))
        return observer.range()

    def error(self, factor: Tensor) -> float:
        """The second layer's error with a factor."""
        scaled = [x / self._broadcast(factor, x) for x in self.inputs]
        last = self.quantizers[-1]
        quantizer = ActivationQuantizer(last.bits, name=last.name)
        quantizer.set_range(*self.range(last, self.seen[-2], factor))
        weight = self.second.weight.detach().clone()
        self.second.weight.copy_(_scaled_inputs(self.second, weight, factor))
        try:
            hessian = LayerHessian(
                self.second,
                name=self.pair.second,
                gain=self.gain,
                per_image=rows_per_image(self.second, sum(x.shape[0] for x in scaled)),
                seed=self.seed,
            )
        finally:
            self.second.weight.copy_(weight)
        for x in scaled:
            hessian.add(quantizer(x), x)
        if self.keep_masks and self.second.mask is not None:
            mask = conv_form(self.second, self.second.mask)
            return hessian.quantize(self.second.bits, mask=mask, passes=1).error
        sparsity, pattern = (self.entries[self.pair.second][k] for k in ("sparsity", "pattern"))
        if sparsity and pattern != "unstructured":
            mask = pattern_mask(hessian.weight.reshape(hessian.shape), sparsity, pattern)
            return hessian.quantize(self.second.bits, mask=mask, passes=1).error
        return hessian.errors([(self.second.bits, sparsity)], channels=CHANNELS)[0]

    def _broadcast(self, factor: Tensor, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return factor.view(1, -1, 1, 1)
        return factor.repeat_interleave(x.shape[-1] // len(factor))


def _limited(factor: Tensor) -> Tensor:
    """Factors around 1, bounded; 1 for channels that are always zero."""
    good = torch.isfinite(factor) & (factor > 0)
    if not bool(good.any()):
        return torch.ones_like(factor)
    middle = factor[good].log().mean().exp()
    around = torch.where(good, factor / middle, torch.ones_like(factor))
    return around.clamp(1 / LARGEST, LARGEST)
