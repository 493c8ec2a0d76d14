"""Example inputs: what a model is called with while it is captured, and how batches are read."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adalayer_native.capture.quiet import quiet
from adalayer_native.errors import CalibrationError, UnsupportedModelError

__all__ = [
    "Inputs",
    "at_least_two",
    "batch_inputs",
    "example_of",
    "guessed_example",
    "inputs_and_target",
    "positional_inputs",
]

# Names under which loaders of dictionaries keep what is to be predicted.
TARGETS = ("labels", "label", "targets", "target")
# Sizes of square images, lengths of sequences that are tried where no example is given.
# (Large ones first: where a map shrinks to one pixel, code and torch treat sizes differently.)
_IMAGES = (224, 32, 64, 28, 16, 8, 96, 128, 160, 192, 256, 299, 384, 512, *range(4, 64))
_LARGEST = 1 << 24  # elements
_LENGTHS = (32, 128, 256, 1024, 4096, 16000)


@dataclass
class Inputs:
    """The arguments of one call of a model.

    Attributes:
        args: positional ones.
        kwargs: those by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> Inputs:
        """A tensor is one argument, a sequence several, a mapping arguments by name."""
        if isinstance(value, Inputs):
            return value
        if isinstance(value, Mapping):
            return cls((), dict(value))
        if isinstance(value, (list, tuple)):
            return cls(tuple(value), {})
        return cls((value,), {})

    def __call__(self, model: Any) -> Any:
        """Call the model."""
        return model(*self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        """All tensors in it."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def map(self, function: Any) -> Inputs:
        """The same with ``function`` applied to every tensor."""
        args, kwargs = pytree.tree_map(
            lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf,
            (self.args, self.kwargs),
        )
        return Inputs(tuple(args), dict(kwargs))

    def __getitem__(self, part: slice) -> Inputs:
        """Some of the samples; tensors that are not of the batch's size stay whole."""
        count = self.count
        return self.map(lambda t: t[part] if t.dim() and t.shape[0] == count else t)

    def to(self, device: torch.device) -> Inputs:
        """The same on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def is_finite(self) -> bool:
        """Whether no tensor holds NaN or infinity."""
        return all(bool(torch.isfinite(t).all()) for t in self.tensors() if t.is_floating_point())

    @property
    def shapes(self) -> str:
        """The shapes of its tensors, for messages."""
        return ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors())

    @property
    def count(self) -> int:
        """Samples in the batch: the first axis of the first tensor."""
        for tensor in self.tensors():
            if tensor.dim():
                return int(tensor.shape[0])
        return 1


def positional_inputs(model: nn.Module) -> int:
    """How many positional arguments without a default a model's forward takes, at least one."""
    forward = inspect.signature(model.forward)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wanted = [p for p in forward.parameters.values() if p.kind in kinds and p.default is p.empty]
    return max(1, len(wanted))


def inputs_and_target(item: Any, expected: int = 1) -> tuple[Inputs, Any]:
    """What a loader yields, as the arguments of a call and the labels (None without).

    A tensor is the input. A mapping holds arguments by name; what is called ``labels``, ``label``,
    ``targets`` or ``target`` is the target. Of a sequence the first ``expected`` items are inputs
    and the next is the target, unless the first item is itself a sequence or mapping of inputs (or
    :class:`Inputs`).

    Args:
        item: one batch.
        expected: positional arguments of the model.

    Raises:
        CalibrationError: nothing of the kind.
    """
    if isinstance(item, Inputs):
        return item, None
    if isinstance(item, Tensor):
        return Inputs((item,)), None
    if isinstance(item, Mapping):
        given = dict(item)
        target = next((given.pop(key) for key in TARGETS if key in given), None)
        return Inputs((), given), target
    if isinstance(item, (list, tuple)) and item:
        first = item[0]
        if isinstance(first, (Inputs, list, tuple, Mapping)):
            return Inputs.of(first), item[1] if len(item) > 1 else None
        if isinstance(first, Tensor) and len(item) >= expected:
            target = item[expected] if len(item) > expected else None
            return Inputs(tuple(item[:expected])), target
        if isinstance(first, Tensor):
            raise CalibrationError(
                f"the model takes {expected} inputs, but a batch holds {len(item)} items"
            )
    got = f"an empty {type(item).__name__}" if isinstance(item, (list, tuple)) else ""
    raise CalibrationError(
        "expected batches that are a tensor, a tuple of tensors (inputs, then labels) or a "
        f"dictionary of arguments, got {got or type(item).__name__}"
    )


def batch_inputs(model: nn.Module, item: Any) -> tuple[Inputs, Any]:
    """A loader's batch as the arguments of a model, and the labels (None without).

    Raises:
        CalibrationError: not what the model takes.
    """
    signature = getattr(model, "meta", {}).get("signature")
    if signature is None:
        expected = positional_inputs(model)
    else:
        expected = max(1, signature.arguments[0].num_children)
    return inputs_and_target(item, expected)


def example_of(data: Iterable[Any], expected: int = 1) -> Inputs:
    """The first batch of some data that is not empty, as an example.

    Raises:
        CalibrationError: it is an iterator, which could not be read again from its start, or empty.
    """
    for item in repeatable(data):
        inputs = inputs_and_target(item, expected)[0]
        if inputs.count:
            return inputs
    raise CalibrationError("the calibration loader is empty: it yields no sample")


def repeatable(data: Iterable[Any]) -> Iterable[Any]:
    """``data``, if it can be read more than once.

    Raises:
        CalibrationError: it is a one-shot iterator (a generator, say).
    """
    if isinstance(data, Iterator):
        raise CalibrationError(
            f"the data is a {type(data).__name__}, which can be read only once, but is needed "
            "several times; give a list or a DataLoader instead (list(data) where it is small)"
        )
    return data


def at_least_two(inputs: Inputs) -> Inputs:
    """An example whose batch is not 1, which torch.export would take for a constant.

    Raises:
        UnsupportedModelError: it has no tensors, or an empty batch.
    """
    tensors = inputs.tensors()
    if not tensors:
        raise UnsupportedModelError(
            "example_inputs: expected a tensor, a tuple of tensors or a dictionary of arguments, "
            f"got {[type(a).__name__ for a in (*inputs.args, *inputs.kwargs.values())]}"
        )
    count = inputs.count
    if count == 0:
        raise UnsupportedModelError(
            "example_inputs: expected a batch size of at least 1, got shapes "
            f"{[list(t.shape) for t in tensors]}"
        )
    if count > 1:
        return inputs.map(Tensor.detach)

    def doubled(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        batched = tensor.dim() > 0 and tensor.shape[0] == 1
        return torch.cat([tensor, tensor]) if batched else tensor

    return inputs.map(doubled)


def guessed_example(model: nn.Module) -> Inputs:
    """An example for a model whose inputs are alike, from its first layer; of ones that it accepts.

    Raises:
        UnsupportedModelError: no guess runs; an example has to be given.
    """
    known = getattr(model, "meta", {}).get("example")
    if isinstance(known, tuple):  # what a file says of its inputs
        return at_least_two(Inputs(known))
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Conv1d, nn.Linear, nn.Embedding)
    layers = [m for m in model.modules() if isinstance(m, kinds)]
    if layers:
        reference = next(model.parameters())
        dtype = torch.int64 if isinstance(layers[0], nn.Embedding) else reference.dtype
        for shape in _shapes(layers[0]):
            if math.prod(shape) > _LARGEST:
                continue
            example = torch.zeros(shape, dtype=dtype, device=reference.device)
            inputs = Inputs((example,) * positional_inputs(model))
            if _runs(model, inputs):
                return inputs
    raise UnsupportedModelError(
        f"{type(model).__name__}: an example of its inputs is needed; give example_inputs= (a "
        "tensor, a tuple of tensors or a dictionary of arguments), or what "
        "adalayer_native.capture(model, example_inputs) returns in the model's place"
    )


def _shapes(layer: nn.Module) -> Iterator[Sequence[int]]:
    if isinstance(layer, nn.Linear):
        yield 2, layer.in_features
        yield 2, _LENGTHS[0], layer.in_features
    elif isinstance(layer, nn.Embedding):
        for length in _LENGTHS:
            yield 2, length
    elif isinstance(layer, nn.Conv1d):
        for length in _LENGTHS:
            yield 2, layer.in_channels, length
    else:
        assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
        for size in _IMAGES:
            yield 2, layer.in_channels, size, size


def _runs(model: nn.Module, inputs: Inputs) -> bool:
    """Whether the model takes inputs of that shape; nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with quiet(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            inputs.map(mode.from_tensor)(model)
        return True
    except Exception as error:  # the model's own code: any kind says that the shape does not fit
        # Code that looks at values gets as far as that with any shape that fits.
        return "DataDependent" in type(error).__name__
    finally:
        for module, mode_before in training.items():
            module.training = mode_before
