"""``compare``: a float model beside what was made of it, layer by layer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adalayer_native import ops
from adalayer_native._progress import ProgressBar
from adalayer_native.capture import Inputs
from adalayer_native.capture.loading import captured_on
from adalayer_native.engine import Engine
from adalayer_native.errors import CalibrationError, InputError, UnsupportedModelError
from adalayer_native.importance.batches import tokens_of
from adalayer_native.importance.outputs import LossFn, Pick, has_distance, metric_name
from adalayer_native.importance.task_loss import TaskLoss
from adalayer_native.microscope.data import read
from adalayer_native.microscope.findings import finding
from adalayer_native.microscope.layer_errors import (
    Sums,
    grid_of_input,
    measure,
    network_error,
    outputs_of,
)
from adalayer_native.microscope.pairing import Layer, Pairs, Value, pairs_of
from adalayer_native.microscope.result import Comparison, Row, decibels
from adalayer_native.microscope.suggest import suggest as suggested
from adalayer_native.nn.layer import NativeLayer
from adalayer_native.plan import layer_kind

__all__ = ["compare"]

# An engine's results may differ from the modules' where it runs layers in float (their sums are
# rounded in another order, so single levels may flip) or parts in torch: by this much of the
# network's own error, as squares, or by what float32 cannot tell apart.
_AGREES = 0.05
_ROUNDING = 1e-6


def compare(
    model: nn.Module | torch.export.ExportedProgram,
    native: nn.Module | Engine,
    data: Iterable[Any],
    *,
    of: nn.Module | None = None,
    output: Pick = None,
    loss_fn: LossFn | None = None,
    samples: int = 256,
    suggest: bool = True,
    progress: bool = True,
) -> Comparison:
    """What quantization does to every layer, and the smallest changes that would undo most of it.

    Every layer is compared where it is a plain convolution or product in both models: with its
    batch norm, before a residual is added and anything is clamped. **Accumulated** error is that
    with the inputs that the native network has, **own** error that with the float network's inputs;
    of the own error, what rounding the weights alone and the inputs alone make of it. Values
    between layers that something else than a layer reads (sums, pools, softmax) have rows, too.
    Where a repair has scaled channels between two layers, the float model's values are scaled
    likewise. Rows come with the worst own error first, since accumulated error says where a fault
    is seen and not where it is.

    **Engines.** An engine holds levels in whatever order its kernels like, and has fused a table or
    a residual into a layer, so it is not taken apart. Its layers are those of the converted model
    that it was compiled from, whose results it gives, and these are compared: the model that
    ``compile`` was given, as long as somebody holds it, else ``of``. That they are the same network
    is checked, not assumed: the integers of every layer's weights have to be the same, and on the
    data given here the engine's results have to be the model's: with the same bits where it runs in
    integers; where it runs layers in float or parts in torch, to within a twentieth of the error
    that is looked at. ``Comparison.engine`` says how far they agreed.

    **Suggestions.** For the layers whose rounding costs the network most (each by itself in float,
    on 32 samples), and those of the largest own errors, other ranges of the input's grid, more bits
    in the weights, and the layer in float are applied to copies of the model. Of each layer the
    smallest change that recovers at least four fifths of what its best one does is kept. What is
    said of its effect is measured on every second sample of the data, which neither the table nor
    the choice has seen. Weights of more bits are rounded anew from the float model's; a repair
    afterwards may do better.

    Args:
        model: float model, as for ``compress``; not changed.
        native: what ``convert``, ``compress`` or ``restore`` gave, or an engine of it.
        data: batches of inputs, with labels or without (they are not looked at). Not test images if
            the suggestions are to be used. Read once or twice.
        of: of an engine: the converted model that it was compiled from.
        output: which of the model's outputs counts, a key, an index or a path; default: all that
            are of floating point.
        loss_fn: the network's error, by which changes are judged, in the terms of its task: a
            :class:`~adalayer_native.TaskLoss` of a detector's boxes and scores or a segmenter's
            classes, or any ``loss_fn(output, float model's output)``, a scalar or one value per
            sample. Default: KL divergence of logits and squared error of everything else.
        samples: at most so many are used.
        suggest: try changes; all samples go into the table without.
        progress: show progress bars.

    Raises:
        UnsupportedModelError: the models are not of one network; names the first layer that
            differs. Or an engine whose converted model is not known.
        CalibrationError: no data, NaN or infinity in it, or batches that do not fit the model; or a
            model that is prepared and not converted.
        InputError: an engine that does not give the converted model's results.
        ValueError: fewer than one sample.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if data is None or isinstance(data, Tensor):
        shown = "None" if data is None else f"one tensor {list(data.shape)}"
        raise CalibrationError(f"the data is {shown}; expected batches, [x] for instance")
    engine = native if isinstance(native, Engine) else None
    if engine is not None:
        native = _compiled_from(engine, of)
    elif of is not None:
        raise ValueError("of= is the converted model that an engine was compiled from")
    captured = captured_on(model, data, what="comparison")
    pairs = pairs_of(captured, native)
    if engine is not None:
        _check_weights(pairs, engine)
    halves = read(captured, data, samples, suggest)
    wanted = outputs_of(captured, halves.choosing)
    if not has_distance(wanted[0], output):
        raise CalibrationError("the model returns no tensor of floating point: nothing to compare")
    error_of = partial(network_error, output=output, loss_fn=loss_fn)
    error = error_of(pairs.native, halves.choosing, wanted)
    agreed = None
    if engine is not None:
        apart = error
        if loss_fn is not None:
            apart = network_error(pairs.native, halves.choosing, wanted, output=output)
        agreed = _check_results(pairs, engine, halves.choosing, apart, output)
    with ProgressBar("Comparing layers", None, unit="batch", enabled=progress) as bar:
        rows = _rows(pairs, *measure(pairs, halves.choosing, bar.advance))
    found = Comparison(
        rows=tuple(rows),
        error=error,
        measure=_measure(loss_fn, wanted[0], output, halves.choosing[0]),
        samples=halves.counts[0],
        judging=halves.counts[1],
        engine=agreed,
    )
    notes = []
    if suggest and halves.judging:
        found.suggestions, found.together = suggested(pairs, rows, halves, error_of, progress)
        if error > 0 and not found.suggestions:
            notes.append(
                "no change of a single layer recovers a hundredth of the error (layers that were "
                "repaired or trained together make up for each other's errors: a plan with more "
                "bits for the worst ones, repaired again, may)"
            )
    elif suggest:
        notes.append("no suggestions: a single batch of so few samples cannot choose and judge")
    scaled = [name for name, layer in pairs.layers.items() if layer.estimated]
    if scaled:
        notes.append(
            "a repair has scaled the channels between layers, and the file does not say by how "
            f"much; estimated from the weights of {', '.join(scaled[:6])}"
        )
    found.note = "; ".join(notes)
    return found


def _measure(loss_fn: LossFn | None, result: Any, output: Pick, x: Inputs) -> str:
    """What the network's error is, for people."""
    if isinstance(loss_fn, TaskLoss):
        return "task_loss"
    return metric_name(loss_fn, None, result, output, tokens_of(x))


# -- rows -----------------------------------------------------------------------------------------


def _rows(pairs: Pairs, layers: dict[str, Sums], values: dict[str, Sums]) -> list[Row]:
    order = {node: place for place, node in enumerate(pairs.model.graph.nodes)}
    entries: list[tuple[int, Layer | Value, Sums]] = [
        (order[layer.calls[0][0]], layer, layers[name])
        for name, layer in pairs.layers.items()
        if layer.calls  # else the model does not call it
    ]
    entries += [(order[v.nodes[0][0]], v, values[name]) for name, v in pairs.values.items()]
    # (A value stands behind the layer that gives it.)
    entries.sort(key=lambda entry: (entry[0], isinstance(entry[1], Value)))
    rows = [_row(pairs, place, *entry[1:]) for place, entry in enumerate(entries)]
    typical = _typical(rows)
    rows = [finding(row, typical) for row in rows]
    return sorted(rows, key=lambda row: (-row.own, row.place))


def _typical(rows: list[Row]) -> float:
    """The median own error of what is quantized."""
    own = [row.own for row in rows if row.input_bits is not None and math.isfinite(row.own)]
    return statistics.median(own) if own else 0.0


def _row(pairs: Pairs, place: int, item: Layer | Value, sums: Sums) -> Row:
    module = item.native if isinstance(item, Layer) else item.grid
    grid = None
    if not isinstance(item, Layer) or isinstance(module, NativeLayer):
        grid = grid_of_input(module)  # type: ignore[arg-type]
    kind = "value"
    if isinstance(item, Layer):
        kind = layer_kind(pairs.model.get_submodule(item.name))
    known = sums.errors.keys()
    return Row(
        name=item.name,
        kind=kind,
        place=place,
        bits=module.bits if isinstance(module, NativeLayer) else None,
        input_bits=None if grid is None else grid.bits,
        own=sums.error("own"),
        weights=sums.error("weights") if "weights" in known else None,
        activations=sums.error("activations") if "activations" in known else None,
        accumulated=sums.error("accumulated"),
        cosine=sums.cosine,
        clipped=None if grid is None else sums.clipped / max(1, sums.count),
        clipping=None if grid is None else sums.clipping,
        calibrated=None if grid is None else (grid.low, grid.high),
        observed=(sums.low, sums.high),
    )


# -- engines --------------------------------------------------------------------------------------


def _compiled_from(engine: Engine, of: nn.Module | None) -> nn.Module:
    found = engine.source if of is None else of
    if found is None:
        raise UnsupportedModelError(
            "an engine is compared by the layers of the converted model that it was compiled from, "
            "which is not there any more (it was loaded, or the model was not kept); give that "
            "model as of= (adalayer_native.restore reads it from model.safetensors)"
        )
    return found


def _check_weights(pairs: Pairs, engine: Engine) -> None:
    """Every layer's integers in the engine have to be those of the converted model."""
    held = engine.packed_weights()
    for name, layer in pairs.layers.items():
        if not isinstance(layer.native, NativeLayer) or name not in held:
            continue
        mine, other = layer.native.weight_int(), ops.unpack_weight(held[name])
        if mine.numel() != other.numel() or not torch.equal(mine.flatten(), other.flatten()):
            raise UnsupportedModelError(
                f"layer {name!r} has other weights in the engine than in the converted model: the "
                "engine was compiled from another one"
            )


@torch.no_grad()
def _check_results(
    pairs: Pairs, engine: Engine, batches: list[Inputs], error: float, output: Pick
) -> dict[str, float | None]:
    """How far the engine's results are the converted model's."""
    equal = count = 0
    results = outputs_of(pairs.native, batches)
    for x, result in zip(batches, results, strict=True):
        got = [leaf for leaf in pytree.tree_leaves(x(engine)) if isinstance(leaf, Tensor)]
        own = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if [leaf.shape for leaf in own] != [leaf.shape for leaf in got]:
            shapes = [[list(leaf.shape) for leaf in leaves] for leaves in (own, got)]
            raise InputError(
                f"the engine returns tensors of shapes {shapes[1]}, the converted model of "
                f"{shapes[0]}: it was compiled from another model"
            )
        for a, b in zip(own, got, strict=True):
            equal += int((a == b).sum())
            count += a.numel()
    share = equal / max(1, count)
    if share == 1.0:
        return {"equal": 1.0, "snr_db": None}
    apart = network_error(engine, batches, results, output=output)
    if apart > max(_AGREES * error, _ROUNDING):
        raise InputError(
            f"the engine does not give the converted model's results: only {100 * share:.2f} % of "
            f"the values are the same, and it is {apart:.3g} away from them, where the converted "
            f"model is {error:.3g} away from the float model; it was compiled from another model"
        )
    return {"equal": share, "snr_db": decibels(apart)}
