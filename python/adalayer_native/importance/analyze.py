"""Measuring every layer's importance: A, F, R and I of eq. (1)."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .._json_cache import JsonCache
from .._progress import ProgressBar
from ..errors import CalibrationError, PlanError, UnsupportedModelError
from ..plan import layer_kind, supported_layers
from ..rounding import conv_form, layer_form, quantize_weight
from .batches import Batch, captured_on, iterate, model_digest, one_sample
from .flops import count_flops
from .outputs import LossFn, Pick, loss_key, loss_of, metric_name
from .registry import Criterion, Probe, criterion_of
from .scale_out import Scorers
from .scores import LayerScore, LayerScores

__all__ = ["analyze", "eval_mode", "normalise", "variance_of"]

CACHE_FORMAT = "adalayer-analysis-cache-3"


def analyze(
    model: nn.Module | torch.export.ExportedProgram,
    calibration: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    output: Pick = None,
    criterion: str | None = None,
    criteria: Sequence[str] = (),
    probe_bits: int = 2,
    alpha: float = 0.7,
    beta: float = 0.3,
    inverse: bool = False,
    batches: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
    workers: int | None = None,
    address: str | None = None,
) -> LayerScores:
    """Score every supported layer of a model, eq. (1): ``I = alpha A + beta F``.

    A is the criterion's value over the largest of all layers (negative values count 0); for
    ``"accuracy"`` that value is the increase of the loss when this layer alone is quantized to
    ``probe_bits``. F is the layer's FLOPs over the largest. R is the variance of its weights
    over the largest, or with ``inverse=True`` the smallest non-zero variance over its own, so
    that even weights count as redundant.

    Batches are read one at a time, and the model is not changed.

    Args:
        model: float model, an exported program, or what :func:`~adalayer_native.capture` made of
            one; run in eval mode. It is captured with the first batch as its example.
        calibration: batches, read more than once: tensors, tuples (inputs, then class labels) or
            dictionaries of arguments, with ``labels`` among them or without.
        loss_fn: ``loss_fn(output, target) -> scalar``. Default: cross-entropy where there are
            labels and one output of logits, else how far the outputs are from the float model's,
            KL divergence for logits and relative squared error for others, see
            :mod:`~adalayer_native.importance.outputs`. Target is the float output without labels.
        output: which of the model's outputs counts, a key, an index or a path (``"heads.0"``);
            default: all of floating point.
        criterion: what A comes from, a name in ``CRITERIA``; default: the first of ``criteria``,
            or ``"accuracy"``.
        criteria: all that are to be measured in the same pass; they are kept in
            ``scores[layer].criteria``, and ``scores.by(name)`` takes another one for A.
        probe_bits: 2 to 8.
        alpha, beta: weights in eq. (1), not negative.
        inverse: the other reading of R, see above.
        batches: use at most this many batches.
        cache: JSON file that keeps every single measurement, so that an interrupted analysis
            goes on where it stopped. Measurements of other weights, data or options in it are
            not used.
        progress: show a progress bar.
        workers: share the layers among this many processes (extra ``[serve]``), each with as many
            threads as this one, so that the numbers are the same; to keep to the machine's cores,
            call ``torch.set_num_threads(cores // workers)`` first.
        address: Ray cluster on which the processes run ("auto" or host:port; ``workers`` is then
            as many as fit by default). Its machines need the model's code, and the same
            instruction set for the same bits.

    Raises:
        CalibrationError: empty loader or a one-shot iterator, NaN or infinity in data, weights, or
            outputs, or no such output.
        UnsupportedModelError: it cannot be captured, or has no convolution or linear layer.
        PlanError: unknown criterion, or bits out of range.
        ValueError: alpha or beta out of range.
        ImportError: ``workers`` or ``address`` without Ray.
    """
    chosen = _chosen(criterion, criteria)
    if not (math.isfinite(alpha) and math.isfinite(beta) and alpha >= 0 and beta >= 0):
        raise ValueError(f"alpha and beta must be finite and not negative, got {alpha}, {beta}")
    model = captured_on(model, calibration)
    layers = checked_layers(model)
    measure = _Measurement(probe_bits, output)
    scorers = None
    if workers is not None or address is not None:
        scorers = Scorers(model, loss_fn, measure, workers, address)
    memory = _cache_of(
        cache,
        model,
        f"{probe_bits} {'default' if loss_fn is None else loss_key(loss_fn)} {output!r}",
    )
    totals = _Totals(chosen, layers)
    total = _total(calibration, batches)
    bar = ProgressBar(
        "analyzing layers",
        None if total is None else total * len(layers) * len(chosen),
        unit="layer·batch",
        enabled=progress,
    )
    with eval_mode(model), bar, memory, scorers or nullcontext():
        for batch in iterate(calibration, model, batches):
            if totals.flops is None:
                totals.flops = count_flops(model, layers, one_sample(model, batch.x))
            entry: dict[str, Any] = {"raw": {}}
            if memory.path is not None:
                entry = memory.values.setdefault(batch.digest(), entry)
            for each in chosen:
                known = entry["raw"].setdefault(each.name, {})
                known.update(totals.known_at_once(each))
                bar.advance(sum(name in known for name in layers))
                if "loss" not in entry or any(name not in known for name in layers):
                    report = _reporter(each.name, probe_bits, known, memory, bar)
                    done = {name: known[name] for name in layers if name in known}
                    if scorers is not None:
                        found = scorers.score(each.name, batch, list(layers), done, report)
                    else:
                        found = measure(each.name, model, loss_fn, batch, done, report)
                    entry["loss"], entry["metric"] = found
                totals.add(each, known, batch.count)
            totals.add_batch(entry, batch.count)
    scores = totals.scores(layers, probe_bits)
    scores.alpha, scores.beta = alpha, beta
    normalise(scores, inverse)
    return scores


class _Totals:
    """Sums over the batches of everything that is measured."""

    def __init__(self, chosen: Sequence[Criterion], layers: Iterable[str]) -> None:
        self.main = chosen[0].name
        self.sums = {each.name: dict.fromkeys(layers, 0.0) for each in chosen}
        self.first: dict[str, dict[str, float]] = {}
        self.loss, self.samples, self.metric = 0.0, 0, ""
        self.flops: dict[str, float] | None = None

    def known_at_once(self, criterion: Criterion) -> dict[str, float]:
        """What the first batch has said about layers, where the data do not matter."""
        return self.first.get(criterion.name, {}) if criterion.once else {}

    def add(self, criterion: Criterion, values: dict[str, float], count: int) -> None:
        """Add a criterion's values for a batch of ``count`` samples."""
        self.first.setdefault(criterion.name, values)
        sums = self.sums[criterion.name]
        for name in sums:
            sums[name] += values[name] * count

    def add_batch(self, entry: Mapping[str, Any], count: int) -> None:
        """Add a batch's float loss, and how it was measured."""
        self.loss += entry["loss"] * count
        self.samples += count
        self.metric = self.metric or entry["metric"]

    def scores(self, layers: Mapping[str, Any], probe_bits: int) -> LayerScores:
        """Means over all samples."""
        if self.samples == 0 or self.flops is None:
            raise CalibrationError(
                "the calibration loader is empty: all its batches hold no sample"
            )
        values = {n: {c: of[n] / self.samples for c, of in self.sums.items()} for n in layers}
        rows = {
            name: LayerScore(
                name=name,
                kind=layer_kind(layer),
                params=layer.weight.numel(),
                flops=self.flops[name],
                raw=values[name][self.main],
                variance=variance_of(layer.weight),
                criteria=values[name],
            )
            for name, layer in layers.items()
        }
        return LayerScores(
            layers=rows,
            criterion=self.main,
            probe_bits=probe_bits,
            loss=self.loss / self.samples,
            metric=self.metric,
            samples=self.samples,
        )


class _Measurement:
    """Criteria on one model, batch by batch, in this process or in a scorer's."""

    def __init__(self, probe_bits: int, pick: Pick = None) -> None:
        self._probe_bits, self._pick = probe_bits, pick
        self._layers: dict[str, Any] = {}
        self._quantized: dict[str, torch.Tensor] = {}
        self._batch: Batch | None = None  # whose output and loss these are:
        self._output: Any = None
        self._loss, self._metric = math.nan, ""

    def __call__(
        self,
        criterion: str,
        model: nn.Module,
        loss_fn: LossFn | None,
        batch: Batch,
        done: dict[str, float],
        report: Callable[[str, float], None],
    ) -> tuple[float, str]:
        """Report all layers that are not in ``done``; the float model's loss, and which it is."""
        if not self._layers:
            self._layers = supported_layers(model)
            self._quantized = {
                name: dequantized_layer(layer, self._probe_bits)
                for name, layer in self._layers.items()
            }
        if self._batch is not batch:
            output = _float_output(model, batch)
            self._loss = _float_loss(output, batch, loss_fn, self._pick)
            self._metric = metric_name(loss_fn, batch.target, output, self._pick, batch.tokens)
            self._batch, self._output = batch, output
        probe = Probe(
            model, self._layers, self._quantized, loss_fn, done, report, self._output, self._loss,
            self._pick,
        )  # fmt: skip
        criterion_of(criterion).measure(probe, batch)
        return self._loss, self._metric


def _chosen(criterion: str | None, criteria: Sequence[str]) -> list[Criterion]:
    """What to measure; the first is A."""
    if isinstance(criteria, str):
        raise PlanError(f"criteria must be a sequence of names, got the text {criteria!r}")
    names = list(criteria) or ["accuracy"]
    if criterion is not None:
        names = [criterion, *(name for name in criteria if name != criterion)]
    return [criterion_of(name) for name in dict.fromkeys(names)]


@torch.no_grad()
def _float_output(model: nn.Module, batch: Batch) -> Any:
    return batch.x(model)


def _float_loss(output: Any, batch: Batch, loss_fn: LossFn | None, pick: Pick) -> float:
    loss = loss_of(output, output, batch.target, loss_fn, pick=pick, tokens=batch.tokens)
    if not math.isfinite(loss):
        raise CalibrationError(
            f"calibration batch {batch.index}: the float model's loss is {loss}; expected a "
            f"finite number"
        )
    return loss


def _reporter(
    criterion: str, bits: int, known: dict[str, float], memory: JsonCache, bar: ProgressBar
) -> Callable[[str, float], None]:
    def report(name: str, value: float) -> None:
        if not math.isfinite(value):
            raise CalibrationError(
                f"layer {name!r}: criterion {criterion!r} at {bits} bits is {value}, expected a "
                f"finite number; the model or its data overflow"
            )
        known[name] = value
        memory.touch()
        bar.advance(1, name)

    return report


def checked_layers(model: nn.Module) -> dict[str, Any]:
    """The supported layers, with finite weights.

    Raises:
        UnsupportedModelError: none, shared ones, or ones that are not materialised.
        CalibrationError: NaN or infinity in a weight; the message names the layer.
    """
    layers = supported_layers(model)
    if not layers:
        weights = [f"{name} {list(p.shape)}" for name, p in model.named_parameters() if p.dim() > 1]
        others = f"; its weights are {', '.join(weights[:5])}" if weights else ""
        raise UnsupportedModelError(
            f"{type(model).__name__} has no convolution or linear layer that is supported "
            f"(nn.Conv2d, nn.Conv1d, nn.ConvTranspose2d or nn.Linear){others}"
        )
    for name, layer in layers.items():
        if isinstance(layer.weight, nn.parameter.UninitializedParameter):
            raise UnsupportedModelError(f"layer {name!r} is lazy; run the model once first")
        if not layer.weight.is_floating_point():
            raise UnsupportedModelError(
                f"layer {name!r}: expected floating-point weights, got {layer.weight.dtype}"
            )
        if not bool(torch.isfinite(layer.weight).all()):
            raise CalibrationError(f"layer {name!r}: its weight holds NaN or infinity")
    return layers


@torch.no_grad()
def dequantized(weight: torch.Tensor, bits: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Weight after rounding to ``bits`` with the best scale per channel; same shape and dtype.

    The output channels of ``weight`` come first, as in :func:`adalayer_native.rounding.conv_form`.
    """
    integers, scale = quantize_weight(weight.detach(), bits, mask)
    shape = (-1,) + (1,) * (weight.dim() - 1)
    return (integers.to(scale.dtype) * scale.view(shape)).to(weight.dtype)


def dequantized_layer(
    layer: torch.nn.Module, bits: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """:func:`dequantized` weight of a layer, in the shape that the layer has it."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    kept = None if mask is None else conv_form(layer, mask)
    return layer_form(layer, dequantized(conv_form(layer, weight.detach()), bits, kept))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode and restore each one's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def variance_of(weight: torch.Tensor) -> float:
    """Population variance of a layer's weights."""
    return float(weight.detach().double().var(correction=0)) if weight.numel() else 0.0


def normalise(scores: LayerScores, inverse: bool = False) -> None:
    """Set A, F, R and I of all layers from what was measured."""
    rows = list(scores.layers.values())
    most_flops = max(s.flops for s in rows)
    variances = [s.variance for s in rows if s.variance > 0]
    for s in rows:
        s.F = s.flops / most_flops if most_flops > 0 else 0.0
        if not inverse:
            s.R = s.variance / max(variances) if variances else 0.0
        else:
            s.R = min(variances) / s.variance if s.variance > 0 else 1.0
    scores.take(scores.criterion)


def _total(loader: Iterable[Any], limit: int | None) -> int | None:
    try:
        count = len(loader)  # type: ignore[arg-type]
    except TypeError:
        return limit
    return count if limit is None else min(count, limit)


def _entries(batches: dict[str, Any]) -> dict[str, Any]:
    """What a cache holds per batch, checked: numbers by criterion and layer, the float loss."""
    found: dict[str, Any] = {}
    for batch, entry in batches.items():
        raw = {
            criterion: {name: float(value) for name, value in values.items()}
            for criterion, values in entry["raw"].items()
        }
        found[batch] = {"raw": raw}
        if "loss" in entry:
            found[batch] |= {"loss": float(entry["loss"]), "metric": str(entry["metric"])}
    return found


def _cache_of(path: str | os.PathLike[str] | None, model: nn.Module, options: str) -> JsonCache:
    """Measurements per batch, keyed by weights, options and the batch's contents."""
    key = ""
    if path is not None:
        text = f"{CACHE_FORMAT} {options} {model_digest(model)}"
        key = hashlib.sha256(text.encode()).hexdigest()
    return JsonCache(path, key, "batches", parse=_entries)
