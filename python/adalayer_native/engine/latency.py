"""Microseconds per layer at other widths and sparsities, measured in the whole program."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from adalayer_native import _C, ops
from adalayer_native.engine.emit import constant_adders
from adalayer_native.engine.parts import NativePart
from adalayer_native.engine.runtime import Engine
from adalayer_native.engine.shapes import WEIGHTED, shapes_of
from adalayer_native.pruning import pattern_mask
from adalayer_native.rounding import quantize_weight

__all__ = ["LayerTimes", "NodeTime", "TimesByWidth", "call_seconds", "layer_of", "seconds_in_turn"]

# Calls of an engine per turn, of which the first is not timed: another one had the caches.
TIMED = 3


@dataclass(frozen=True)
class NodeTime:
    """What one node of a program took.

    Attributes:
        layer: the layer that it stands for, or another name.
        shape: what it has to do (:func:`~adalayer_native.engine.shapes.shapes_of`).
        kernel: what ran it.
        microseconds: per call.
    """

    layer: str
    shape: str
    kernel: str
    microseconds: float


class LayerTimes:
    """Profiles an engine with other weights in its layers.

    The engine's own programs are copied with its weights rounded to the wanted width and zeros of
    the wanted sparsity at random places, everything else as it is, so that a layer is measured
    between its neighbours, on its layouts and with the kernel that would run. What can run a layer,
    and how fast, depends on how its weights are distributed; weights of another distribution would
    be other layers. All layers get the same width at once: one profile gives a column of the table.

    Args:
        engine: compiled with ``policy="native"``.
        layers: names of interest; those that the engine runs in torch or not at all are left out.
        batch: images per call.
        threads: threads per call; default: those of ``ops.get_num_threads()``.
        rounds: runs per profile; the median counts.
        beside: whose engine calls are timed beside; default: the own one.

    Attributes:
        reference: microseconds of a call of that engine when it was first timed. A column may be
            measured minutes after another, when the machine is busier or less so: each is timed in
            turn with this engine, and counts as if that one still took so long.
    """

    def __init__(
        self,
        engine: Engine,
        layers: Iterable[str],
        *,
        batch: int = 1,
        threads: int | None = None,
        rounds: int = 15,
        beside: LayerTimes | None = None,
    ) -> None:
        self.engine, self.batch, self.rounds = engine, batch, rounds
        self.threads = ops.get_num_threads() if threads is None else threads
        wanted = set(layers)
        found: set[str] = set()
        self.weights: list[set[int]] = []  # per native part: constants that are weights of layers
        for step in engine._steps:
            if isinstance(step.run, NativePart):
                numbers: set[int] = set()
                for op, name, _, _, _, _, constants in step.run.program.nodes():
                    if op in WEIGHTED and layer_of(name) in wanted:
                        numbers.add(constants[0])
                        found.add(layer_of(name))
                self.weights.append(numbers)
        self.layers = sorted(found)
        self.beside = self if beside is None else beside
        self.reference: float | None = None
        self._rounded: dict[tuple[int, int, int], np.ndarray] = {}
        self._forms: dict[tuple[int, float, str], dict[str, list[int]]] = {}

    def column(
        self, bits: int, sparsity: float, pattern: str = "unstructured"
    ) -> tuple[dict[str, float], float]:
        """Microseconds of every layer at one width, sparsity and pattern, and of the rest."""
        engine = self._reweighted(bits, sparsity, pattern)
        times = dict.fromkeys(self.layers, 0.0)
        other = 0.0
        nodes = self._nodes(engine)
        for node in nodes:
            if node.layer in times:
                times[node.layer] += node.microseconds
            else:
                other += node.microseconds
        if sum(times.values()) + other <= 0:  # without vector kernels there is no profile
            return times, self._call(engine)
        return times, other

    def nodes(self, bits: int, sparsity: float, pattern: str = "unstructured") -> list[NodeTime]:
        """The same for every node of the program, in its order; without vector kernels zeros."""
        return self._nodes(self._reweighted(bits, sparsity, pattern))

    def _nodes(self, engine: Engine) -> list[NodeTime]:
        """Of all parts that are programs.

        Of a network that is one program, they add up to the median time of a whole call: the
        profile, which waits after every node and sees at most as many images as the engine takes
        through the program at once, only says how a call divides.
        """
        found = []
        for step in engine._steps:
            if isinstance(step.run, NativePart):
                profile = step.run.engine.profile(self.batch, self.threads, self.rounds)
                for shape, entry in zip(shapes_of(step.run.program), profile, strict=True):
                    found.append(NodeTime(layer_of(entry[0]), shape, entry[2], entry[7]))
        native = sum(node.microseconds for node in found)
        if native <= 0 or len(engine._steps) > 1:
            return found
        scale = self._call(engine) / native
        return [replace(node, microseconds=scale * node.microseconds) for node in found]

    def forms(
        self, bits: int, sparsity: float, pattern: str = "unstructured"
    ) -> dict[str, list[int]]:
        """What the engine chooses from for every layer; layers of equal forms take equal times."""
        key = bits, sparsity, pattern
        if key not in self._forms:
            self._reweighted(*key)
        return self._forms[key]

    def _reweighted(self, bits: int, sparsity: float, pattern: str) -> Engine:
        """The engine with weights of one width, sparsity and pattern in all layers."""
        engine = copy.copy(self.engine)
        engine._steps = [copy.copy(step) for step in self.engine._steps]
        engine._single = None
        forms: dict[str, list[int]] = {name: [] for name in self.layers}
        part = 0
        for step in engine._steps:
            if not isinstance(step.run, NativePart):
                continue
            replaced = {
                number: self._weight(step.run.program, part, number, bits, sparsity, pattern)
                for number in self.weights[part]
            }
            step.run = NativePart(_replaced(step.run.program, replaced), step.run.outputs)
            for name, form in step.run.engine.forms():
                if layer_of(name) in forms:
                    forms[layer_of(name)].append(form)
            part += 1
        self._forms[bits, sparsity, pattern] = forms
        return engine

    def _weight(
        self,
        program: _C.Program,
        part: int,
        number: int,
        bits: int,
        sparsity: float,
        pattern: str,
    ) -> bytes:
        """A layer's packed weight, narrower and with zeros; the same for the same arguments."""
        key = part, number, bits
        if key not in self._rounded:
            data = bytearray(program.constant_bytes(number))
            weight = ops.unpack_weight(torch.frombuffer(data, dtype=torch.uint8))
            self._rounded[key] = quantize_weight(weight.float(), bits)[0].numpy()
        levels = torch.from_numpy(self._rounded[key])
        if sparsity > 0:
            random = np.random.default_rng(bits)
            chance = random.random(size=tuple(levels.shape), dtype=np.float32)
            levels = levels * pattern_mask(torch.from_numpy(chance), sparsity, pattern)
        return bytes(ops.pack_weight(levels.to(torch.int8), bits).numpy())

    def _call(self, engine: Engine) -> float:
        other = self.beside
        found, usual = seconds_in_turn(
            [engine, other.engine], self.batch, self.threads, rounds=self.rounds
        )
        if other.reference is None:
            other.reference = 1e6 * usual
        return found / usual * other.reference


