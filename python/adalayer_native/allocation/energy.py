"""Modelled energy of a plan, layer by layer."""

from __future__ import annotations

import torch
from torch import nn

from ..energy.model import LayerEnergy
from ..importance.analyze import eval_mode
from ..importance.flops import Work, layer_work
from ..plan import Plan, supported_layers
from ..rounding import conv_form
from .options import option_of
from .resources import stored_energy

__all__ = ["plan_energy"]


def plan_energy(
    model: nn.Module, plan: Plan, x: torch.Tensor, *, work: dict[str, Work] | None = None
) -> dict[str, LayerEnergy]:
    """Energy per image and layer by the model of :func:`~adalayer_native.energy.layer_energy`.

    The same numbers that ``Budget(energy=...)`` limits. A plan with ``bits=None`` everywhere gives
    the float network's.

    Args:
        model: the float model.
        plan: bits and sparsity per layer.
        x: example input ``[N, ...]``, for the shapes.
        work: of the layers, if it is known already; ``x`` is not looked at then.

    Raises:
        PlanError: the plan is of another model.
    """
    plan.validate(model)
    if work is None:
        with eval_mode(model):
            work = layer_work(model, supported_layers(model), x[:1])
    modules = supported_layers(model)
    forms = {name: tuple(conv_form(modules[name], modules[name].weight).shape) for name in plan}
    return {
        name: stored_energy(forms[name], option_of(layer), layer.activation_bits, work[name])
        for name, layer in plan.layers.items()
    }
