"""Pictures of plans and measurements, as PNG or SVG; each function returns a matplotlib Figure."""

from .bars import bars
from .fingerprint import fingerprint
from .microscope import microscope
from .pareto import pareto
from .ribbon import ribbon
from .sensitivity import sensitivity
from .widths import widths

__all__ = ["bars", "fingerprint", "microscope", "pareto", "ribbon", "sensitivity", "widths"]
