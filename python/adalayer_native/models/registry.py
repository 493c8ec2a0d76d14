"""Finding a model by name, and loading weights into it with every mismatch spelled out."""

from __future__ import annotations

import importlib
import inspect
import os
import zipfile
from collections.abc import Callable

import torch
from torch import nn

from .._files import require_file
from ..errors import FileFormatError, UnsupportedModelError
from ..onnx import from_onnx
from .adalayernet import adalayernet
from .resnet import resnet18
from .resnet_cifar import resnet20

__all__ = ["MODELS", "get_model", "is_file", "load_weights"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "adalayernet": adalayernet,
    "resnet20": resnet20,
    "resnet18": resnet18,
}


# What callables name their number of classes.
CLASSES = ("num_classes", "n_classes", "nclasses", "classes", "num_labels", "n_class", "nb_classes")


def is_file(name: str) -> bool:
    """Whether a model's name is that of an ONNX file, which brings its weights along."""
    return name.endswith(".onnx")


def get_model(
    name: str, num_classes: int = 10, *, required: bool = False, image_size: int | None = None
) -> nn.Module:
    """Build a model in eval mode.

    Args:
        name: a built-in name (``MODELS``), ``"package.module:callable"`` or an ONNX file. The
            callable returns an ``nn.Module`` and is given the number of classes if it takes one (an
            argument of a name in ``CLASSES``, or ``**kwargs``). A file's network comes as it is,
            in float where it is quantized.
        num_classes: number of classes.
        required: a callable that takes no number of classes is an error.
        image_size: height and width of images, for a file that leaves them free.

    Raises:
        UnsupportedModelError: unknown name, or the callable cannot be imported or called, or
            does not return an ``nn.Module``.
    """
    if name in MODELS:
        return MODELS[name](num_classes=num_classes).eval()
    if is_file(name):
        return from_onnx(name, sizes=image_size or {}, integers=False)
    if ":" not in name:
        raise UnsupportedModelError(
            f"unknown model {name!r}: expected one of {sorted(MODELS)}, 'package.module:callable' "
            "or a file that ends in .onnx"
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
        if _is_pickled(name):
            raise FileFormatError(
                f"weight file {name!r} is one of torch.save; expected a safetensors file. If you "
                "trust it, and it holds a state_dict: safetensors.torch.save_file(torch.load("
                f"{name!r}, weights_only=True), {os.path.splitext(name)[0] + '.safetensors'!r})"
            ) from None
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


def _is_pickled(path: str) -> bool:
    """Whether a file looks like torch.save's: a zip with a pickle in it, or formerly the pickle."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except Exception:  # no zip; a damaged one raises many types
        with open(path, "rb") as stream:
            return stream.read(1) == b"\x80"


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
