"""Fair timing of several candidates on a machine with noisy neighbours.

Candidates take turns in one process. A turn is: a pause until the thread pools of the others have
gone to sleep, a probe of the cores, untimed calls of the candidate's own, timed calls, a pause, a
probe. The probe is a fixed AMX computation (:func:`adalayer_native._C.probe_cores`) of about 30 µs.
On a core that shares its units with a busy neighbour it takes two to three times as long, and so it
tells the state of the cores during the sample: samples are compared with samples of that state.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adalayer_native import _C

# As the process was started.
ALL_CPUS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
# How much longer than its fastest a probe of a contended core takes at least.
CONTENDED = 1.7
# A state with fewer samples than this is not compared.
ENOUGH = 5
# Idle workers spin before they sleep: libgomp's for 7 to 15 ms after a torch operator, TBB's for 1.
LONGEST_PAUSE = 0.03
# Untimed and timed calls of a turn take about this long in all, but are one each at least. After a
# pause the cores need milliseconds to be warm again, so the untimed ones get more.
UNTIMED, TIMED = 3e-3, 1e-3
STATES = ("fast", "contended")


@contextlib.contextmanager
def on_cpus(threads: int) -> Iterator[None]:
    """Restricts every thread of the process to ``threads`` CPUs.

    With one thread the probe then runs where the sample runs, and a candidate cannot put part of
    its work on another core.
    """
    place(threads)
    try:
        yield
    finally:
        place(len(ALL_CPUS))


def place(threads: int) -> None:
    """Puts every thread of the process on the same ``threads`` CPUs, also those that a library
    has placed elsewhere."""
    # The last CPUs: the first one serves most of the interrupts.
    cpus = set(sorted(ALL_CPUS)[-threads:])
    if not cpus:
        return
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cpus)


def probe(threads: int) -> float:
    """Seconds that the slowest of ``threads`` cores needs for the fixed computation now."""
    return _C.probe_cores(threads)[0]


def wait_for_idle_pools() -> None:
    """Sleeps until no thread of this process uses a CPU any more, 30 ms at most."""
    deadline = time.perf_counter() + LONGEST_PAUSE
    while time.perf_counter() < deadline:
        start, used = time.perf_counter(), time.process_time()
        time.sleep(1e-3)
        if time.process_time() - used < 0.2 * (time.perf_counter() - start):
            return


@dataclass(frozen=True)
class Sample:
    """Mean seconds per call of one turn, and the probes before and after it."""

    seconds: float
    before: float
    after: float

    def state(self, fastest_probe: float) -> str:
        """``fast``, ``contended``, or ``mixed`` where the two probes disagree."""
        slow = [p > CONTENDED * fastest_probe for p in (self.before, self.after)]
        return "mixed" if slow[0] != slow[1] else STATES[slow[0]]


@dataclass
class Comparison:
    """Candidates that took turns, with all their samples."""

    name: str
    threads: int
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def fastest_probe(self) -> float:
        """A low percentile of the probes, so that one lucky reading does not set the scale."""
        times = sorted(p for s in self.samples.values() for x in s for p in (x.before, x.after))
        return times[len(times) // 50] if times else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a sample is [µs per call, probe before, probe after]."""
        samples = {
            name: [[float(f"{1e6 * t:.5g}") for t in (s.seconds, s.before, s.after)] for s in rows]
            for name, rows in self.samples.items()
        }
        return {"name": self.name, "threads": self.threads, "samples": samples, "info": self.info}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        """Inverse of :meth:`to_dict`."""
        samples = {
            name: [Sample(*(1e-6 * t for t in row)) for row in rows]
            for name, rows in data["samples"].items()
        }
        return cls(data["name"], data["threads"], samples, dict(data["info"]))


@dataclass(frozen=True)
class Spread:
    """Median and quartiles in seconds."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Of at least one value."""
        ordered = sorted(values)
        if not ordered:
            return None
        if len(ordered) == 1:
            return cls(ordered[0], ordered[0], ordered[0], 1)
        low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(median, low, high, len(ordered))


def spreads(comparison: Comparison, fastest_probe: float) -> dict[str, dict[str, Spread]]:
    """Per candidate the spread in each state that occurred, and over ``all`` samples."""
    result: dict[str, dict[str, Spread]] = {}
    for name, samples in comparison.samples.items():
        groups: dict[str, list[float]] = {"all": [s.seconds for s in samples]}
        for sample in samples:
            groups.setdefault(sample.state(fastest_probe), []).append(sample.seconds)
        result[name] = {k: s for k, v in groups.items() if (s := Spread.of(v)) is not None}
    return result


@dataclass(frozen=True)
class Ratio:
    """Median of the fastest peer over the median of ours, in one state."""

    state: str
    value: float
    peer: str


