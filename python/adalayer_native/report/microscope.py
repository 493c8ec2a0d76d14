"""The page's tab about what quantization does to every layer."""

from __future__ import annotations

import math
from html import escape

from .. import plot
from ..microscope import Comparison, Row, Suggestion
from ..microscope.result import decibels, interval, number, width
from .parts import Cell, heads, picture, row, wide

__all__ = ["panel"]

_HEADS = (
    ("layer", False), ("bits / input", True), ("SNR dB", True), ("own", True), ("weights", True),
    ("inputs", True), ("cosine", True), ("clipped %", True), ("calibrated", True),
    ("observed", True), ("finding", False),
)  # fmt: skip
_CHANGES = (
    ("layer", False), ("change", False), ("more bytes", True), ("error before", True),
    ("after", True), ("recovered %", True),
)  # fmt: skip
_WORDS = (
    "Signal to noise in dB: with the inputs that the compressed network has; own: with the float "
    "network's inputs; weights and inputs: of rounding those alone. Worst own first. Clipped is "
    "what of the float network's values lies beyond the grid."
)


def panel(found: Comparison | None) -> str:
    """The tab's HTML; a sentence where the run was not compared."""
    if found is None:
        return (
            '<section id="microscope"><h2>Microscope</h2><p class="muted">Not part of this run: '
            "adalayer compare looks for the layers that lost accuracy.</p></section>"
        )
    tall = " tall" if len(found.rows) > 20 else ""
    body = "".join(_row(place, each) for place, each in enumerate(found.rows))
    parts = [
        '<div id="microscope">',
        picture("layers-picture", "What quantization does", lambda: plot.microscope(found)),
        *_suggestions(found),
        f"<section><h2>Errors, layer by layer</h2><p>{escape(_sentence(found))}</p>"
        f"{wide('table' + tall, 'Errors, layer by layer')}"
        f'<table id="errors" class="sortable"><thead><tr>{heads(_HEADS)}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="muted">{escape(_WORDS)}</p></section>',
        "</div>",
    ]
    return "\n".join(parts)


def _sentence(found: Comparison) -> str:
    text = f"{found.summary()}."
    if found.engine is not None:
        share = 100 * (found.engine["equal"] or 0.0)
        text += f" {share:.4g} % of the engine's results have the bits of the torch modules."
    return text + (f" {found.note[:1].upper()}{found.note[1:]}." if found.note else "")


def _row(place: int, each: Row) -> str:
    def noise(error: float | None) -> Cell:
        value = decibels(error)
        finite = value if value is None or math.isfinite(value) else math.copysign(1e9, value)
        return finite, number(value), True

    clipped = None if each.clipped is None else 100 * each.clipped
    return row(
        place,
        [
            (each.name, escape(each.name), False),
            (each.bits or each.input_bits or 32, width(each), True),
            *map(noise, (each.accumulated, each.own, each.weights, each.activations)),
            (each.cosine, f"{each.cosine:.4f}", True),
            (clipped, number(clipped, ".2f"), True),
            (each.calibrated and each.calibrated[1], interval(each.calibrated), True),
            (each.observed[1], interval(each.observed), True),
            (each.finding, escape(each.finding), False),
        ],
    )


def _suggestions(found: Comparison) -> list[str]:
    if not found.suggestions:
        return []
    items = [*found.suggestions, *([found.together] if found.together else [])]
    body = "".join(_change(place, item) for place, item in enumerate(items))
    title = "What would recover most"
    return [
        f"<section><h2>{title}</h2><p>Each change was made in a copy, and its effect measured on "
        f"{found.judging} samples that it was not chosen by.</p>{wide('table', title)}"
        f'<table id="changes" class="sortable"><thead><tr>{heads(_CHANGES)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    ]


def _change(place: int, item: Suggestion) -> str:
    return row(
        place,
        [
            (item.name, escape(item.name), False),
            (item.text, escape(item.text), False),
            (item.bytes, f"{item.bytes:,}", True),
            (item.before, f"{item.before:.3g}", True),
            (item.after, f"{item.after:.3g}", True),
            (item.recovered, f"{100 * item.recovered:.1f}", True),
        ],
    )
