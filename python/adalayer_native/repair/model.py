"""Repair of a prepared model without training: every layer rounded against its output error."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from adalayer_native._fingerprint import fingerprint
from adalayer_native._progress import ProgressBar
from adalayer_native.errors import CalibrationError
from adalayer_native.quantization.calibrate import reestimate_batch_norms
from adalayer_native.quantization.fake_quant import QuantLayer
from adalayer_native.quantization.fold import check_calibrated
from adalayer_native.quantization.graph import layers_of, metadata
from adalayer_native.repair import checkpoint as store
from adalayer_native.repair.cells import Cells
from adalayer_native.repair.equalize import EqualizedPair, equalize_layers, pairs_of
from adalayer_native.repair.hessian import (
    DAMPING,
    PASSES,
    HeldBack,
    LayerHessian,
    LayerSolution,
)
from adalayer_native.repair.learning import PASSES as LEARNING_PASSES
from adalayer_native.repair.learning import Distance, Learned, learn
from adalayer_native.repair.streams import (
    Data,
    Streams,
    float_twin,
    in_order,
    norm_gain,
    rows_of,
    rows_per_image,
)
from adalayer_native.rounding import conv_form, layer_form

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["HELD_BACK", "LayerReport", "Repair", "repair"]

HELD_BACK = 0.25  # of the calibration samples


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
        held_plain_error, held_error: both on samples that were held back, where the repair is that
            of the others; ``None`` where none are. Where the first is not above the second, the
            layer's repair is undone.
        damping: of the norm that is rounded in, as the samples held back speak for it.
        correction: the same of the pull of what is rounded towards the float weight.
        curve: their error by damping, on some of the output channels.
    """

    name: str
    bits: int
    sparsity: float
    plain_error: float
    error: float
    seconds: float
    held_plain_error: float | None = None
    held_error: float | None = None
    damping: float | None = None
    correction: float | None = None
    curve: dict[str, float] = field(default_factory=dict)

    @property
    def undone(self) -> bool:
        """Whether the layer is rounded plainly, because samples held back say so."""
        if self.held_error is None or self.held_plain_error is None:
            return False
        return self.held_plain_error <= self.held_error