def ratios(
    table: Mapping[str, Mapping[str, Spread]], ours: str, peers: Iterable[str]
) -> dict[str, Ratio]:
    """Ratio in each state where ours and every peer have enough samples; always over ``all``.

    The states say which comparison is like with like; ``all`` mixes them.
    """
    peers = [p for p in peers if p in table]
    found: dict[str, Ratio] = {}
    if ours not in table or not peers:
        return found
    for state in (*STATES, "all"):
        needed = 1 if state == "all" else ENOUGH
        rows = [table[name].get(state) for name in (ours, *peers)]
        if any(row is None or row.count < needed for row in rows):
            continue
        best = min(peers, key=lambda p: table[p][state].median)
        found[state] = Ratio(state, table[best][state].median / table[ours][state].median, best)
    return found


def headline(found: Mapping[str, Ratio]) -> Ratio | None:
    """The ratio that a target is judged by: fast cores, else contended ones, else all samples."""
    return next((found[state] for state in (*STATES, "all") if state in found), None)


# ------------------------------------------------------------------------------------ sampling


class Sampler:
    """Takes turns between candidates.

    Args:
        candidates: what to call, by name.
        threads: how many cores the candidates use, and the probe with them.
        cold: called between the untimed call and the timed one, of which a turn then has one
            each; it should push the weights out of the caches.
        pause: what to do before a turn; default: :func:`wait_for_idle_pools` where the candidates
            use several threads, else nothing.
    """

    def __init__(
        self,
        candidates: Mapping[str, Callable[[], Any]],
        threads: int,
        *,
        cold: Callable[[], Any] | None = None,
        pause: Callable[[], Any] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        probe: Callable[[int], float] = probe,
    ) -> None:
        self.candidates = dict(candidates)
        self.threads = threads
        self.cold = cold
        self.pause = wait_for_idle_pools if pause is None and threads > 1 else pause
        self.samples: dict[str, list[Sample]] = {name: [] for name in self.candidates}
        self._clock, self._probe = clock, probe
        self._open: dict[str, float] = {}
        self._call_seconds: dict[str, float] = {}
        for name, run in self.candidates.items():
            run()
            run()
            start = clock()
            run()
            self._call_seconds[name] = clock() - start

    def calls(self, name: str) -> tuple[int, int]:
        """(untimed, timed) calls of a turn: one of each, several where they are short.

        A call beyond 0.2 s outlasts every cache and needs no untimed one before it.
        """
        if self.cold is not None:
            return 1, 1
        seconds = max(self._call_seconds[name], 1e-7)
        return (
            0 if seconds > 0.2 else max(1, min(100, round(UNTIMED / seconds))),
            max(1, min(50, round(TIMED / seconds))),
        )

    def turn_seconds(self, name: str) -> float:
        """What a turn of a candidate is expected to take."""
        pause = LONGEST_PAUSE / 3 if self.pause else 0.0
        return pause + sum(self.calls(name)) * self._call_seconds[name] + 2e-4

    def open(self, name: str) -> None:
        """The part of a turn before the timed calls."""
        if self.pause is not None:
            self.pause()
        self._open[name] = self._probe(self.threads)
        run = self.candidates[name]
        for _ in range(self.calls(name)[0]):
            run()
        if self.cold is not None:
            self.cold()

    def close(self, name: str) -> None:
        """The timed calls and the probe after them; keeps the sample."""
        run, count = self.candidates[name], self.calls(name)[1]
        start = self._clock()
        for _ in range(count):
            run()
        seconds = (self._clock() - start) / count
        if self.pause is not None:
            self.pause()  # the candidate's own spinning workers would slow the probe down
        after = self._probe(self.threads)
        self.samples[name].append(Sample(seconds, self._open.pop(name), after))

    def turn(self, name: str) -> None:
        """One sample of one candidate."""
        self.open(name)
        self.close(name)


@dataclass(frozen=True)
class Schedule:
    """``rounds`` rounds; candidates outside ``every`` take part in each ``cadence``-th only."""

    rounds: int
    cadence: int


def schedule(
    sampler: Sampler, every: Iterable[str], seconds: float, *, least: int = 7, most: int = 60
) -> Schedule:
    """Spends about ``seconds``: two thirds on the candidates that are compared in every round.

    The others (slow ones that no target is stated against) get at least three samples each.
    """
    every = set(every)
    main = sum(sampler.turn_seconds(n) for n in sampler.candidates if n in every)
    side = sum(sampler.turn_seconds(n) for n in sampler.candidates if n not in every)
    share = seconds * (2 / 3 if side else 1.0)
    rounds = max(least, min(most, int(share / max(main, 1e-6))))
    cadence = 1
    if side:
        affordable = max(3, int((seconds - share) / side))
        cadence = max(1, rounds // affordable)
    return Schedule(rounds, cadence)


def rounds(plan: Schedule, names: Iterable[str], every: Iterable[str]) -> Iterator[list[str]]:
    """Who takes turns in each round, in an order that is drawn anew every time."""
    every, names = set(every), list(names)
    draw = random.Random(0)
    for index in range(plan.rounds):
        chosen = [n for n in names if n in every or index % plan.cadence == 0]
        draw.shuffle(chosen)
        yield chosen
