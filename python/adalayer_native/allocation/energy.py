"""Modelled energy of a plan, layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..capture import Inputs, captured
from ..energy.model import LayerEnergy
from ..importance.analyze import eval_mode
from ..importance.batches import one_sample
from ..importance.flops import Work, layer_work
from ..plan import Plan, supported_layers
from ..rounding import conv_form
from .options import option_of
from .resources import stored_energy

__all__ = ["plan_energy"]


def plan_energy(
    model: nn.Module | torch.export.ExportedProgram,
    plan: Plan,
    x: Any,
    *,
    work: dict[str, Work] | None = None,
) -> dict[str, LayerEnergy]:
    """Energy per image and layer by the model of :func:`~adalayer_native.energy.layer_energy`.

    The same numbers that ``Budget(energy=...)`` limits. A plan with ``bits=None`` everywhere gives
    the float network's.

    Args:
        model: the float model, captured or not.
        plan: bits and sparsity per layer.
        x: example input, for the shapes: a tensor, a tuple or a dictionary of arguments.
        work: of the layers, if it is known already; ``x`` is not looked at then.

    Raises:
        PlanError: the plan is of another model.
    """
    model = captured(model, example=x)
    plan.validate(model)
    if work is None:
        with eval_mode(model):
            work = layer_work(model, supported_layers(model), one_sample(model, Inputs.of(x)))
    modules = supported_layers(model)
    forms = {name: tuple(conv_form(modules[name], modules[name].weight).shape) for name in plan}
    return {
        name: stored_energy(forms[name], option_of(layer), layer.activation_bits, work[name])
        for name, layer in plan.layers.items()
    }
