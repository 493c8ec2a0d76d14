"""A job as a row of stages: which one runs, and about how long all of them will take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Job", "Stage", "current", "job", "stage"]

# A stage that ends sooner (seconds) was read from the files of an earlier run, and says nothing
# about how fast this machine is.
REAL = 1.0
# Part of a stage that has to be done before its own speed counts.
KNOWN = 0.05


class Stage(NamedTuple):
    """A part of a job.

    Attributes:
        name: a few words.
        work: how much of it there is beside the other stages, in any unit.
        bars: how many progress bars it shows.
    """

    name: str
    work: float
    bars: int = 1


@dataclass
class Job:
    """Stages, the one that runs, and the seconds of those before it.

    Attributes:
        stages: in their order.
        number: of the stage that runs, from 0; -1 before the first.
        seconds: of the stages that are done, by their number.
        started: when the stage began.
        bars: progress bars that the stage has finished.
        bar: how far the open one is, from 0 to 1.
    """

    stages: Sequence[Stage]
    number: int = -1
    seconds: dict[int, float] = field(default_factory=dict)
    started: float = 0.0
    bars: int = 0
    bar: float = 0.0

    def begin(self, name: str) -> bool:
        """Enter the stage of that name; false where the job has none."""
        numbers = [k for k, each in enumerate(self.stages) if each.name == name]
        if not numbers:
            return False
        self.number, self.started, self.bars, self.bar = numbers[0], time.monotonic(), 0, 0.0
        return True

    def end(self) -> None:
        """Leave it."""
        self.seconds[self.number] = time.monotonic() - self.started

    @property
    def done(self) -> float:
        """How far the stage is, from 0 to 1: as if all of its bars were alike."""
        bars = max(self.stages[self.number].bars, self.bars + 1)
        return (self.bars + self.bar) / bars

    @property
    def place(self) -> str:
        """``"stage 2 of 5"``; empty before the first."""
        return "" if self.number < 0 else f"stage {self.number + 1} of {len(self.stages)}"

    def left(self) -> float | None:
        """Seconds until all stages are done, about; ``None`` as long as nothing is known.

        What follows is taken to be as fast for its work as what has been done.
        """
        if self.number < 0:
            return None
        now = time.monotonic() - self.started
        done, own = self.done, self.stages[self.number].work
        seconds = {k: s for k, s in self.seconds.items() if s >= REAL}
        work = sum(self.stages[k].work for k in seconds)
        spent = sum(seconds.values())
        if now >= REAL and done >= KNOWN:
            work, spent = work + own * done, spent + now
        if work <= 0 or spent <= 0:
            return None
        later = sum(each.work for each in self.stages[self.number + 1 :])
        if done >= KNOWN and now >= REAL:
            return now / done * (1 - done) + later * spent / work
        return (own * (1 - done) + later) * spent / work


_job: Job | None = None


def current() -> Job | None:
    """The job that runs, if any."""
    return _job


@contextmanager
def job(stages: Sequence[Stage]) -> Iterator[Job]:
    """Announce stages; within another job, whose stages these are a part of, nothing changes."""
    global _job
    if _job is not None:
        yield _job
        return
    _job = Job(stages)
    try:
        yield _job
    finally:
        _job = None


@contextmanager
def stage(name: str) -> Iterator[Job | None]:
    """What runs inside is the stage of that name; ``None`` where no job has announced it."""
    running = _job
    if running is None or not running.begin(name):
        yield None
        return
    yield running
    running.end()
