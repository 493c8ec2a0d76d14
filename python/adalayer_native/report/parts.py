"""Pieces of the page: pictures in its own inks, boxes that scroll, tables that sort."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from html import escape
from typing import Any

from ..plot import style

__all__ = ["Cell", "heads", "picture", "row", "side", "wide"]

# What a row is sorted by, its HTML, and whether it is a number.
Cell = tuple[float | int | str | None, str, bool]
_INKS = {
    style.INK: "var(--ink)",
    style.MUTED: "var(--muted)",
    style.LINE: "var(--line)",
    style.PAPER: "var(--paper)",
}


def picture(name: str, title: str, draw: Callable[[], Any], more: str = "") -> str:
    """A section with a figure.

    Args:
        name: of the section.
        title: its heading.
        draw: makes the figure.
        more: a further class of its box.
    """
    svg = _inline(draw(), name)
    return (
        f'<section id="{name}"><h2>{title}</h2>{wide("picture", title)}'
        f'<div class="{more}" role="img" aria-label="{title}">{svg}</div></div></section>'
    )


# The script hides it where nothing is cut off.
_HINT = '<p class="hint muted">← scroll sideways for the rest →</p>'


def wide(kind: str, title: str) -> str:
    """Begins a box that scrolls in itself, by keyboard as well, and says so."""
    return f'{_HINT}<div class="wide {kind}" tabindex="0" role="region" aria-label="{title}">'


def _inline(figure: Any, name: str) -> str:
    """A figure as an SVG element in the page's own inks, its identifiers its own."""
    import matplotlib

    memory = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "adalayer"}):
        figure.savefig(memory, format="svg", metadata={"Date": None, "Creator": None})
    text = memory.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\sid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    for ink, variable in _INKS.items():
        text = text.replace(ink, variable)
    # The page sets the width; what matplotlib writes as points would win.
    head, _, rest = text.partition(">")
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest


def heads(columns: Iterable[tuple[str, bool]]) -> str:
    """Buttons that sort, as numbers or as texts."""
    return "".join(
        f'<th scope="col" class="{side(number)}" data-type="{side(number)}">'
        f'<button type="button">{escape(heading)}</button></th>'
        for heading, number in columns
    )


def side(number: bool) -> str:
    """The class of a cell, and how its column is sorted."""
    return "number" if number else "text"


def row(place: int, cells: Iterable[Cell]) -> str:
    """A table's row."""
    shown = "".join(
        f'<td class="{side(number)}" data-value="'
        f'{"" if value is None else escape(str(value), quote=True)}">{text}</td>'
        for value, text, number in cells
    )
    return f'<tr data-place="{place}">{shown}</tr>'
