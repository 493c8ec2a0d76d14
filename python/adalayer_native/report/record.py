"""What a finished compression says about itself, layer by layer: the contents of report.json."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .. import files, ops
from ..allocation import float_bytes, plan_energy
from ..allocation.float_work import planned_work
from ..capture import GraphModel, Inputs, captured
from ..compress import Compressed
from ..energy import Row, fit_layers
from ..engine import Engine
from ..engine import compile as compile_engine
from ..errors import AdaError
from ..importance.analyze import eval_mode
from ..importance.batches import one_sample
from ..importance.flops import layer_work
from ..measure import Hits
from ..plan import Plan, supported_layers

__all__ = ["RECORD_FORMAT", "RECORD_VERSION", "class_rows", "compiled", "record"]

RECORD_FORMAT = "adalayer-report"
RECORD_VERSION = 1
LEAST_FITTED = 8  # timed layers; the model has five terms
ROUNDS = 15  # runs of the engine that a layer's microseconds are the median of


def record(
    name: str,
    model: nn.Module,
    result: Compressed,
    packed: str | os.PathLike[str],
    x: Any,
    more: Mapping[str, Any] | None = None,
    *,
    engine: Engine | str | None = None,
) -> dict[str, Any]:
    """JSON values about a compressed model; :func:`~adalayer_native.report.load_run` reads them.

    The engine is compiled for one image and timed node by node, so every layer has the kernel that
    runs and its microseconds. Where it cannot be compiled, the reason is in ``engine``.

    Args:
        name: of the model.
        model: the float model, captured or not.
        result: from ``compress``.
        packed: the saved file.
        x: an input: a tensor, a tuple or a dictionary of arguments.
        more: what the caller measured (accuracies, :func:`class_rows`, milliseconds), added as it
            is.
        engine: what :func:`compiled` gave, where the caller has asked it.
    """
    plan, size = result.plan, os.stat(packed).st_size
    front = captured(model, example=x)
    sample = one_sample(front, Inputs.of(x))
    original = float_bytes(model if isinstance(model, nn.Module) else front)
    if engine is None:
        found, why = compiled(result.model, sample)
        engine = why if found is None else found
    times, timed = _profile(engine)
    layers = _layers(front, result, packed, sample, times)
    rest = planned_work(front, plan) if result.float_work is None else result.float_work
    return {
        "format": RECORD_FORMAT,
        "version": RECORD_VERSION,
        "model": name,
        "method": plan.method,
        "hyper": plan.hyper,
        "bytes": size,
        "float_bytes": original,
        "size_fraction": size / original,
        "average_bits": plan.average_bits,
        "threads": ops.get_num_threads(),
        "isa": ops.active_isa(),
        "kept_float": result.kept_float,
        "float_rest": [{"name": n, **entry} for n, entry in rest.as_dict().items()],
        "measured": plan.measured,
        "engine": timed,
        "modelled_energy_uj": 1e-6 * sum(layer["energy_pj"] for layer in layers),
        "modelled_float_energy_uj": 1e-6 * sum(layer["float_energy_pj"] for layer in layers),
        "fitted_model": _fitted(layers, (more or {}).get("energy")),
        **(more or {}),
        "layers": layers,
    }


def _fitted(
    layers: Sequence[Mapping[str, Any]], energy: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The energy model fitted to the layers that were timed, with its residuals, if they suffice.

    Where the energy of inference was metered, times are multiplied by the power that was drawn.
    """
    timed = [e for e in layers if e.get("microseconds", 0.0) > 0.0 and e["bits"] is not None]
    if len(timed) < LEAST_FITTED:
        return None
    use = (energy or {}).get("native")
    watts = use["joules"] / use["seconds"] if use and use["seconds"] > 0 else 0.0
    factor, unit = (watts, f"µJ, power {use['label']}") if use and watts > 0 else (1.0, "µs")
    rows = [
        Row(
            e["name"], e["flops"] / 2, e["bits"], e["activation_bits"], e["bytes"],
            e["activations"], factor * e["microseconds"],
        )
        for e in timed
    ]  # fmt: skip
    return fit_layers(rows, unit).as_dict()


