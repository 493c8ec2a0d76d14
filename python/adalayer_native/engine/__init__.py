"""Whole-graph integer engine: ``compile`` a converted model, run it, save it, ``load`` it."""

from typing import TYPE_CHECKING

from adalayer_native._lazy import lazy

if TYPE_CHECKING:
    from adalayer_native.engine.compiler import compile
    from adalayer_native.engine.coverage import Coverage, Row
    from adalayer_native.engine.runtime import Engine
    from adalayer_native.engine.saved import load
    from adalayer_native.engine.sizes import Size

__all__ = ["Coverage", "Engine", "Row", "Size", "compile", "load"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "compiler": ["compile"],
        "coverage": ["Coverage", "Row"],
        "runtime": ["Engine"],
        "saved": ["load"],
        "sizes": ["Size"],
    },
)
