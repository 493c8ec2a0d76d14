"""What a model computes in float whatever a plan says, and with a plan."""

from __future__ import annotations

from dataclasses import replace

from ..capture import GraphModel
from ..capture.work import FloatWork, Work, float_work
from ..plan import MAX_BITS, LayerPlan, Plan, layer_kind, supported_layers
from ..quantization.file_contents import stored_model

__all__ = ["planned_work", "unsupported_work"]


def unsupported_work(
    model: GraphModel, plan: Plan | None = None, work: list[Work] | None = None
) -> FloatWork:
    """What no plan can make native: layers without native form, products that are no layers.

    Args:
        model: captured.
        plan: whose bits count where it has some; a layer may be too large for 8.
        work: of the model, if it is at hand.
    """
    stored = stored_model(model, _everywhere(model, plan))
    return float_work(model, set(stored.layers), stored.kept_float, work)


def planned_work(model: GraphModel, plan: Plan, work: list[Work] | None = None) -> FloatWork:
    """What stays in float with a plan, layers that it keeps so included."""
    stored = stored_model(model, plan)
    every = stored_model(model, _everywhere(model, plan)).kept_float
    return float_work(model, set(stored.layers), {**every, **stored.kept_float}, work)


def _everywhere(model: GraphModel, plan: Plan | None) -> Plan:
    """The plan with bits for every layer of the model."""
    found = {}
    for name, layer in supported_layers(model).items():
        if plan is not None and name in plan:
            found[name] = replace(plan[name], bits=plan[name].bits or MAX_BITS)
        else:
            kind, count = layer_kind(layer), layer.weight.numel()
            found[name] = LayerPlan(name, kind, count, MAX_BITS)
    return Plan(found)