def class_rows(names: Sequence[str], before: Hits, after: Hits) -> list[dict[str, Any]]:
    """What a record holds of every class: its test images, and right answers of both models."""
    found = []
    for number, name in enumerate(names):
        seen, right, now = (
            counts[number] if number < len(counts) else 0
            for counts in (before.seen, before.right, after.right)
        )
        found.append({"name": name, "images": seen, "float_right": right, "right": now})
    return found


def compiled(
    native: nn.Module, x: Any, levels: Sequence[nn.Module] = ()
) -> tuple[Engine | None, str]:
    """The engine of a converted model for such inputs, and of levels of quality below it, or why
    there is none."""
    try:
        return compile_engine(native, x, policy="native", levels=levels), ""
    except AdaError as error:
        return None, str(error)


def _profile(engine: Engine | str) -> tuple[dict[str, tuple[float, str]], dict[str, Any]]:
    """Microseconds and kernel per layer, and what there is to say about the engine."""
    if isinstance(engine, str):
        return {}, {"why": engine}
    rows = engine.coverage(rounds=ROUNDS)
    found: dict[str, tuple[float, str]] = {}
    for row in rows:
        name = row.name.split("#", 1)[0]  # the second call of a layer is "layer#2"
        before = found.get(name, (0.0, ""))[0]
        kernel = row.kernel if row.kind != "torch" else f"torch: {row.why or row.op}"
        found[name] = (before + row.microseconds, kernel)
    return found, {"microseconds": rows.microseconds, "native_share": rows.native_share}


def _layers(
    model: GraphModel,
    result: Compressed,
    packed: str | os.PathLike[str],
    x: Inputs,
    times: Mapping[str, tuple[float, str]],
) -> list[dict[str, Any]]:
    """One entry per layer of the plan: what was decided, and what came of it."""
    stored = {e["name"]: e for e in files.describe(packed) if e["name"] is not None}
    with eval_mode(model):
        work = layer_work(model, supported_layers(model), x)
    # As it came out: a layer that could not become native is float, whatever was planned.
    plan = Plan(
        {
            name: replace(layer, bits=layer.bits if name in stored else None)
            for name, layer in result.plan.layers.items()
        }
    )
    energy = plan_energy(model, plan, x, work=work)
    whole = plan_energy(
        model,
        Plan({n: replace(layer, bits=None) for n, layer in plan.layers.items()}),
        x,
        work=work,
    )
    entries = []
    for name, layer in plan.layers.items():
        entry: dict[str, Any] = {
            "name": name,
            "kind": layer.kind,
            "params": layer.params,
            "bits": layer.bits,
            # What became of it: values that several layers read have the fewest bits of all.
            "activation_bits": stored[name]["input_bits"]
            if name in stored
            else layer.activation_bits,
            "planned_sparsity": layer.sparsity,
            "pattern": layer.pattern,
            "flops": 2 * work[name].macs,
            "activations": work[name].activations,
            "energy_pj": energy[name].total,
            "energy_extrapolated": energy[name].extrapolated,
            "float_energy_pj": whole[name].total,
        }
        if name in stored:
            file = stored[name]
            entry |= {"encoding": file["encoding"], "bytes": file["bytes"]}
        else:
            entry["bytes"] = 4 * layer.params
        if name in times:
            entry |= {"microseconds": times[name][0], "kernel": times[name][1]}
        if result.repair is not None and name in result.repair.layers:
            row = result.repair.layers[name]
            entry |= {"plain_error": row.plain_error, "output_error": row.error}
        entry |= (result.plan.scores or {}).get(name, {})
        entries.append(entry)
    return entries
