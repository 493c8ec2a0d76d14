"""Finding a model by name, and loading weights into it with every mismatch spelled out."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable

import torch
from torch import nn

from .._files import require_file
from ..errors import FileFormatError, UnsupportedModelError
from .adalayernet import adalayernet
from .resnet import resnet18
from .resnet_cifar import resnet20

__all__ = ["MODELS", "get_model", "load_weights"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "adalayernet": adalayernet,
    "resnet20": resnet20,
    "resnet18": resnet18,
}


# What callables name their number of classes.
CLASSES = ("num_classes", "n_classes", "nclasses", "classes", "num_labels", "n_class", "nb_classes")


def get_model(name: str, num_classes: int = 10, *, required: bool = False) -> nn.Module:
    """Build a model in eval mode.

    Args:
        name: a built-in name (``MODELS``), or ``"package.module:callable"``; the callable
            returns an ``nn.Module`` and is given the number of classes if it takes one (an
            argument of a name in ``CLASSES``, or ``**kwargs``).
        num_classes: number of classes.
        required: a callable that takes no number of classes is an error.

    Raises:
        UnsupportedModelError: unknown name, or the callable cannot be imported or called, or
            does not return an ``nn.Module``.
    """
    if name in MODELS:
        return MODELS[name](num_classes=num_classes).eval()
    if ":" not in name:
        raise UnsupportedModelError(
            f"unknown model {name!r}: expected one of {sorted(MODELS)} or 'package.module:callable'"
        )
    module_name, _, attribute = name.partition(":")
    try:
        target: object = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except Exception as error:  # whatever a module of the user's own raises
        raise UnsupportedModelError(
            f"cannot import the model {name!r}: {_told(error, ImportError, AttributeError)}"
        ) from error
    if not callable(target):
        raise UnsupportedModelError(f"model {name!r}: expected a callable, got {type(target)}")
    model = _called(name, target, num_classes, required)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"model {name!r}: the callable must return a torch.nn.Module, got {type(model)}"
        )
    return model.eval()


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a safetensors file into ``model`` in place and return the model.

    Keys must match exactly, except that the file may lack BN's ``num_batches_tracked``, which
    inference never reads. Nothing is changed unless everything fits.

    Raises:
        FileFormatError: missing or corrupt file; missing, unexpected or wrongly shaped tensors
            (all are listed); NaN or infinity (the tensor is named).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = os.fspath(path)
    require_file(path, "weight file")
    try:
        loaded = load_file(name)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise FileFormatError(
            f"weight file {name!r} is not a readable safetensors file: {error}"
        ) from error
    expected = model.state_dict()
    missing = [
        key for key in expected if key not in loaded and not key.endswith(".num_batches_tracked")
    ]
    unexpected = [key for key in loaded if key not in expected]
    shapes = [
        f"{key}: model {tuple(expected[key].shape)}, file {tuple(loaded[key].shape)}"
        for key in expected
        if key in loaded and expected[key].shape != loaded[key].shape
    ]
    problems = [
        f"{title} ({len(keys)}): {_some(keys)}"
        for title, keys in (
            ("missing in the file", missing),
            ("unexpected in the file", unexpected),
            ("wrong shape", shapes),
        )
        if keys
    ]
    if problems:
        raise FileFormatError(
            f"weight file {name!r} does not fit {type(model).__name__}: {'; '.join(problems)}"
        )
    for key, value in loaded.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise FileFormatError(f"weight file {name!r}: tensor {key!r} holds NaN or infinity")
    model.load_state_dict(loaded, strict=False)
    return model


def _called(name: str, target: Callable[..., object], num_classes: int, required: bool) -> object:
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    argument = next((each for each in CLASSES if each in parameters), None)
    keywords = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    try:
        if argument is not None:
            return target(**{argument: num_classes})
        if keywords:
            try:
                return target(num_classes=num_classes)
            except TypeError as error:
                if required or "num_classes" not in str(error):
                    raise
        elif required:
            raise UnsupportedModelError(
                f"model {name!r}: the callable takes no number of classes (expected an argument "
                f"named one of {', '.join(CLASSES)}); leave --classes out, or name a callable "
                "that takes it"
            )
        return target()
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a function of the user's own raises
        raise UnsupportedModelError(f"model {name!r} cannot be built: {_told(error)}") from error


def _told(error: Exception, *plain: type[Exception]) -> str:
    """An error in one line; of the plain kinds the text says enough."""
    text = " ".join(str(error).split())
    return text if isinstance(error, plain) else f"{type(error).__name__}: {text}"


def _some(keys: list[str], limit: int = 20) -> str:
    shown = ", ".join(keys[:limit])
    return shown if len(keys) <= limit else f"{shown}, and {len(keys) - limit} more"
