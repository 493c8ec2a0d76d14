"""Repair of a prepared model without training: every layer rounded against its output error."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from adalayer_native._fingerprint import fingerprint
from adalayer_native._progress import ProgressBar
from adalayer_native.errors import CalibrationError
from adalayer_native.quantization.calibrate import reestimate_batch_norms
from adalayer_native.quantization.exact import check_calibrated
from adalayer_native.quantization.fake_quant import QuantLayer
from adalayer_native.quantization.graph import layers_of, metadata
from adalayer_native.repair import checkpoint as store
from adalayer_native.repair.equalize import EqualizedPair, equalize_layers, pairs_of
from adalayer_native.repair.hessian import DAMPING, PASSES, LayerHessian, LayerSolution
from adalayer_native.repair.walk import (
    Data,
    Streams,
    float_twin,
    in_order,
    norm_gain,
    rows_per_image,
)
from adalayer_native.rounding import conv_form, layer_form

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LayerReport", "Repair", "repair"]


@dataclass
class LayerReport:
    """One layer, repaired.

    Attributes:
        name: of the layer.
        bits: of its weight.
        sparsity: share of weights that are pruned.
        plain_error: output error of plain rounding on the same inputs, relative to the variance of
            the float output.
        error: the same after the repair.
        seconds: it took.
    """

    name: str
    bits: int
    sparsity: float
    plain_error: float
    error: float
    seconds: float


@dataclass
class Repair:
    """What a repair did.

    Attributes:
        layers: in the order in which they were repaired, which is the graph's.
        images: calibration samples.
        resumed: layers that were taken from a checkpoint.
        pairs: what equalization decided.
        reestimated: whether re-estimated batch norms were kept.
    """

    layers: dict[str, LayerReport] = field(default_factory=dict)
    images: int = 0
    resumed: int = 0
    pairs: list[EqualizedPair] = field(default_factory=list)
    reestimated: bool = False

    def table(self) -> Table:
        """One row per layer: where the accuracy goes."""
        from rich.table import Table

        scaled = [pair for pair in self.pairs if pair.kind != "none"]
        table = Table(
            title=f"Output error per layer ({self.images:,} images)",
            caption="; ".join(f"{p.first} and {p.second} equalized" for p in scaled) or None,
        )
        table.add_column("Layer")
        for heading in ("Bits", "Pruned %", "Plain rounding %", "Repaired %"):
            table.add_column(heading, justify="right")
        for row in self.layers.values():
            table.add_row(
                row.name,
                str(row.bits),
                f"{100 * row.sparsity:.1f}",
                f"{100 * row.plain_error:.3f}",
                f"{100 * row.error:.3f}",
            )
        return table

    def __rich__(self) -> Table:
        return self.table()


def repair(
    prepared: fx.GraphModule,
    loader: Iterable[Any],
    *,
    batches: int | None = None,
    choose_masks: bool = True,
    correct_inputs: bool = True,
    equalize: bool = True,
    bn_reestimate: bool = False,
    passes: int = PASSES,
    damping: float = DAMPING,
    memory: int = 1 << 30,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Repair:
    """Round and prune every layer so that its output, not its weight, changes least.

    The layers are visited in the order of the graph. For each one the data is streamed through the
    part of the model before it, whose layers are already repaired and whose activations are
    quantized, and through the same part of the float model; the covariances of the two inputs
    (:class:`LayerHessian`) are all that is kept. Rounding and pruning are then chosen together in
    one sweep with error compensation, towards the *float* model's output, so that errors of
    earlier layers are corrected rather than piled up; the remaining difference of the means goes
    into the bias (or the running mean of the batch norm that will be folded). Weights end up on
    their grid: ``convert`` stores the very integers that were chosen.

    Args:
        prepared: from :func:`prepare`, calibrated, not trained further: its float weights are the
            model to be approximated. Changed in place, and put in evaluation mode.
        loader: re-iterable of float tensors ``[N, ...]`` or of ``(inputs, labels)``; the same
            batches every time it is read (no shuffling). It is read once to check it, its first
            images for every pair that may be equalized, and then for every layer until
            ``memory`` holds what follows from it.
        batches: use at most that many batches of the loader.
        choose_masks: prune by output error, as many weights as the plan says; false keeps the
            masks of ``prepared``.
        correct_inputs: aim at the float model's output of the layer; false aims at what the float
            weight would make of the quantized input.
        equalize: before the first layer, scale channels between pairs of layers where that lowers
            the error of the second (:mod:`~adalayer_native.repair.equalize`). It chooses ranges of
            the tensors between them and masks anew; false keeps them.
        bn_reestimate: at the end, recompute the statistics of the batch norms on the data, and keep
            them if the model's output then is nearer to the float model's. Seldom so: means are
            corrected layer by layer already, on the same images.
        passes: rounds of refinement after the sweep.
        damping: pull towards the float weight, relative to the mean variance of the inputs.
        memory: bytes of intermediate values that may be kept from one layer to the next; where they
            take more, the part of the model before the layer runs again. It changes nothing else.
        seed: of the draw of output positions in large images.
        checkpoint: safetensors file that is rewritten after every layer. A call with the same
            model, plan, data and options goes on behind the last layer in it.
        progress: show a progress bar.

    Returns:
        The output error of every layer before and after.

    Raises:
        CalibrationError: no data, NaN or infinity (names the layer), or not calibrated. On any
            error, and on Ctrl-C, the model is as it was before.
        FileFormatError: the checkpoint is corrupt or belongs to another model, plan or data.
        UnsupportedModelError: the model did not come from :func:`prepare`.
    """
    entries = metadata(prepared, "layers")
    check_calibrated(prepared)
    if passes < 0 or damping <= 0 or memory < 0:
        raise CalibrationError(
            "repair: passes and memory must not be negative and damping must be positive, got "
            f"{passes}, {memory} and {damping}"
        )
    prepared.eval()
    layers = layers_of(prepared)
    data = Data(prepared, loader, batches)
    options = {
        "layers": entries,
        "choose_masks": choose_masks,
        "correct_inputs": correct_inputs,
        "equalize": equalize,
        "passes": passes,
        "damping": damping,
        "seed": seed,
        "data": data.digest,
    }
    states: dict[str, store.LayerState] = {}
    identity = ""
    result = Repair(images=data.images)
    if checkpoint is not None:
        identity = fingerprint(prepared, options)
        states, reports = store.load(checkpoint, identity)
        result.layers = {entry["name"]: LayerReport(**entry) for entry in reports}
        result.resumed = len(reports)
    order = in_order(prepared)
    norms = {name: _norm_of(prepared, entries[name]) for name in order}
    before = {name: _state(layers[name], norms[name]) for name in order}
    others = {name: value.clone() for name, value in prepared.state_dict().items()}
    bar = ProgressBar("Repairing", len(order), unit="layer", enabled=progress)
    try:
        if equalize and pairs_of(prepared):  # always the same: a checkpoint need not hold it
            _check_shapes(prepared, layers[order[0]], order[0], data)
            result.pairs = equalize_layers(
                prepared, data, keep_masks=not choose_masks, seed=seed, progress=progress
            )
        models = [prepared, float_twin(prepared)] if correct_inputs else [prepared]
        streams = Streams(models, data, memory)
        with bar, torch.no_grad():
            for index, name in enumerate(order):
                layer, norm = layers[name], norms[name]
                if name in states:
                    _load(layer, norm, states[name])
                    bar.advance(1, name)
                    continue
                started = time.monotonic()
                hessian = LayerHessian(
                    layer,
                    name=name,
                    gain=norm_gain(norm),
                    per_image=rows_per_image(layer, data.images),
                    seed=seed * 1_000_003 + index,
                    damping=damping,
                )
                for calls in streams.inputs(name):
                    for values in calls:
                        hessian.add(*values)
                    bar.advance(0, name)
                mask = None
                if not choose_masks and layer.mask is not None:
                    mask = conv_form(layer, layer.mask)
                sparsity, pattern = entries[name]["sparsity"], entries[name]["pattern"]
                solution = hessian.quantize(
                    layer.bits, sparsity, pattern=pattern, mask=mask, passes=passes
                )
                _apply(layer, norm, solution)
                result.layers[name] = LayerReport(
                    name=name,
                    bits=layer.bits,
                    sparsity=sparsity,
                    plain_error=solution.plain_error,
                    error=solution.error,
                    seconds=round(time.monotonic() - started, 3),
                )
                if checkpoint is not None:
                    states[name] = _state(layer, norm)
                    rows = [asdict(row) for row in result.layers.values()]
                    store.save(checkpoint, identity, states, rows)
                bar.advance(1, name)
            if bn_reestimate:
                twin = models[1] if correct_inputs else float_twin(prepared)
                result.reestimated = _reestimate(prepared, twin, data)
    except BaseException:
        # Half a repair is a model that nobody asked for; what is done is in the checkpoint.
        for name in order:
            _load(layers[name], norms[name], before[name])
        prepared.load_state_dict(others)
        raise
    return result


def _check_shapes(prepared: fx.GraphModule, layer: QuantLayer, name: str, data: Data) -> None:
    """Data of a wrong shape is an error that names a layer, not one of torch's."""
    probe = LayerHessian(layer, name=name, per_image=1)
    for values in next(Streams([prepared], data, 0).inputs(name)):
        probe.add(*values)


