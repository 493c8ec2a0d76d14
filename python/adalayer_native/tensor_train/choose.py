"""Which layers become tensor trains, and with which modes and ranks."""

from __future__ import annotations

import copy
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native._progress import ProgressBar
from adalayer_native.allocation import float_bytes
from adalayer_native.allocation.uniform import everywhere
from adalayer_native.capture import captured
from adalayer_native.capture.loading import first_sample
from adalayer_native.engine import compile as compiled
from adalayer_native.errors import CalibrationError, PlanError, UnsupportedModelError
from adalayer_native.nn.tensor_train import Modes, emptied
from adalayer_native.quantization import calibrate, convert, prepare
from adalayer_native.tensor_train.decompose import matrix_modes, svd_train, train_of_matrix

__all__ = ["Decomposed", "Train", "tensor_train"]

BITS = 8  # of both sides, when the clock compares them
CALLS = 21  # of each, in turns


@dataclass(frozen=True)
class Train:
    """A layer that became a train.

    Attributes:
        name: of the layer.
        modes: rows and columns of every core.
        ranks: between the cores.
        error: Frobenius norm of the weight's change over that of the weight.
        weights: of all cores.
        dense_weights: of the layer before.
        seconds: of one native call with 8-bit weights; ``None`` where no clock was asked.
        dense_seconds: of the layer before.
    """

    name: str
    modes: Modes
    ranks: tuple[int, ...]
    error: float
    weights: int
    dense_weights: int
    seconds: float | None = None
    dense_seconds: float | None = None


@dataclass
class Decomposed:
    """Result of :func:`tensor_train`.

    Attributes:
        model: a copy of the float model with its trains; everything else takes it as any other
            model, and :func:`~adalayer_native.restore` reads its compressed files.
        layers: the trains by name.
        kept: layers that stay as they are, with the reason.
        float_bytes: of the model before, as a safetensors file.
    """

    model: nn.Module
    layers: dict[str, Train] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    float_bytes: int = 0


def tensor_train(
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    *,
    error: float | None = None,
    rank: int | None = None,
    layers: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    clock: bool = True,
    progress: bool = True,
) -> Decomposed:
    """Replace linear layers and convolutions by tensor trains (LTNN: Huang and Yu 2018).

    A convolution becomes a 1x1 one onto few channels, the window on those, and a 1x1 one from few
    channels; a linear layer the best of a plain product of low rank and of two and three cores
    whose modes are as equal as its sizes' divisors allow. A layer stays as it is where its train
    has no fewer weights, or where the clock says that the train's native layers take longer. What
    is lost by then is for fine-tuning to win back (``compress(..., train_loader=...)``); bits and
    pruning of every core are chosen as those of any layer.

    Args:
        model: a float module, not changed. An exported program or a captured graph has its layers
            no longer.
        calibration: batches, whose first one the clock runs; needed for the clock alone.
        error: largest Frobenius norm of a weight's change over that of the weight, above 0 and
            below 1. Of all trains that keep it, the one with the fewest weights is taken.
        rank: largest rank. Without ``error``, the train of the least error is taken.
        layers: names of those that may change; default: all that can.
        exclude: names of those that may not.
        clock: time both with 8-bit weights on this machine, one image.
        progress: show a progress bar.

    Raises:
        PlanError: neither error nor rank, or one out of range; an unknown layer; a rank above that
            of every matrix that may change.
        CalibrationError: the clock has no calibration data.
        UnsupportedModelError: not a module, or no layer that can be decomposed.
    """
    if isinstance(model, torch.fx.GraphModule) or not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"tensor_train needs the module itself, got a {type(model).__name__}, whose layers "
            "are nodes of a graph"
        )
    _check(error, rank)
    if clock and calibration is None:
        raise CalibrationError("the clock needs calibration data to run a layer on; or clock=False")
    found = Decomposed(copy.deepcopy(model), float_bytes=float_bytes(model))
    chosen = _chosen(model, layers, exclude, rank)
    hindered = _hindered(model, chosen)
    inputs = _inputs_of(model, chosen, calibration) if clock and calibration is not None else {}
    bar = ProgressBar("Decomposing", len(chosen), unit="layer", enabled=progress)
    with bar, torch.no_grad():
        for name, layer in chosen.items():
            made = hindered.get(name) or _decomposed(name, layer, error, rank)
            if isinstance(made, tuple) and clock:
                made = _timed(*made, layer, inputs.get(name))
            if isinstance(made, str):
                found.kept[name] = made
            else:
                found.layers[name], module = made
                for alias in _names_of(model, layer):
                    found.model.set_submodule(alias, module)
            bar.advance(1, name)
    if calibration is not None:
        _check_runs(found.model, calibration)
    return found


