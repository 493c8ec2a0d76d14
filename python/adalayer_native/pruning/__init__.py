"""Pruning: which weights of a layer are kept."""

from adalayer_native.pruning.masks import magnitude_mask

__all__ = ["magnitude_mask"]