def _reestimate(prepared: fx.GraphModule, twin: fx.GraphModule, data: Data) -> bool:
    """Fresh batch norm statistics, if the output gets nearer to the float model's by them."""

    def distance() -> float:
        total = 0.0
        for x in data:
            pairs = zip(tree_leaves(x(prepared)), tree_leaves(x(twin)), strict=True)
            total += sum(
                float((y.float() - z.float()).square().sum().double())
                for y, z in pairs
                if isinstance(y, torch.Tensor) and y.is_floating_point()
            )
        return total

    before, state = distance(), {k: v.clone() for k, v in prepared.state_dict().items()}
    reestimate_batch_norms(prepared, data, progress=False)
    # Equal where there is no batch norm; not above also says that it is a number.
    if distance() < before:
        return True
    prepared.load_state_dict(state)
    return False


def _norm_of(prepared: nn.Module, entry: dict[str, Any]) -> nn.Module | None:
    """The batch norm that is folded into a layer."""
    target = entry["batch_norm"]
    return None if target is None else prepared.get_submodule(target)


def _apply(layer: QuantLayer, norm: Any, solution: LayerSolution) -> None:
    layer.weight.copy_(layer_form(layer, solution.weight))
    layer.weight_scale.copy_(solution.scale)
    layer.mask = None if solution.mask is None else layer_form(layer, solution.mask)
    shift = solution.bias_shift
    if layer.bias is not None:
        layer.bias.add_(shift)
    elif norm is not None:
        norm.running_mean.sub_(shift)
    else:
        layer.bias = nn.Parameter(shift.clone())


def _state(layer: QuantLayer, norm: Any) -> store.LayerState:
    """Copies of all that :func:`_apply` changes."""
    found = {
        "weight": layer.weight,
        "weight_scale": layer.weight_scale,
        "mask": layer.mask,
        "bias": layer.bias,
        "running_mean": None if norm is None else norm.running_mean,
    }
    return {k: v.detach().clone().contiguous() for k, v in found.items() if v is not None}


@torch.no_grad()
def _load(layer: QuantLayer, norm: Any, state: store.LayerState) -> None:
    layer.weight.copy_(state["weight"])
    layer.weight_scale.copy_(state["weight_scale"])
    mask, bias = state.get("mask"), state.get("bias")
    layer.mask = None if mask is None else mask.to(layer.weight.device)
    if bias is None:
        layer.bias = None
    elif layer.bias is None:
        layer.bias = nn.Parameter(bias.to(layer.weight.device))
    else:
        layer.bias.copy_(bias)
    if norm is not None:
        norm.running_mean.copy_(state["running_mean"])
