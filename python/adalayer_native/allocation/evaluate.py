"""Trying a plan: the model with rounded and masked weights on calibration data."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.func import functional_call

from .._json_cache import JsonCache
from .._progress import ProgressBar
from ..errors import CalibrationError
from ..importance.analyze import dequantized_layer, eval_mode
from ..importance.batches import Batch, captured_on, iterate, model_digest
from ..importance.outputs import LossFn, Pick, has_logits, logits_of, loss_key, loss_of
from ..pruning.patterns import pattern_mask
from ..rounding import conv_form, layer_form
from .narrow_inputs import NarrowInputs
from .options import UNSTRUCTURED, Choices, Option
from .sensitivity import WeightOf, shifted

__all__ = ["NEGLIGIBLE", "Evaluator", "Judge", "Measurement", "best_of", "compared", "hits"]

# Nats per image: plans that lose less than this are not worth repairing whole to be compared.
NEGLIGIBLE = 3e-3

# Calibration batches stay in memory while plans are compared; more than this is refused.
MEMORY_LIMIT = 2 << 30
# Dequantized weights kept from one plan to the next, in bytes.
WEIGHT_CACHE = 1 << 28


@dataclass(frozen=True)
class Measurement:
    """Outcome of one plan on calibration data.

    Attributes:
        loss: mean loss; how far the outputs are from the float model's unless a ``loss_fn`` was
            given (KL divergence for logits).
        accuracy: share of right labels, or of agreement with the float model without labels;
            NaN where the output has no classes.
    """

    loss: float
    accuracy: float

    def as_dict(self) -> dict[str, float]:
        """What a plan keeps of it."""
        result = {"calibration_loss": self.loss}
        if not math.isnan(self.accuracy):
            result["calibration_accuracy"] = self.accuracy
        return result


class Judge(Protocol):
    """What compares plans: measures them, or predicts what they would lose."""

    @property
    def samples(self) -> int:
        """Images behind a measurement."""

    def measure(self, layers: Choices) -> Measurement:
        """Loss and accuracy of a plan."""

    def save(self) -> None:
        """Keep what was measured."""


class Evaluator:
    """Measures plans by fake quantization; nothing is trained, the model untouched.

    Weights are rounded, and inputs whose bits were chosen; the grids that all plans have, and what
    they cost, are left out.

    Args:
        model: float model, captured or not.
        calibration: batches as for ``analyze``; kept in memory.
        loss_fn: ``loss_fn(output, target)``; default: how far the outputs are from the float
            model's (KL divergence for logits), which varies far less on a few hundred images than
            accuracy does.
        batches: use at most this many.
        cache: JSON file that keeps every measurement for a resumed search.
        weight_of: ``(layer, bits, sparsity) -> dequantized weight`` in the layer's own shape, or
            a pair of it and what is added to the layer's bias, ``[out_channels]`` or ``None``; the
            pattern is a fourth argument where there is one. Default: magnitude pruning and rounding
            to nearest.
        key: names ``weight_of`` and ``inputs`` in the cache.
        inputs: what puts values on grids of fewer bits, where options ask for that.
        output: which output counts.

    Raises:
        CalibrationError: empty or unusable data.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Iterable[Any],
        loss_fn: LossFn | None = None,
        *,
        batches: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        weight_of: WeightOf | None = None,
        key: str = "",
        output: Pick = None,
        inputs: NarrowInputs | None = None,
    ) -> None:
        model = captured_on(model, calibration)
        self.model, self.loss_fn, self.pick = model, loss_fn, output
        self.weight_of, self.key, self.inputs = weight_of, key, inputs
        self.batches = list(self.bounded(iterate(calibration, model, batches)))
        if not self.batches:
            raise CalibrationError(
                "the calibration loader is empty: all its batches hold no sample"
            )
        self.samples: int = sum(batch.count for batch in self.batches)
        self.modules = dict(model.named_modules())
        self._weights: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._held = 0
        with torch.no_grad(), eval_mode(model):
            self.outputs = [batch.x(model) for batch in self.batches]
        digest = "" if cache is None else self._digest()
        self._cache = JsonCache(cache, digest, "plans", parse=_losses)

    def measure(self, layers: Choices) -> Measurement:
        """Loss and accuracy with ``{layer: (bits or None, sparsity[, pattern[, input bits]])}``.

        Raises:
            CalibrationError: the loss is not finite.
        """
        options = {name: Option(*option) for name, option in layers.items()}
        key = json.dumps([[name, *option.values] for name, option in options.items()])
        if key not in self._cache.values:
            loss, accuracy = self._measure(options)
            self._cache.values[key] = [loss, None if math.isnan(accuracy) else accuracy]
            self._cache.touch()
        loss, right = self._cache.values[key]
        return Measurement(loss, math.nan if right is None else right)

    @torch.no_grad()
    def _measure(self, layers: dict[str, Option]) -> tuple[float, float]:
        weights: dict[str, torch.Tensor] = {}
        model, modules, handles = self.model, self.modules, []
        if self.inputs is not None and self.inputs.narrowed(layers):
            handles = self.inputs.applied(layers)
            model = self.inputs.model
            modules = dict(model.named_modules())
        for name, option in layers.items():
            if option.bits is not None:
                weights[f"{name}.weight"], shift = self.replacement(name, option)
                if shift is not None:  # by a hook: a layer before a batch norm has no bias
                    handles.append(modules[name].register_forward_hook(_adding(shift)))
        try:
            return self._loss(model, weights)
        finally:
            for handle in handles:
                handle.remove()

    def _loss(self, model: nn.Module, weights: dict[str, torch.Tensor]) -> tuple[float, float]:
        loss, good, positions = 0.0, 0, 0
        with eval_mode(model):
            for batch, reference in zip(self.batches, self.outputs, strict=True):
                output = functional_call(model, weights, batch.x.args, batch.x.kwargs)
                target = None if self.loss_fn is None else batch.target
                value = loss_of(
                    output, reference, target, self.loss_fn, pick=self.pick, tokens=batch.tokens
                )
                if not math.isfinite(value):
                    raise CalibrationError(
                        f"calibration batch {batch.index}: the loss of a quantized model is "
                        f"{value}; expected a finite number"
                    )
                loss += value * batch.count
                right, of = hits(output, reference, batch, self.pick, self.loss_fn)
                good, positions = good + right, positions + of
        accuracy = good / positions if positions else math.nan
        return loss / self.samples, accuracy

    def replacement(self, name: str, option: Option) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Masked and dequantized weight of a layer and what is added to its bias; remembered."""
        key = (name, *option.values)
        if key not in self._weights:
            found = (self.weight_of or self._rounded)(name, *option.arguments())
            value, shift = found if isinstance(found, tuple) else (found, None)
            expected = self.modules[name].weight
            if value.shape != expected.shape:
                raise CalibrationError(
                    f"layer {name!r}: weight_of gave shape {tuple(value.shape)}, expected "
                    f"{tuple(expected.shape)}"
                )
            self._held += value.numel() * value.element_size()
            if self._held > WEIGHT_CACHE:
                self._weights.clear()
                self._held = value.numel() * value.element_size()
            self._weights[key] = value, shift
        return self._weights[key]

    def _rounded(
        self, name: str, bits: int, sparsity: float, pattern: str = UNSTRUCTURED
    ) -> torch.Tensor:
        layer = self.modules[name]
        mask = None
        if sparsity > 0:
            form = conv_form(layer, layer.weight.detach())
            mask = layer_form(layer, pattern_mask(form, sparsity, pattern))
        return dequantized_layer(layer, bits, mask)

    def save(self) -> None:
        """Write the cache, if there is one."""
        self._cache.save()

    def _digest(self) -> str:
        loss = loss_key(self.loss_fn)
        options = f"adalayer-allocation-cache-2 {loss} {self.key} {self.pick!r}"
        digest = hashlib.sha256(f"{options} {model_digest(self.model)}".encode())
        for batch in self.batches:
            digest.update(batch.digest().encode())
        return digest.hexdigest()

    @staticmethod
    def bounded(batches: Iterable[Batch]) -> Iterable[Batch]:
        """The batches, refused where they are more than memory should hold."""
        held = 0
        for batch in batches:
            held += sum(t.numel() * t.element_size() for t in batch.x.tensors())
            if held > MEMORY_LIMIT:
                raise CalibrationError(
                    f"the calibration data exceed {MEMORY_LIMIT >> 20} MiB; plans are compared "
                    f"on data in memory, so give fewer batches (batches=...)"
                )
            yield batch


def _losses(plans: dict[str, Any]) -> dict[str, Any]:
    """What a cache holds per plan, checked: loss, and accuracy or ``None``."""
    return {
        key: [float(loss), None if accuracy is None else float(accuracy)]
        for key, (loss, accuracy) in plans.items()
    }


def _adding(shift: torch.Tensor) -> Any:
    def hook(layer: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return shifted(layer, output, shift)

    return hook


def hits(
    output: Any, reference: Any, batch: Batch, pick: Pick = None, loss_fn: LossFn | None = None
) -> tuple[int, int]:
    """Right answers (or agreements with the reference, without labels), of how many.

    Labels below 0 are not counted, and nothing is where there is not one output of logits. With a
    loss of the user's, only labels say that an output is logits.
    """
    truth, rest = batch.target, (pick, batch.tokens, batch.target)
    labelled = isinstance(truth, torch.Tensor) and not truth.is_floating_point()
    if loss_fn is not None and not labelled:
        return 0, 0
    if not has_logits(output, *rest):
        return 0, 0
    predicted = logits_of(output, *rest).argmax(dim=1)
    if not labelled:
        truth = logits_of(reference, *rest).argmax(dim=1)
    if truth.shape != predicted.shape:
        return 0, 0
    return int((predicted == truth).sum()), int((truth >= 0).sum())


def compared(
    choices: Sequence[Choices], judge: Judge, what: str, *, progress: bool
) -> tuple[int, Measurement]:
    """Which of some plans loses least, and its measurement."""
    measured: list[Measurement] = []
    with ProgressBar(what, len(choices), unit="plan", enabled=progress) as bar:
        try:
            for choice in choices:
                measured.append(judge.measure(choice))
                bar.advance(1, f"best loss {min(m.loss for m in measured):.4f}")
        finally:
            judge.save()
    best = min(range(len(measured)), key=lambda row: measured[row].loss)
    return best, measured[best]


def best_of(measurements: list[Measurement], samples: int) -> int:
    """Index of the best plan: highest accuracy, and the lowest loss among those that tie.

    Accuracies within two standard errors of the best are a tie: on a few hundred images the
    best of many tries is ahead by as much as that by chance, and the loss decides better.
    """
    accuracies = [m.accuracy for m in measurements if not math.isnan(m.accuracy)]
    indices = list(range(len(measurements)))
    if accuracies:
        top = max(accuracies)
        margin = 2 * math.sqrt(max(top * (1 - top), 0.0) / max(1, samples)) + 1e-12
        indices = [
            i
            for i in indices
            if math.isnan(measurements[i].accuracy) or measurements[i].accuracy >= top - margin
        ]
    return min(indices, key=lambda i: (measurements[i].loss, i))
