"""Energy and CO2: a model per operation and layer, and what a piece of work really used."""

from .fit import Fit, Row, fit_layers
from .meter import EnergyUse, Meter, counters, intensity
from .model import LayerEnergy, layer_energy

__all__ = [
    "EnergyUse",
    "Fit",
    "LayerEnergy",
    "Meter",
    "Row",
    "counters",
    "fit_layers",
    "intensity",
    "layer_energy",
]
