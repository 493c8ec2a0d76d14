"""How much each layer matters: one small file per criterion, one registry."""

from . import accuracy, gradient, weight_error  # noqa: F401  (they register themselves)
from .analyze import analyze
from .registry import CRITERIA
from .scores import LayerScore, LayerScores

__all__ = ["CRITERIA", "LayerScore", "LayerScores", "analyze"]
