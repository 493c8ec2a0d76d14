"""Progress with rate and remaining time: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

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

__all__ = ["ProgressBar"]

# In a log file a bar is noise; a line this often (seconds) still shows that work goes on.
LOG_INTERVAL = 10.0


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
        self._note = ""
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressBar:
        self._start = self._last = time.monotonic()
        if not self.enabled:
            return self
        console = Console(stderr=True)
        if console.is_terminal:
            bar = Progress(
                TextColumn("{task.description}", table_column=_one_line()),
                BarColumn(bar_width=None),  # what the texts leave
                MofNCompleteColumn(table_column=_one_line()),
                _Rate(table_column=_one_line()),
                TimeElapsedColumn(table_column=_one_line()),
                TextColumn("left", table_column=_one_line()),
                TimeRemainingColumn(table_column=_one_line()),
                TextColumn("{task.fields[note]}", table_column=_one_line()),
                console=console,
                expand=True,
            )
            try:
                bar.start()
            except LiveError:
                self.enabled = False
                return self
            self._bar = bar
            self._task = bar.add_task(self.title, total=self.total, unit=self.unit, note="")
        return self

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Count ``steps`` more as done; ``note`` is shown behind the bar."""
        self.done += steps
        if note is not None:
            self._note = note
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, note=self._note)
        elif self.enabled and time.monotonic() - self._last >= LOG_INTERVAL:
            self._print()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.enabled and self.done:
            self._print()

    def _print(self) -> None:
        now = time.monotonic()
        self._last = now
        rate = self.done / max(now - self._start, 1e-9)
        text = f"{self.title}: {self.done}"
        if self.total is not None:
            text += f"/{self.total}"
        text += f", {rate:,.1f} {self.unit}/s, {now - self._start:.0f} s"
        if self.total is not None and self.done < self.total and rate > 0:
            text += f", {(self.total - self.done) / rate:.0f} s left"
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            text + (f", {self._note}" if self._note else ""), markup=False
        )
