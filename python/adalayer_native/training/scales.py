"""Scales that are learned while a model trains, and are plain buffers before and after."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from adalayer_native.quantization.fake_quant import ActivationQuantizer, QuantLayer
from adalayer_native.quantization.graph import layers_of, quantizers_of
from adalayer_native.quantization.lsq import StepSize

__all__ = ["apply_scales", "clip_scale_gradients", "learn_scales", "release_scales", "step_sizes"]

# Largest gradient of a scale's logarithm: at a learning rate of 0.01 and momentum 0.9 a scale
# changes by at most 2 % per step, however small it is.
_LARGEST_GRADIENT = 0.2


def _owners(prepared: nn.Module) -> Iterator[QuantLayer | ActivationQuantizer]:
    yield from layers_of(prepared).values()
    yield from quantizers_of(prepared).values()


def learn_scales(prepared: nn.Module) -> None:
    """Give every layer and every activation quantizer a :class:`StepSize`, at its present scale.

    Activation quantizers must be calibrated.
    """
    for owner in list(_owners(prepared)):
        if isinstance(owner, ActivationQuantizer):
            owner.step = StepSize(owner.qparams[:1])
        else:
            owner.step = StepSize(owner.weight_scale)


@torch.no_grad()
def apply_scales(prepared: nn.Module) -> None:
    """Write the learned scales to where everything reads them."""
    for owner in _owners(prepared):
        if owner.step is None:
            continue
        if isinstance(owner, ActivationQuantizer):
            owner.qparams[:1] = owner.step.value()
        else:
            owner.weight_scale.copy_(owner.step.value())


def release_scales(prepared: nn.Module) -> None:
    """Take the parameters out again; the scales stay as they are."""
    for owner in list(_owners(prepared)):
        if owner.step is not None:
            del owner.step  # of the registered modules
            owner.step = None


def step_sizes(prepared: nn.Module) -> list[StepSize]:
    """All that are being learned."""
    return [owner.step for owner in _owners(prepared) if owner.step is not None]


def clip_scale_gradients(steps: list[StepSize]) -> None:
    """Bound what one step can change."""
    gradients: list[Tensor] = [step.log.grad for step in steps if step.log.grad is not None]
    for gradient in gradients:
        # A channel whose weights are all zero has no say, whatever its scale is.
        torch.nan_to_num_(gradient, nan=0.0)
        gradient.clamp_(-_LARGEST_GRADIENT, _LARGEST_GRADIENT)
