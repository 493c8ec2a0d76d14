"""Calibration: activation ranges and batch norm statistics of a prepared model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from adalayer_native._progress import ProgressBar
from adalayer_native.capture import batch_inputs
from adalayer_native.capture.channels_last import laid_out
from adalayer_native.errors import CalibrationError, InputError
from adalayer_native.quantization.graph import layers_of, metadata, quantizers_of
from adalayer_native.quantization.observing import observers_for

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def calibrate(
    prepared: nn.Module,
    loader: Iterable[Any],
    *,
    observer: str = "mse",
    batches: int | None = None,
    bn_reestimate: bool = False,
    progress: bool = True,
) -> nn.Module:
    """Choose the weight scales and the range of every activation quantizer.

    The ranges are those of the model whose weights are already quantized: weight scales are
    recomputed first, then one streaming pass observes all stored tensors together. The memory
    needed does not grow with the data.

    Args:
        prepared: from :func:`prepare`; changed in place, and put in evaluation mode.
        loader: iterable of tensors ``[N, ...]``, tuples (inputs, then labels) or dictionaries of
            arguments.
        observer: ``"mse"`` (least squared error of the value, or of the function that alone reads
            it), ``"percentile"`` (99.99 % at either end) or ``"minmax"``. What ends in a softmax
            is never clipped.
        batches: use at most that many batches of the loader.
        bn_reestimate: recompute the running statistics of all batch norms on this data first, as
            plain averages over its batches, with quantized weights. Takes a second pass.
        progress: show a progress bar.

    Returns:
        ``prepared``.

    Raises:
        CalibrationError: NaN or infinity (names the tensor), no data, or an unknown observer. The
            ranges and statistics are then what they were before.
        UnsupportedModelError: the model did not come from :func:`prepare`.
    """
    metadata(prepared, "layers")
    if batches is not None and batches < 1:
        raise CalibrationError(f"batches must be at least 1 or None, got {batches}")
    if bn_reestimate and iter(loader) is loader:
        # A one-shot iterator cannot be read twice, and its batches are few in practice.
        loader = list(itertools.islice(loader, batches))
    quantizers = quantizers_of(prepared)
    observers = observers_for(prepared, observer)
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    try:
        for layer in layers_of(prepared).values():
            layer.refresh_scales()
        if bn_reestimate:
            _reestimate(prepared, loader, batches, progress)
        prepared.eval()
        for name, quantizer in quantizers.items():
            quantizer.observer = observers[name]
        _forward(prepared, loader, batches, progress, "Calibrating ranges")
        # All ranges first: an unusable one must not leave half the model recalibrated.
        ranges = {name: observers[name].range() for name in quantizers}
        for name, quantizer in quantizers.items():
            quantizer.set_range(*ranges[name])
    except BaseException:
        prepared.load_state_dict(before)
        raise
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
        prepared.eval()
    return prepared


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Batch norms with running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BATCH_NORMS) and module.track_running_stats
    }


@torch.no_grad()
def reestimate_batch_norms(
    prepared: nn.Module,
    loader: Iterable[Any],
    *,
    batches: int | None = None,
    progress: bool = True,
) -> nn.Module:
    """Recompute all running batch norm statistics as averages over the loader's batches.

    Quantizers that have a range quantize meanwhile. Everything but the batch norms is in
    evaluation mode, as the whole model is afterwards.

    Raises:
        CalibrationError: no data, or statistics that are not finite.
    """
    _reestimate(prepared, loader, batches, progress)
    return prepared


def _reestimate(
    prepared: nn.Module, loader: Iterable[Any], batches: int | None, progress: bool
) -> None:
    norms = batch_norms(prepared)
    prepared.eval()
    if not norms:
        return
    momenta = {name: norm.momentum for name, norm in norms.items()}
    try:
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average over batches
            norm.train()
        _forward(prepared, loader, batches, progress, "Re-estimating batch norm")
        for name, norm in norms.items():
            assert norm.running_mean is not None
            assert norm.running_var is not None
            if not bool(torch.isfinite(norm.running_mean + norm.running_var).all()):
                raise CalibrationError(
                    f"batch norm {name!r}: its statistics are NaN or infinite on this data"
                )
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
        prepared.eval()


@torch.no_grad()
def _forward(
    prepared: nn.Module,
    loader: Iterable[Any],
    batches: int | None,
    progress: bool,
    title: str,
) -> None:
    device = next(itertools.chain(prepared.parameters(), prepared.buffers())).device
    seen = 0
    for batch in _shown(loader, batches, progress, title):
        inputs, _ = batch_inputs(prepared, batch)
        if not inputs.is_finite():
            raise CalibrationError(
                f"a calibration batch of shape {inputs.shapes} contains NaN or infinite "
                "values; expected finite numbers"
            )
        seen += inputs.count
        try:
            laid_out(prepared, inputs.to(device))(prepared)
        except InputError as error:
            raise CalibrationError(f"a calibration batch does not fit: {error}") from None
    if seen == 0:
        raise CalibrationError("the calibration loader is empty; expected at least one sample")


def _shown(loader: Iterable[Any], batches: int | None, progress: bool, title: str) -> Iterator[Any]:
    total: int | None
    try:
        total = len(loader)  # type: ignore[arg-type]
    except TypeError:
        total = None
    if batches is not None:
        total = batches if total is None else min(total, batches)
    with ProgressBar(title, total, unit="batch", enabled=progress) as bar:
        for batch in itertools.islice(loader, batches):
            yield batch
            bar.advance()
