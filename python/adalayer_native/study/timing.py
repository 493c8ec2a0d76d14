"""Latency, energy and traffic of finished models, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..allocation import packed_bytes, plan_energy
from ..allocation.resources import bit_operations
from ..energy import Meter
from ..importance.analyze import eval_mode
from ..importance.flops import layer_work
from ..measure import interleaved
from ..plan import LayerPlan, Plan, layer_kind, supported_layers
from ..pruning.masks import pruned_count

__all__ = ["EngineModule", "energies", "latencies", "ledger"]

Runner = Callable[[Tensor], Any]


class EngineModule(nn.Module):
    """An engine where a module is expected."""

    def __init__(self, engine: Runner) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, x: Tensor) -> Any:
        return self.engine(x)


@torch.inference_mode()
def latencies(
    candidates: Mapping[str, Runner], x: Tensor, sizes: Sequence[int] = (1, 16), *, seconds: float
) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds per call of each candidate, in turn in one process.

    Args:
        candidates: functions of images ``[N, 3, H, W]``.
        x: images, at least as many as the largest size.
        sizes: images per call.
        seconds: of measuring per size.

    Returns:
        ``{name: {"1": {"median": …, "lowest": …, "samples": …}, "16": …}}``.
    """
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in candidates}
    for size in sizes:
        part = x[:size].contiguous(memory_format=torch.channels_last)
        times = interleaved(
            {name: _call(run, part) for name, run in candidates.items()}, seconds=seconds
        )
        for name, timing in times.items():
            found[name][str(size)] = {
                "median": 1000 * timing.median,
                "lowest": 1000 * timing.lowest,
                "samples": timing.samples,
            }
    return found


def _call(run: Runner, x: Tensor) -> Callable[[], Any]:
    return lambda: run(x)


@torch.inference_mode()
def energies(
    candidates: Mapping[str, Runner], x: Tensor, *, seconds: float, country: str | None
) -> dict[str, dict[str, Any]]:
    """What 1,000 images use, in calls of ``x``: each candidate runs for so many seconds.

    The machine's own use while it runs is in it.

    Raises:
        MissingExtraError: there are no counters, and codecarbon is not installed.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    found = {}
    for name, run in candidates.items():
        run(x)
        seen = 0
        with Meter(country=country) as meter:
            deadline = time.monotonic() + seconds
            while seen == 0 or time.monotonic() < deadline:
                run(x)
                seen += len(x)
        found[name] = meter.use.per(seen / 1000).as_dict()
    return found


def ledger(model: nn.Module, plan: Plan | None, x: Tensor) -> dict[str, Any]:
    """What a plan asks of the machine for one image, counted.

    ``flops`` (2 per multiply-add of the dense layer), ``nonzero_flops`` (those of weights that are
    left), ``bops`` (MACs x weight bits x activation bits x share left; float is 32 x 32),
    ``weight_bytes`` and ``activation_bytes`` that are read or written once per image (weights as
    stored, activations one byte at any width up to 8 bits and four in float), and
    ``modelled_energy_uj``; and ``layer_flops`` by layer.

    Args:
        model: float model.
        plan: bits and sparsity; ``None``: all in float.
        x: images ``[N, ...]``.

    Raises:
        PlanError: the plan is of another model.
    """
    layers = supported_layers(model)
    if plan is None:
        plan = Plan({})
    plan.validate(model)
    with eval_mode(model):
        work = layer_work(model, layers, x[:1])
    names = ("flops", "nonzero_flops", "bops", "weight_bytes", "activation_bytes")
    found: dict[str, Any] = dict.fromkeys(names, 0.0)
    found["layer_flops"] = {name: 2 * each.macs for name, each in work.items()}
    for name, layer in layers.items():
        entry = plan.layers.get(name)
        count, each = layer.weight.numel(), work[name]
        bits = None if entry is None else entry.bits
        sparsity = 0.0 if entry is None or bits is None else entry.sparsity
        found["flops"] += 2 * each.macs
        found["nonzero_flops"] += 2 * each.macs * (1 - sparsity)
        found["bops"] += bit_operations(
            each.macs, bits, 8 if entry is None else entry.activation_bits, sparsity
        )
        if bits is None:
            found["weight_bytes"] += 4 * count
            found["activation_bytes"] += 4 * each.activations
        else:
            found["weight_bytes"] += packed_bytes(
                count, count - pruned_count(count, sparsity), bits
            )
            found["activation_bytes"] += each.activations
    whole = Plan({**_float_plan(model).layers, **plan.layers})
    energy = plan_energy(model, whole, x, work=work)
    found["modelled_energy_uj"] = 1e-6 * sum(layer.total for layer in energy.values())
    return found


def _float_plan(model: nn.Module) -> Plan:
    return Plan({
        name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), None)
        for name, layer in supported_layers(model).items()
    })  # fmt: skip
