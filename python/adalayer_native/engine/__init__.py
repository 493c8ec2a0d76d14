"""Whole-graph integer engine: ``compile`` a converted model, run it, save it, ``load`` it."""

from adalayer_native.engine.compiler import compile
from adalayer_native.engine.coverage import Coverage, Row
from adalayer_native.engine.runtime import Engine
from adalayer_native.engine.saved import load

__all__ = ["Coverage", "Engine", "Row", "compile", "load"]
