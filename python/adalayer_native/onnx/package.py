"""The package ``onnx``, which is an extra: loaded when it is needed, with a word on what to do."""

from __future__ import annotations

import importlib
from typing import Any

from adalayer_native.errors import MissingExtraError

__all__ = ["onnx_package"]


def onnx_package(part: str = "") -> Any:
    """The package ``onnx``, or one of its modules (``"numpy_helper"``).

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(f"onnx.{part}" if part else "onnx")
    except ImportError as error:
        raise MissingExtraError(
            f"ONNX files need the package onnx: pip install 'adalayer_native[onnx]' ({error})"
        ) from None
