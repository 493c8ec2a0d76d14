"""All that is recorded of one network."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import adalayer_native as ada
from adalayer_native.capture import GraphModel
from adalayer_native.nn.layer import NativeLayer
from adalayer_native.plan import LayerPlan, Plan, layer_kind, supported_layers
from bench.conftest import measure as in_turns
from bench.interleave import spreads
from bench.report import shown_state
from bench.zoo.compare import cosines, difference, differing_nodes
from bench.zoo.entry import Entry, Example, arguments, call
from bench.zoo.macs import all_macs, layer_macs
from bench.zoo.rounding import rounded
from bench.zoo.sanity import sanity

BATCH = 2  # of the example that networks are captured with
OTHER_BATCH = 3
OTHER_SIZE = "another size"
CALIBRATION = 4  # batches
REPAIRED_BITS = 4  # at most so many bits are repaired: there plain rounding loses much
LONGEST_TEXT = 1500

Record = dict[str, Any]
Save = Callable[[Record], None]


class Refused(Exception):
    """A step raised an error; ``stage`` says which."""

    def __init__(self, stage: str, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        super().__init__(text[:LONGEST_TEXT] + ("…" if len(text) > LONGEST_TEXT else ""))
        self.stage = stage


@contextmanager
def step(record: Record, stage: str) -> Any:
    """Note what is going on and how long it took; an error becomes :class:`Refused`."""
    record["stage"] = stage
    start = time.perf_counter()
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        raise Refused(stage, error) from error
    record[f"{stage}_seconds"] = time.perf_counter() - start


def measure(entry: Entry, widths: Sequence[int], seconds: float, save: Save) -> Record:
    """Everything about one network.

    Args:
        widths: bits of all weights, one after the other.
        seconds: how long engine and torch take turns, per width.
        save: called with what is known after every step.
    """
    record: Record = {"name": entry.name, "convolutional": entry.convolutional, "bits": {}}
    try:
        with step(record, "build"):
            model = entry.build()
        with step(record, "float"):
            record["parameters"] = sum(p.numel() for p in model.parameters())
            record["sanity"] = sanity(model, entry.inputs(8, 11)).to_dict()
            record["macs"] = all_macs(model, entry.inputs(1, 12))
        save(record)
        with step(record, "capture"):
            captured = ada.capture(model, entry.inputs(BATCH, 13))
        with step(record, "captured"):
            record["equal"] = _captured_equal(entry, model, captured)
        save(record)
        for bits in widths:
            part: Record = {}
            record["bits"][str(bits)] = part
            try:
                _measure_width(entry, model, captured, bits, seconds, part, record["macs"])
            except Refused as refusal:
                part["refused"] = {"stage": refusal.stage, "why": str(refusal)}
            save(record)
    except Refused as refusal:
        record["refused"] = {"stage": refusal.stage, "why": str(refusal)}
    return record


def _captured_equal(entry: Entry, model: nn.Module, captured: nn.Module) -> Record:
    """Per input whether captured and float network agree: true, a difference, or an error.

    A capture may be of one size alone, and says so; that is noted as ``{"fixed": why}``.
    """
    found: Record = {}
    cases = {
        "the example": entry.inputs(BATCH, 13),
        f"batch {OTHER_BATCH}": entry.inputs(OTHER_BATCH, 14),
        "batch 1": entry.inputs(1, 15),
    }
    if entry.other is not None:
        cases[OTHER_SIZE] = entry.other(BATCH, 16)
    for name, example in cases.items():
        wanted = call(model, example)
        try:
            apart = difference(call(captured, example), wanted)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:LONGEST_TEXT]
            fixed = name == OTHER_SIZE and isinstance(error, ada.InputError)
            found[name] = {"fixed": why} if fixed else why
        else:
            found[name] = True if apart.equal else apart.to_dict()
    return found


def uniform_plan(captured: nn.Module, bits: int) -> Plan:
    """The same width for every layer, inputs of 8 bits."""
    return Plan(
        {
            name: LayerPlan(name, layer_kind(layer), layer.weight.numel(), bits)
            for name, layer in supported_layers(captured).items()
        },
        "uniform",
    )


def _measure_width(
    entry: Entry,
    model: nn.Module,
    captured: GraphModel,
    bits: int,
    seconds: float,
    part: Record,
    macs: float,
) -> None:
    batches = entry.batches(CALIBRATION)
    begin = time.perf_counter()
    with step(part, "prepare"):
        prepared = ada.prepare(captured, uniform_plan(captured, bits))
    with step(part, "calibrate"):
        ada.calibrate(prepared, batches, progress=False)
    if bits <= REPAIRED_BITS:
        with step(part, "repair"):
            ada.repair(prepared, batches, progress=False)
    with step(part, "convert"):
        native = ada.convert(prepared)
    part["compress_seconds"] = time.perf_counter() - begin
    part["kept_float"] = dict(prepared.meta["kept_float"])
    example = entry.inputs(BATCH, 17)
    with step(part, "native"):
        layers = supported_layers(captured)
        names = [n for n, m in native.named_modules() if isinstance(m, NativeLayer)]
        quantized = {n: layers[n] for n in names if n in layers}
        part["layers"] = [len(quantized), len(layers)]
        done = sum(layer_macs(captured, quantized, entry.inputs(1, 12)).values())
        part["quantized_share"] = done / macs if macs else 1.0
        ours = call(native, example)
        with ada.simulate(prepared) as exact:
            part["native"] = difference(ours, call(exact, example)).to_dict()
        several = entry.inputs(8, 18)
        wanted = call(model, several)
        part["cosines"] = cosines(call(native, several), wanted)
    with step(part, "rounded"):
        part["rounded"] = cosines(rounded(captured, several, bits, batches), wanted)
    _measure_engine(native, example, ours, part)
    with step(part, "clock"):
        _clock(entry, model, native, seconds, part)


def _measure_engine(native: nn.Module, example: Example, ours: Any, part: Record) -> None:
    with step(part, "compile"):
        engine = ada.compile(native, example, policy="native", weights="resident")
    with step(part, "engine"):
        apart = difference(call(engine, example), ours)
        coverage = engine.coverage(rounds=0)
        part["native_share"] = coverage.native_share
        part["in_torch"] = [[r.name, r.op, r.why, r.macs] for r in coverage if r.kind == "torch"]
        if not apart.equal and isinstance(example, Tensor):
            apart = replace(apart, nodes=differing_nodes(native, example))
        part["engine"] = apart.to_dict()


def _clock(entry: Entry, model: nn.Module, native: nn.Module, seconds: float, part: Record) -> None:
    """Milliseconds of one input, by turns in this process; compiled as a user would."""
    one = entry.inputs(1, 19)
    args, kwargs = arguments(one)
    start = time.perf_counter()
    engine = ada.compile(native, one)
    part["fastest_seconds"] = time.perf_counter() - start

    def floats() -> Any:
        with torch.inference_mode():
            return model(*args, **kwargs)

    runs: dict[str, Callable[[], Any]] = {
        "engine": lambda: engine(*args, **kwargs),
        "torch": floats,
    }
    comparison = in_turns(entry.name, runs, threads=1, seconds=seconds)
    table = spreads(comparison, comparison.fastest_probe())
    state = shown_state(table)
    part["milliseconds"] = {name: 1e3 * table[name][state].median for name in table}
    part["cores"] = state
