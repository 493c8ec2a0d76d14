"""Energy of a layer from its operations and the bytes it moves: a model, not a measurement.

Constants are picojoules in a 45 nm process at 0.9 V from Horowitz, "Computing's energy problem
(and what we can do about it)", ISSCC 2014, with the memories as tabulated by Han et al., "Learning
both weights and connections for efficient neural networks", NeurIPS 2015. They rank plans and
layers; a machine of today uses less for everything, in other proportions.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerEnergy", "layer_energy"]

MULTIPLY_8 = 0.2  # 8 x 8 bit integers
ADD_32 = 0.1  # 32 bit integers
FLOAT_MULTIPLY_ADD = 3.7 + 0.9  # 32 bit
SRAM_BYTE = 5.0 / 4  # a 32-bit word from on-chip memory
DRAM_BYTE = 640.0 / 4  # a 32-bit word from memory outside

FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerEnergy:
    """Modelled energy of one layer for one image, in picojoules.

    Attributes:
        arithmetic: multiplications and additions.
        weights: one read of the stored weights from DRAM.
        activations: inputs read and outputs written, in on-chip memory.
        extrapolated: whether the arithmetic is for a width that nobody published a figure of:
            below 8 bits the multiplier is scaled by the product of the widths.
    """

    arithmetic: float
    weights: float
    activations: float
    extrapolated: bool = False

    @property
    def total(self) -> float:
        """Sum of the three, picojoules."""
        return self.arithmetic + self.weights + self.activations


def layer_energy(
    macs: float,
    weight_bytes: float,
    bits: int | None,
    activation_bits: int = 8,
    activations: float = 0.0,
) -> LayerEnergy:
    """The model. Zeros inside a layer are not skipped by the kernels: they save bytes only.

    An integer multiplication costs ``0.2 pJ * bits * activation_bits / 64``: an array multiplier
    has one cell for every pair of bits. Every product is added to a 32-bit sum (0.1 pJ). An
    activation takes a byte at any width up to 8 bits, and four as float.

    Args:
        macs: multiply-accumulates per image.
        weight_bytes: stored bytes of the weights.
        bits: of the weights; ``None``: the layer is float32, and its activations are.
        activation_bits: of the layer's input.
        activations: values per image that are read or written, inputs and outputs.
    """
    if bits is None:
        return LayerEnergy(
            macs * FLOAT_MULTIPLY_ADD, weight_bytes * DRAM_BYTE, 4 * activations * SRAM_BYTE
        )
    multiply = MULTIPLY_8 * bits * activation_bits / 64.0
    return LayerEnergy(
        macs * (multiply + ADD_32),
        weight_bytes * DRAM_BYTE,
        activations * SRAM_BYTE,
        extrapolated=bits < 8 or activation_bits < 8,
    )