def _check(error: float | None, rank: int | None) -> None:
    if error is None and rank is None:
        raise PlanError("tensor_train needs the largest error of a weight, or the largest rank")
    if error is not None and not 0.0 < error < 1.0:
        raise PlanError(f"tensor_train: error must be above 0 and below 1, got {error}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise PlanError(f"tensor_train: rank must be a whole number from 1, got {rank!r}")


def _chosen(
    model: nn.Module, layers: Sequence[str] | None, exclude: Sequence[str], rank: int | None
) -> dict[str, nn.Conv2d | nn.Linear]:
    """The layers that may change, by name."""
    able = {}
    for name, layer in model.named_modules():
        # Exactly these: what derives from them may compute something else.
        if type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1):
            able[name] = layer
    for name in [*(layers or ()), *exclude]:
        if name not in able:
            raise PlanError(
                f"tensor_train: {name!r} is no linear layer or convolution without groups"
            )
    wanted = {n: m for n, m in able.items() if (layers is None or n in layers) and n not in exclude}
    if not wanted or "" in wanted:
        raise UnsupportedModelError("tensor_train: no layer inside the model can be decomposed")
    full = max(min(m.weight.shape[0], m.weight[0].numel()) for m in wanted.values())
    if rank is not None and rank > full:
        raise PlanError(f"tensor_train: rank {rank} is above {full}, that of every matrix here")
    return wanted


def _names_of(model: nn.Module, layer: nn.Module) -> list[str]:
    """All places where a model has this very layer."""
    named = model.named_modules(remove_duplicate=False)
    return [name for name, module in named if module is layer]


