"""ONNX in and out: networks from ONNX files, and native networks as QDQ files (docs/onnx.md).

Needs the extra ``[onnx]``; nothing of it is loaded before a file is read or written.
"""

from typing import TYPE_CHECKING

from adalayer_native._lazy import lazy

if TYPE_CHECKING:
    from adalayer_native.onnx.importing import from_onnx
    from adalayer_native.onnx.writing import to_onnx

__all__ = ["from_onnx", "to_onnx"]

__getattr__, __dir__ = lazy(__name__, {"importing": ["from_onnx"], "writing": ["to_onnx"]})
