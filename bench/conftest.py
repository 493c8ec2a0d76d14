"""Fixtures of the benchmarks: candidates in turns, results kept, targets judged at the end."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import adalayer_native as ada
from bench.interleave import Comparison, Sampler, on_cpus, place, rounds, schedule
from bench.record import RESULTS, Figure, Results, Target, describe_machine
from bench.report import comparison_lines

# Engines are planned in the process that times them, not by an earlier, perhaps busier one.
os.environ.setdefault("ADALAYER_PLAN_CACHE", "off")


class Replay:
    """A clock for pytest-benchmark: it shows the samples that were already taken, one by one.

    All candidates are timed by one piece of code, in turns; pytest-benchmark then makes its
    statistics of one of them from the same samples.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._waiting: list[float] = []

    def load(self, seconds: Iterable[float]) -> None:
        """The durations of the coming calls of :meth:`step`."""
        self._waiting = list(seconds)[::-1]

    def now(self) -> float:
        """The time of this clock."""
        return self._now

    def step(self) -> None:
        """Lets the next duration pass."""
        if self._waiting:
            self._now += self._waiting.pop()


REPLAY = Replay()


def replay_clock() -> float:
    """pytest-benchmark names its timer in the JSON that it writes."""
    return REPLAY.now()


class Bench:
    """What a benchmark uses; one per session."""

    def __init__(self, results: Results, scale: float) -> None:
        self.results = results
        self.scale = scale
        self.names: list[str] = []

    @contextlib.contextmanager
    def cores(self, threads: int) -> Iterator[None]:
        """Everything inside runs on ``threads`` CPUs, torch and the native kernels too."""
        before = torch.get_num_threads()
        with on_cpus(threads):
            torch.set_num_threads(threads)
            try:
                yield
            finally:
                torch.set_num_threads(before)

    def keep(self, comparison: Comparison, targets: Iterable[Target] = ()) -> None:
        """Adds a comparison that was measured elsewhere."""
        self.results.add(comparison, targets)
        self.names.append(comparison.name)

    def compare(
        self,
        name: str,
        candidates: Mapping[str, Callable[[], Any]],
        *,
        threads: int,
        seconds: float,
        side: Iterable[str] = (),
        targets: Iterable[Target] = (),
        cold: Callable[[], Any] | None = None,
        info: Mapping[str, Any] | None = None,
        least: int = 7,
    ) -> Comparison:
        """Times the candidates in turns and keeps all samples.

        Args:
            side: candidates that may take part in fewer rounds.
            cold: see :class:`bench.interleave.Sampler`.
        """
        comparison = measure(
            name,
            candidates,
            threads=threads,
            seconds=seconds * self.scale,
            side=side,
            cold=cold,
            info=info,
            least=least,
        )
        self.keep(comparison, targets)
        return comparison

    def figure(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        **info: Any,
    ) -> None:
        """Keeps a single value."""
        self.results.figures[name] = Figure(name, value, unit, at_most, at_least, info)
        self.names.append(name)


def measure(
    name: str,
    candidates: Mapping[str, Callable[[], Any]],
    *,
    threads: int,
    seconds: float,
    side: Iterable[str] = (),
    cold: Callable[[], Any] | None = None,
    info: Mapping[str, Any] | None = None,
    least: int = 7,
) -> Comparison:
    """The candidates' samples; garbage is collected before, not meanwhile."""
    every = set(candidates) - set(side)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        place(threads)
        sampler = Sampler(candidates, threads, cold=cold)
        plan = schedule(sampler, every, seconds, least=least)
        for chosen in rounds(plan, candidates, every):
            for candidate in chosen:
                sampler.turn(candidate)
    finally:
        if collecting:
            gc.enable()
    return Comparison(name, threads, sampler.samples, dict(info or {}))


# --------------------------------------------------------------------------------------- pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("adalayer benchmarks")
    group.addoption("--strict-targets", action="store_true", help="a missed target fails the run")
    group.addoption("--results", type=Path, default=RESULTS, help="JSON file of the samples")
    group.addoption("--keep", action="store_true", help="add to that file instead of replacing it")
    group.addoption("--scale", type=float, default=1.0, help="factor on the measuring time")
    group.addoption("--seeds", default="0,1", help="seeds of the randomly generated networks")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", [int(s) for s in metafunc.config.option.seeds.split(",")])


BENCH = pytest.StashKey[Bench]()


def pytest_configure(config: pytest.Config) -> None:
    # A test that fails before it measures has one message, not two.
    unused = "ignore::pytest_benchmark.logger.PytestBenchmarkWarning"
    config.addinivalue_line("filterwarnings", unused)
    option = config.option
    results = Results(machine=describe_machine())
    if option.results.is_file():
        earlier = Results.load(option.results)
        if earlier.machine == results.machine:
            results = earlier if option.keep else Results(results.machine)
            results.probe_floor = earlier.fastest_probe()
        elif option.keep:
            raise pytest.UsageError(
                f"{option.results} is of another machine or other versions: {earlier.machine}"
            )
    config.stash[BENCH] = Bench(results, option.scale)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "turns" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=replay_clock))


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """The session's collector; kernels are set back afterwards."""
    yield request.config.stash[BENCH]
    ada.ops.force_isa("auto")


@pytest.fixture
def turns(benchmark: Any, bench: Bench) -> Callable[..., Comparison]:
    """:meth:`Bench.compare`, with the first candidate handed to pytest-benchmark too."""

    def run(name: str, candidates: Mapping[str, Callable[[], Any]], **options: Any) -> Comparison:
        comparison = bench.compare(name, candidates, **options)
        first = next(iter(candidates))
        seconds = [s.seconds for s in comparison.samples[first]]
        benchmark.group = name.split("/")[0]
        benchmark.extra_info.update(candidate=first)
        REPLAY.load(seconds)
        benchmark.pedantic(REPLAY.step, rounds=len(seconds), iterations=1)
        return comparison

    return run


_STARTED = time.monotonic()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    bench = session.config.stash[BENCH]
    if bench.names:
        bench.results.save(session.config.option.results)
    strict = session.config.option.strict_targets
    if strict and exitstatus == pytest.ExitCode.OK and bench.results.missed():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    bench = config.stash[BENCH]
    if not bench.names:
        return
    write = terminalreporter.write_line
    terminalreporter.section("medians of samples taken in turns")
    for name in bench.names:
        if name in bench.results.comparisons:
            for line in comparison_lines(bench.results, name):
                write(line)
        else:
            figure = bench.results.figures[name]
            write(f"{name}: {figure.value:.4g} {figure.unit}")
    missed = bench.results.missed()
    total = len(bench.results.verdicts())
    total += sum(f.met is not None for f in bench.results.figures.values())
    terminalreporter.section(f"{total - len(missed)} of {total} targets reached")
    for line in missed:
        write("missed: " + line, yellow=True)
    write(f"samples in {config.option.results}; {time.monotonic() - _STARTED:.0f} s")
