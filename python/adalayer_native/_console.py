"""Sentences and tables on a terminal or in a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["fail", "print_table", "say", "warn"]


def _print(text: str, label: str = "") -> None:
    from rich.console import Console
    from rich.markup import escape

    # Escaped: shapes such as [64, 3] are no markup. Not wrapped: a path that is cut cannot be
    # copied.
    Console(stderr=True, soft_wrap=True).print(f"{label}{escape(text)}", highlight=False)


def say(text: str) -> None:
    """A line on standard error."""
    _print(text)


def warn(text: str) -> None:
    """A warning on standard error."""
    _print(text, "[bold yellow]warning:[/] ")


def fail(text: str) -> None:
    """An error on standard error."""
    _print(text, "[bold red]error:[/] ")


def print_table(table: Table, console: Console | None = None) -> None:
    """A table in which no number is broken or cut; default: on standard output.

    Outside a terminal it is as wide as it needs to be. Where a terminal is too narrow, columns
    without room follow in another table below, which begins with the first column again.
    """
    from rich.console import Console

    console = Console() if console is None else console
    columns = range(len(table.columns))
    if not console.is_terminal:
        whole = _part(table, columns, wrap=False)
        console.width = max(console.width, _widths(console, whole)[1])
        whole.title, whole.caption = table.title, table.caption
        console.print(whole)
        return
    groups = [[0]]
    for column in columns[1:]:
        wider = _part(table, [*groups[-1], column])
        if len(groups[-1]) > 1 and _widths(console, wider)[0] > console.width:
            groups.append([0])
        groups[-1].append(column)
    for number, group in enumerate(groups):
        part = _part(table, group)
        part.title = table.title if number == 0 else None
        part.caption = table.caption if number + 1 == len(groups) else None
        console.print(part)


def _widths(console: Console, table: Table) -> tuple[int, int]:
    """The least width in which words stay whole, and that in which nothing wraps."""
    from rich.measure import Measurement

    table.title = table.caption = None  # they wrap between words
    found = Measurement.get(console, console.options.update(max_width=100_000), table)
    return found.minimum, found.maximum


def _part(table: Table, columns: list[int] | range, *, wrap: bool = True) -> Table:
    """Some columns of a table; those of numbers are as wide as their numbers.

    wrap: headings of more than one word may take more lines.
    """
    from rich.table import Table
    from rich.text import Text

    part = Table(title=table.title, caption=table.caption, box=table.box)
    chosen = [(table.columns[number], list(table.columns[number].cells)) for number in columns]
    for column, cells in chosen:
        width = None
        if column.justify == "right":
            words = str(column.header).split() if wrap else [str(column.header)]
            texts = [Text.from_markup(str(text)) for text in (*words, *cells)]
            width = max(text.cell_len for text in texts)
        part.add_column(column.header, justify=column.justify, width=width, overflow="fold")
    for place, row in enumerate(table.rows):
        part.add_row(*(cells[place] for _, cells in chosen), end_section=row.end_section)
    return part
