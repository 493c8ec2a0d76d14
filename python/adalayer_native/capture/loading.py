"""Reading what a loader yields: batches as arguments of a model, and the capture on the first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adalayer_native.capture.capture import captured
from adalayer_native.capture.channels_last import laid_out
from adalayer_native.capture.example import Inputs, batch_inputs, repeatable
from adalayer_native.capture.model import GraphModel
from adalayer_native.errors import CalibrationError

__all__ = ["captured_on", "checked_batches", "first_sample"]


def captured_on(
    model: Any, loader: Iterable[Any] | None = None, *, what: str = "calibration"
) -> GraphModel:
    """A model captured with a loader's first batch as example; what is captured already, as it is.

    Args:
        model: an ``nn.Module``, an ``ExportedProgram`` or what ``capture`` returned.
        loader: calibration data. Without it an example is guessed where the model is not known yet.
        what: the data is for, in messages.

    Raises:
        CalibrationError: the loader is a one-shot iterator or empty, or its first batch unusable.
        UnsupportedModelError: the model cannot be captured.
    """
    if loader is not None:
        loader = repeatable(loader)
    if isinstance(model, GraphModel) or not isinstance(model, nn.Module) or loader is None:
        return captured(model)
    for _, x, _ in checked_batches(loader, model, what=what):
        return captured(model, example=x)
    raise CalibrationError(f"the {what} loader is empty: all its batches hold no sample")


def first_sample(model: GraphModel, loader: Iterable[Any]) -> Inputs:
    """A loader's first sample as the arguments of a captured model; two where one is refused.

    Raises:
        CalibrationError: the loader is empty, or its first batch unusable.
    """
    for _, x, _ in checked_batches(loader, model):
        return x[:1] if model.signature.single else x[:2]
    raise CalibrationError("the calibration loader is empty: all its batches hold no sample")


def checked_batches(
    loader: Iterable[Any],
    model: nn.Module,
    limit: int | None = None,
    *,
    what: str = "calibration",
) -> Iterator[tuple[int, Inputs, Any]]:
    """Number, arguments and labels (``None`` without) of at most ``limit`` batches.

    A batch is a tensor, a tuple (inputs, then labels) or a dictionary of arguments by name, with
    the labels in it or without. Tensors of floating point get the model's type, others stay, and
    all go to its device. A batch without a sample is left out. ``what`` the data is for stands in
    messages.

    Raises:
        CalibrationError: no batch at all, a batch of another kind or with NaN or infinity in it;
            the message names the batch.
    """
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)

    def moved(tensor: Tensor) -> Tensor:
        if reference is None:
            return tensor
        dtype = reference.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=reference.device, dtype=dtype)

    def placed(leaf: Any) -> Any:
        if reference is None or not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(reference.device)

    index = -1
    for index, item in enumerate(loader):
        if limit is not None and index >= limit:
            return
        try:
            x, target = batch_inputs(model, item)
        except CalibrationError as error:
            raise CalibrationError(f"{what} batch {index}: {error}") from None
        if not x.tensors():
            raise CalibrationError(f"{what} batch {index}: expected tensors, got {_kinds(x)}")
        if x.count == 0:
            continue
        if not x.is_finite():
            raise CalibrationError(f"{what} batch {index} holds NaN or infinity")
        yield index, laid_out(model, x.map(moved)), pytree.tree_map(placed, target)
    if index < 0:
        raise CalibrationError(f"the {what} loader is empty: it yields no batch")


def _kinds(x: Inputs) -> str:
    kinds = sorted({type(leaf).__name__ for leaf in pytree.tree_leaves((x.args, x.kwargs))})
    return ", ".join(kinds) or "nothing"