def _hindered(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layers that are more than their weight, with the reason to leave them as they are."""
    owners: Counter[int] = Counter()
    for module in model.modules():
        owners.update({id(p) for p in module.parameters(recurse=False)})
    found = {}
    for name, layer in layers.items():
        if layer._forward_hooks or layer._forward_pre_hooks:
            found[name] = "it has hooks"
        elif any(owners[id(p)] > 1 for p in layer.parameters(recurse=False)):
            found[name] = "another layer shares its weights"
    return found


def _check_runs(model: nn.Module, calibration: Iterable[Any]) -> None:
    """What takes ``layer.weight`` itself misses it now."""
    try:
        with torch.no_grad():
            first_sample(captured(model, calibration), calibration)
    except CalibrationError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            "tensor_train: without a layer that was decomposed the model does not run, so it takes "
            f"more than its output; exclude= names those that stay ({error})"
        ) from error


def _decomposed(
    name: str, layer: nn.Conv2d | nn.Linear, error: float | None, rank: int | None
) -> str | tuple[Train, nn.Module]:
    """The train with the fewest weights, or the least error; or why there is none."""
    weight = layer.weight.detach().double()
    if not bool(torch.isfinite(weight).all()):
        raise CalibrationError(f"layer {name!r}: its weights contain NaN or infinity")
    if not bool(weight.any()):
        return "its weights are all zero"
    candidates = []
    for modes in _candidates(layer):
        cores, lost = _cores(weight, modes, error or 0.0, rank)
        candidates.append((modes, cores, lost))
    if error is not None:
        fine = [c for c in candidates if c[2] <= error * (1 + 1e-9)]
        if not fine:
            least = min(lost for *_, lost in candidates)
            return f"rank {rank} leaves an error of {least:.2g}"
        candidates = fine
    sizes = [sum(core.numel() for core in cores) for _, cores, _ in candidates]
    smaller = [k for k, size in enumerate(sizes) if size < weight.numel()]
    if not smaller:
        return f"{min(sizes):,} weights instead of {weight.numel():,}"
    best = min(smaller, key=lambda k: sizes[k] if error is not None else candidates[k][2])
    modes, cores, lost = candidates[best]
    ranks = _ranks(cores, modes)
    train = emptied(layer, modes, ranks)
    for core, values in zip(train.cores(), cores, strict=True):
        core.weight.copy_(values.reshape(core.weight.shape))
    if layer.bias is not None:
        owner: Any = train.cores()[0] if getattr(train, "bias", None) is None else train
        owner.bias.copy_(layer.bias)
    return Train(name, modes, ranks, lost, sizes[best], weight.numel()), train


def _candidates(layer: nn.Conv2d | nn.Linear) -> list[Modes]:
    rows, columns = layer.weight.shape[:2]
    plain: Modes = ((rows, 1), (1, columns))
    if isinstance(layer, nn.Conv2d):
        point = tuple(layer.kernel_size) == (1, 1)
        return [plain] if point else [((rows, 1), (1, 1), (1, columns))]
    found = [plain]
    for count in (2, 3):
        modes = matrix_modes(rows, columns, count)
        if all(min(mode) > 1 for mode in modes):
            found.append(modes)
    return found


def _cores(
    weight: Tensor, modes: Modes, error: float, rank: int | None
) -> tuple[list[Tensor], float]:
    """Weights of the small layers, in the shape ``[outputs, inputs, ...]``, and their error."""
    if weight.dim() == 2:
        return train_of_matrix(weight, modes, error, rank)
    rows, columns, *window = weight.shape
    if len(modes) == 2:
        tensor = weight.reshape(rows, columns)
        (first, last), lost = svd_train(tensor, error, rank)
        return [first[0], last[:, :, 0]], lost
    tensor = weight.permute(0, 2, 3, 1).reshape(rows, -1, columns)
    (first, middle, last), lost = svd_train(tensor, error, rank)
    # [r, window, r'] -> [r, r', window]
    middle = middle.transpose(1, 2).reshape(*middle.shape[::2], *window)
    return [first[0], middle, last[:, :, 0]], lost


def _ranks(cores: Sequence[Tensor], modes: Modes) -> tuple[int, ...]:
    pairs = zip(cores[1:], modes[1:], strict=True)
    return tuple(core.shape[0] // rows for core, (rows, _) in pairs)


def _inputs_of(
    model: nn.Module, layers: Iterable[str], calibration: Iterable[Any]
) -> dict[str, Tensor]:
    """What every layer reads of the first sample."""
    graph = captured(model, calibration)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs: seen.__setitem__(name, inputs[0].detach())

    present = dict(graph.named_modules())
    hooks = [present[n].register_forward_pre_hook(keep(n)) for n in layers if n in present]
    try:
        with torch.no_grad():
            first_sample(graph, calibration)(graph)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _timed(
    train: Train, module: nn.Module, layer: nn.Module, x: Tensor | None
) -> str | tuple[Train, nn.Module]:
    """The train with its time, or how much longer it takes."""
    if x is None:
        return "the model never calls it"
    try:
        engines = [_engine(layer, x), _engine(module, x)]
    except UnsupportedModelError as error:
        return f"no native layer runs it ({error})"
    times: list[list[float]] = [[], []]
    for _ in range(CALLS):
        for engine, kept in zip(engines, times, strict=True):
            begin = time.perf_counter()
            engine(x)
            kept.append(time.perf_counter() - begin)
    dense, chain = (statistics.median(kept) for kept in times)
    if chain >= dense:
        return f"{1e3 * chain:.3g} ms instead of {1e3 * dense:.3g}"
    values = {**train.__dict__, "seconds": chain, "dense_seconds": dense}
    return Train(**values), module


def _engine(layer: nn.Module, x: Tensor) -> Any:
    """A layer alone, with weights and inputs of 8 bits."""
    alone = captured(nn.Sequential(copy.deepcopy(layer)).eval(), [x])
    prepared = prepare(alone, everywhere(alone, BITS))
    calibrate(prepared, [x], progress=False)
    return compiled(convert(prepared), x)