class TimesByWidth:
    """:class:`LayerTimes` with the usual inputs, and with inputs of fewer bits; made when needed.

    Args:
        make: those of some bits (``None``: the usual ones), beside those that they are timed with.
    """

    def __init__(self, make: Callable[[int | None, LayerTimes | None], LayerTimes]) -> None:
        self._make = make
        self._known: dict[int | None, LayerTimes] = {}

    def __call__(self, width: int | None = None) -> LayerTimes:
        """Of inputs of so many bits."""
        if width not in self._known:
            self._known[width] = self._make(width, None if width is None else self(None))
        return self._known[width]

    def same(self, width: int | None, bits: int, sparsity: float, pattern: str) -> set[str]:
        """Layers for which inputs of so many bits bring no other form.

        They take as long as with the usual ones: no luck or misfortune of a measurement decides
        about their bits.
        """
        if width is None:
            return set()
        usual = self(None).forms(bits, sparsity, pattern)
        forms = self(width).forms(bits, sparsity, pattern)
        return {name for name in usual if forms.get(name) == usual[name]}


def call_seconds(
    engine: Engine,
    batch: int = 1,
    threads: int | None = None,
    *,
    rounds: int = 15,
    seconds: float = 0.3,
) -> float:
    """Median seconds of one call with random inputs, warm.

    Args:
        engine: to be timed.
        batch: images per call.
        threads: default: those of ``ops.get_num_threads()``.
        rounds: timed calls at least.
        seconds: calls go on for so long.
    """
    return seconds_in_turn([engine], batch, threads, rounds=rounds, seconds=seconds)[0]


def seconds_in_turn(
    engines: Sequence[Engine],
    batch: int = 1,
    threads: int | None = None,
    *,
    rounds: int = 15,
    seconds: float = 0.3,
) -> list[float]:
    """The same for several engines, a few calls of each at a time: they meet the same machine.

    Args:
        engines: to be compared.
        batch, threads: as for :func:`call_seconds`.
        rounds: timed calls of each at least.
        seconds: of all calls of an engine together.
    """
    inputs = [[port.sample(batch, e.device) for port in e.inputs] for e in engines]
    samples: list[list[float]] = [[] for _ in engines]
    before = ops.get_num_threads()
    ops.set_num_threads(before if threads is None else threads)
    try:
        for engine, x in zip(engines, inputs, strict=True):
            engine.flat(x)  # the first call plans
        begin = time.perf_counter()
        wanted = seconds * len(engines)
        while len(samples[-1]) < rounds or time.perf_counter() - begin < wanted:
            for engine, x, found in zip(engines, inputs, samples, strict=True):
                engine.flat(x)
                for _ in range(TIMED):
                    start = time.perf_counter()
                    engine.flat(x)
                    found.append(time.perf_counter() - start)
    finally:
        ops.set_num_threads(before)
    return [statistics.median(found) for found in samples]


def layer_of(node: str) -> str:
    """The layer that a node stands for: its second call is named "layer#2"."""
    return node.split("#", 1)[0]


def _replaced(program: _C.Program, constants: Mapping[int, bytes]) -> _C.Program:
    """The program with other constants."""
    out = _C.Program()
    adders = constant_adders(out)
    for number, (kind, _) in enumerate(program.constants()):
        add, width = adders[kind]
        data = constants[number] if number in constants else program.constant_bytes(number)
        held = np.frombuffer(data, dtype=np.uint8)  # alive until it is copied
        add(held.ctypes.data, held.size // width)
    for value in program.values():
        out.add_value(*value)
    for node in program.nodes():
        out.add_node(*node)
    out.set_inputs(program.inputs())
    out.set_outputs(program.outputs())
    for key, text in program.metadata().items():
        out.set_metadata(key, text)
    out.validate()
    return out
