"""Statistics of all layers of a float model, for a table of errors over bits and sparsities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adalayer_native._progress import ProgressBar
from adalayer_native.capture.loading import captured_on
from adalayer_native.errors import PlanError
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from adalayer_native.quantization.file_contents import stored_model
from adalayer_native.repair.hessian import LayerHessian, parts_of
from adalayer_native.repair.streams import Data, norm_gain, rows_of, rows_per_image
from adalayer_native.rounding import conv_form

__all__ = ["layer_hessians"]


def layer_hessians(
    model: nn.Module | torch.export.ExportedProgram,
    loader: Iterable[Any],
    layers: Iterable[str] | None = None,
    *,
    batches: int | None = None,
    seed: int = 0,
    held_back: float = 0.0,
    memory: int = 1 << 29,
    progress: bool = True,
) -> Iterator[tuple[str, LayerHessian]]:
    """Yield every quantizable layer of a float model with the statistics of its float inputs.

    ``hessian.errors([(4, 0.0), (3, 0.5), ...])`` then is a row of the table error(bits, sparsity)
    after repair. Layers are observed together as far as ``memory`` allows, one pass over the data
    for each such part, and yielded one by one; whoever does not keep them needs no more than that.

    Args:
        model: float model that :func:`prepare` accepts, captured or not; run in evaluation mode,
            not changed.
        loader: as in :func:`repair`.
        layers: names; default: all that can be quantized.
        batches: use at most that many batches.
        seed: of the draw of output positions.
        held_back: share of the samples that only decide about the damping, as in :func:`repair`.
        memory: bytes of statistics held at once; a single layer may need more.
        progress: show a progress bar.

    Raises:
        CalibrationError: no data, NaN or infinity.
        PlanError: unknown layer.
        UnsupportedModelError: as :func:`prepare`.
    """
    if iter(loader) is loader:  # read once for the capture, and for every part
        loader = list(itertools.islice(loader, batches))
    model = captured_on(model, loader)
    modules = supported_layers(model)
    wanted = {
        name: LayerPlan(name, layer_kind(module), module.weight.numel(), 8)
        for name, module in modules.items()
    }
    stored = stored_model(model, Plan(wanted))
    names = list(stored.layers) if layers is None else list(layers)
    for name in names:
        if name not in stored.layers:
            reason = stored.kept_float.get(name, "the model has no such layer")
            raise PlanError(f"layer {name!r} cannot be quantized: {reason}")
    everything = dict(model.named_modules())
    norms = {name: stored.layers[name].batch_norm for name in names}
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        data = Data(model, loader, batches)
        parts = _parts(modules, names, memory)
        bar = ProgressBar(
            "Observing layers", len(parts) * data.batches, unit="batch", enabled=progress
        )
        with bar:
            for part in parts:
                found = {
                    name: LayerHessian(
                        modules[name],
                        name=name,
                        gain=norm_gain(everything[norms[name] or ""] if norms[name] else None),
                        per_image=rows_per_image(modules[name], data.images),
                        seed=seed * 1_000_003 + names.index(name),
                    )
                    for name in part
                }
                _observe(model, modules, found, data, data.held_back(held_back), bar)
                while found:
                    name = next(iter(found))
                    yield name, found.pop(name)
    finally:
        for module, mode in training:
            module.training = mode


def _parts(modules: dict[str, Any], names: list[str], memory: int) -> list[list[str]]:
    parts: list[list[str]] = []
    held = math.inf
    for name in names:
        form = conv_form(modules[name], modules[name].weight)
        widths = [part.stop - part.start for part in parts_of(form.shape)]
        needed = 8 * sum(n * n for n in widths) * getattr(modules[name], "groups", 1)
        if held + needed > memory:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += needed
    return parts


@torch.no_grad()
def _observe(
    model: nn.Module,
    modules: dict[str, Any],
    found: dict[str, LayerHessian],
    data: Data,
    apart: list[Tensor],
    bar: ProgressBar,
) -> None:
    chosen = apart[0]  # of the batch that goes through the model

    def hook(hessian: LayerHessian) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            assert isinstance(x, Tensor)
            hessian.add(x, None, rows_of(chosen, x))

        return see

    handles = [
        modules[name].register_forward_pre_hook(hook(hessian), with_kwargs=True)
        for name, hessian in found.items()
    ]
    try:
        for x, chosen in zip(data, apart, strict=True):  # noqa: B007 (the hooks read it)
            x(model)
            bar.advance(note=f"{len(found)} layers")
    finally:
        for handle in handles:
            handle.remove()
