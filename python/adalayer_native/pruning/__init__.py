"""Pruning: which weights of a layer are kept."""

from adalayer_native.pruning.channels import prune_channels
from adalayer_native.pruning.masks import magnitude_mask
from adalayer_native.pruning.patterns import pattern_mask

__all__ = ["magnitude_mask", "pattern_mask", "prune_channels"]