@dataclass
class Repair:
    """What a repair did.

    Attributes:
        layers: in the order in which they were repaired, which is the graph's.
        images: calibration samples.
        held_back: samples among them that judge what the others lead to.
        resumed: layers that were taken from a checkpoint.
        pairs: what equalization decided.
        reestimated: whether re-estimated batch norms were kept.
        learned: what learning at the end did, if it was asked for.
    """

    layers: dict[str, LayerReport] = field(default_factory=dict)
    images: int = 0
    held_back: int = 0
    resumed: int = 0
    pairs: list[EqualizedPair] = field(default_factory=list)
    reestimated: bool = False
    learned: Learned | None = None

    def table(self) -> Table:
        """One row per layer: where the accuracy goes."""
        from rich.table import Table

        notes = [f"{p.first} and {p.second} equalized" for p in self.pairs if p.kind != "none"] + [
            f"{row.name} rounded plainly" for row in self.layers.values() if row.undone
        ]
        if self.learned is not None:
            before, after = self.learned.curve[0], self.learned.curve[self.learned.kept]
            notes.append(
                f"then learned: distance of the output, held back, {before:.4g} to {after:.4g}"
                if self.learned.kept
                else "learning undone: held back, the output came no nearer"
            )
        title = f"Output error per layer ({self.images:,} images"
        title += f", {self.held_back:,} held back)" if self.held_back else ")"
        table = Table(title=title, caption="; ".join(notes) or None)
        table.add_column("Layer")
        headings = ["Bits", "Pruned %", "Plain rounding %", "Repaired %"]
        if self.held_back:
            headings += ["Plain %, held back", "Repaired %, held back", "Dampings"]
        for heading in headings:
            table.add_column(heading, justify="right")
        for row in self.layers.values():
            cells = [f"{100 * e:.3f}" for e in (row.plain_error, row.error)]
            if row.held_error is not None and row.held_plain_error is not None:
                cells += [f"{100 * e:.3f}" for e in (row.held_plain_error, row.held_error)]
                cells.append(f"{row.damping:g}, {row.correction:g}")
            table.add_row(row.name, str(row.bits), f"{100 * row.sparsity:.1f}", *cells)
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
    held_back: float = HELD_BACK,
    distance: Distance | None = None,
    learning_passes: int = LEARNING_PASSES,
    memory: int = 1 << 29,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    cells: Mapping[str, Cells] | None = None,
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
        damping: pull towards the float weight, relative to the mean variance of the inputs, where
            nothing is held back.
        held_back: share of the samples that no layer is repaired with. They decide about the
            damping, and whether a layer's repair is better than plain rounding. With 0, or too few
            samples for both, nothing is held back.
        distance: ``distance(float model's output, output)``, a differentiable scalar. With it, and
            with samples held back, weights, scales and biases are learned together at the end, by
            what the output loses (:mod:`~adalayer_native.repair.learning`); kept if it then loses
            less on the samples held back.
        learning_passes: over the samples, while they are learned together.
        memory: bytes of intermediate values that may be kept from one layer to the next; where they
            take more, the part of the model before the layer runs again. It changes nothing else.
        seed: of the draw of output positions in large images.
        checkpoint: safetensors file that is rewritten after every layer. A call with the same
            model, plan, data and options goes on behind the last layer in it.
        progress: show a progress bar.
        cells: by layer bounds of its integers (:mod:`~adalayer_native.repair.cells`), which are
            kept to in all that is done here. They need ``equalize=False``, and nothing is pruned.

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
    if min(passes, learning_passes, memory) < 0 or damping <= 0:
        raise CalibrationError(
            "repair: passes and memory must not be negative and damping must be positive, got "
            f"{passes} and {learning_passes}, {memory} and {damping}"
        )
    if not 0.0 <= held_back <= 0.5:
        raise CalibrationError(f"repair: held_back must be from 0 to 0.5, got {held_back}")
    bounds = dict(cells or {})
    if bounds and equalize:
        raise CalibrationError("repair: cells are of weights as they are; expected equalize=False")
    prepared.eval()
    data = Data(prepared, loader, batches)
    apart = data.held_back(held_back)
    order = in_order(prepared)
    norms = {name: _norm_of(prepared, entries[name]) for name in order}
    run = _Run(
        prepared, data, apart, entries, layers_of(prepared), norms, choose_masks, passes, damping,
        seed, bounds,
    )  # fmt: skip
    states: dict[str, store.LayerState] = {}
    identity = ""
    result = Repair(images=data.images, held_back=sum(int(part.sum()) for part in apart))
    if checkpoint is not None:
        others = {"correct_inputs": correct_inputs, "equalize": equalize, "held_back": held_back}
        identity = fingerprint(prepared, run.options() | others)
        states, reports = store.load(checkpoint, identity)
        result.layers = {entry["name"]: LayerReport(**entry) for entry in reports}
        result.resumed = len(reports)
    bar = ProgressBar("Repairing", len(order), unit="layer", enabled=progress)
    with run.undone_on_error(order):
        if equalize and pairs_of(prepared):  # always the same: a checkpoint need not hold it
            _check_shapes(prepared, run.layers[order[0]], order[0], data)
            result.pairs = equalize_layers(
                prepared, data, keep_masks=not choose_masks, seed=seed, progress=progress
            )
        twin = float_twin(prepared)
        streams = Streams([prepared, twin] if correct_inputs else [prepared], data, memory)
        with bar, torch.no_grad():
            for index, name in enumerate(order):
                if name in states:
                    _load(run.layers[name], norms[name], states[name])
                else:
                    result.layers[name] = run.repaired(index, name, streams, bar)
                    if checkpoint is not None:
                        states[name] = _state(run.layers[name], norms[name])
                        rows = [asdict(row) for row in result.layers.values()]
                        store.save(checkpoint, identity, states, rows)
                bar.advance(1, name)
            if bn_reestimate:
                result.reestimated = _reestimate(prepared, twin, data)
        if distance is not None and result.held_back and learning_passes:
            result.learned = learn(
                prepared, twin, norms, data, apart, distance,
                passes=learning_passes, seed=seed, progress=progress, cells=bounds,
            )  # fmt: skip
    return result


@dataclass
class _Run:
    """A repair under way.

    Attributes:
        apart: which samples of every batch are held back.
        entries: the plan's, by layer.
        layers, norms: the layers, and the batch norms that are folded into them.
        choose_masks, passes, damping, seed, cells: as of :func:`repair`.
    """

    prepared: fx.GraphModule
    data: Data
    apart: list[torch.Tensor]
    entries: dict[str, Any]
    layers: dict[str, QuantLayer]
    norms: dict[str, nn.Module | None]
    choose_masks: bool
    passes: int
    damping: float
    seed: int
    cells: Mapping[str, Cells]

    def options(self) -> dict[str, Any]:
        """What a checkpoint depends on, beside the model."""
        found = {
            "layers": self.entries,
            "choose_masks": self.choose_masks,
            "passes": self.passes,
            "damping": self.damping,
            "seed": self.seed,
            "data": self.data.digest,
        }
        if self.cells:
            found["cells"] = {name: _digest(own) for name, own in sorted(self.cells.items())}
        return found

    @contextmanager
    def undone_on_error(self, order: Sequence[str]) -> Iterator[None]:
        """Half a repair is a model that nobody asked for; what is done is in the checkpoint."""
        before = {name: _state(self.layers[name], self.norms[name]) for name in order}
        others = {name: value.clone() for name, value in self.prepared.state_dict().items()}
        equalized = dict(self.prepared.meta.get("equalized", {}))
        try:
            yield
        except BaseException:
            for name in order:
                _load(self.layers[name], self.norms[name], before[name])
            self.prepared.load_state_dict(others)
            self.prepared.meta["equalized"] = equalized
            raise

    def repaired(self, index: int, name: str, streams: Streams, bar: ProgressBar) -> LayerReport:
        """One layer: its inputs are gathered, its weight is chosen and put in place."""
        started = time.monotonic()
        layer, norm = self.layers[name], self.norms[name]
        hessian = LayerHessian(
            layer,
            name=name,
            gain=norm_gain(norm),
            per_image=rows_per_image(layer, self.data.images),
            seed=self.seed * 1_000_003 + index,
            damping=self.damping,
        )
        for calls, chosen in zip(streams.inputs(name), self.apart, strict=True):
            for x, *other in calls:
                x_float = other[0] if other else None
                hessian.add(x, x_float, rows_of(chosen, x))
            bar.advance(0, name)
        mask = None
        if not self.choose_masks and layer.mask is not None:
            mask = conv_form(layer, layer.mask)
        sparsity, pattern = self.entries[name]["sparsity"], self.entries[name]["pattern"]
        solution = hessian.quantize(
            layer.bits,
            sparsity,
            pattern=pattern,
            mask=mask,
            passes=self.passes,
            cells=self.cells.get(name),
        )
        _apply(layer, norm, solution)
        return LayerReport(
            name=name,
            bits=layer.bits,
            sparsity=sparsity,
            plain_error=solution.plain_error,
            error=solution.error,
            seconds=round(time.monotonic() - started, 3),
            **({} if solution.held is None else _judged(solution.held)),
        )


def _digest(cells: Cells) -> str:
    """Of the bounds of a layer: a checkpoint is of the same ones."""
    found = hashlib.sha256()
    for part in (cells.low, cells.high, cells.scale):
        found.update(part.contiguous().cpu().numpy().tobytes())
    return found.hexdigest()


def _judged(held: HeldBack) -> dict[str, Any]:
    return {
        "held_plain_error": held.plain_error,
        "held_error": held.error,
        "damping": held.damping,
        "correction": held.correction,
        "curve": {f"{damping:g}": error for damping, error in held.curve.items()},
    }


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
