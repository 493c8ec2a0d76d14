"""Energy and CO2: a model per operation and layer, and what a piece of work really used."""

from .meter import EnergyUse, Meter, counters
from .model import LayerEnergy, layer_energy

__all__ = ["EnergyUse", "LayerEnergy", "Meter", "counters", "layer_energy"]
