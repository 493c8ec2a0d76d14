"""Progress with rate and remaining time: a bar on a terminal, a line now and then elsewhere.

Where a bar is part of a job of several stages (:mod:`._stages`) it says so, and how much time is
left in all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.errors import LiveError
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from ._console import say
from ._stages import Job, current
from ._stages import stage as enter

__all__ = ["ProgressBar", "duration", "stage"]

# In a log file a bar is noise; a line this often (seconds) still shows that work goes on.
LOG_INTERVAL = 10.0
WIDE = 120  # columns of a terminal in which everything has room


def duration(seconds: float) -> str:
    """``"40 s"``, ``"12 min"`` or ``"3 h 20 min"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def in_all(job: Job) -> str:
    """``"stage 2 of 5, about 12 min left in all"``."""
    left = job.left()
    return job.place + ("" if left is None else f", about {duration(left)} left in all")


@contextmanager
def stage(name: str, *, enabled: bool = True) -> Iterator[None]:
    """A stage of the job that runs; one line says that it begins."""
    with enter(name) as job:
        if job is not None and enabled:
            say(f"{name} ({in_all(job)})")
        yield


def _one_line() -> Column:
    # A bar that wraps jumps up and down with every change of a number.
    return Column(no_wrap=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "it")
        return Text("" if speed is None else f"{speed:,.1f} {unit}/s", style="progress.data.speed")


class ProgressBar:
    """Context manager: ``with ProgressBar("decoding", total, unit="image") as bar: bar.advance()``.

    Writes to standard error. ``enabled=False`` is silent. Inside another live display, which
    rich may not allow to nest, it is silent too.

    Args:
        title: what is going on.
        total: number of steps, ``None`` where it is not known.
        unit: what a step is.
        enabled: false for silence.
    """

    def __init__(
        self, title: str, total: int | None, *, unit: str = "it", enabled: bool = True
    ) -> None:
        self.title, self.total, self.unit, self.enabled = title, total, unit, enabled
        self.done = 0
        self._printed = -1
        self._job: Job | None = None
        self._note = ""
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressBar:
        self._start = self._last = time.monotonic()
        self._job = current() if self.enabled else None
        if not self.enabled:
            return self
        console = Console(stderr=True)
        if console.is_terminal:
            # Where there is little room, no number is cut: speed and time until now are left out.
            wide = [_Rate(table_column=_one_line()), TimeElapsedColumn(table_column=_one_line())]
            bar = Progress(
                TextColumn("{task.description}", table_column=_one_line()),
                BarColumn(bar_width=None),  # what the texts leave
                MofNCompleteColumn(table_column=_one_line()),
                *(wide if console.width >= WIDE else ()),
                TextColumn("left", table_column=_one_line()),
                TimeRemainingColumn(table_column=_one_line()),
                TextColumn("{task.fields[whole]}", table_column=_one_line()),
                TextColumn("{task.fields[note]}", table_column=_one_line()),
                console=console,
                expand=True,
            )
            try:
                bar.start()
            except LiveError:
                self.enabled, self._job = False, None
                return self
            self._bar = bar
            title = self.title
            if self._job is not None and self._job.number >= 0:
                title = f"{self._job.number + 1}/{len(self._job.stages)} {title}"
            self._task = bar.add_task(
                title, total=self.total, unit=self.unit, note="", whole=self._whole()
            )
        return self

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Count ``steps`` more as done, which may be none; ``note`` is shown behind the bar."""
        self.done += steps
        if note is not None:
            self._note = note
        if self._job is not None and self.total:
            self._job.bar = min(1.0, self.done / self.total)
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, note=self._note, whole=self._whole())
        elif self.enabled and time.monotonic() - self._last >= LOG_INTERVAL:
            self._print()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None and self.total is not None and self.done < self.total:
            self.total = self.done  # what was left was not needed
            if self._bar is not None:
                self._bar.update(self._task, total=self.total)
        if self._job is not None:
            self._job.bars, self._job.bar = self._job.bars + 1, 0.0
        if self._bar is not None:
            self._bar.stop()
        elif self.enabled and self.done and self._printed != self.done:
            self._print()

    def _whole(self) -> str:
        """What is left of the job that this is a part of."""
        left = None if self._job is None else self._job.left()
        return "" if left is None else f"in all {duration(left)}"

    def _print(self) -> None:
        now = time.monotonic()
        self._last, self._printed = now, self.done
        rate = self.done / max(now - self._start, 1e-9)
        text = f"{self.title}: {self.done:,}"
        if self.total is not None:
            text += f"/{self.total:,}"
        text += f", {rate:,.1f} {self.unit}/s, {duration(now - self._start)}"
        if self.total is not None and self.done < self.total and rate > 0:
            text += f", {duration((self.total - self.done) / rate)} left"
        if self._job is not None and self._job.number >= 0:
            text += f" ({in_all(self._job)})"
        say(text + (f", {self._note}" if self._note else ""))
