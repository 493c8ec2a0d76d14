"""One page about a run: everything is inside the file, nothing is asked from elsewhere."""

from __future__ import annotations

import os
from html import escape
from importlib.resources import files
from typing import Any

from matplotlib.colors import to_hex

from .. import plot
from .._files import write_text_atomic
from ..plan import protected_text
from ..plot import style
from .columns import COLUMNS, fitted_text, notes, summary, total_of
from .microscope import panel
from .parts import Cell, heads, picture, side, wide
from .parts import row as row_of
from .run import ClassRow, Layer, Run

__all__ = ["page", "write_page"]

# Nothing from outside can load even if a text in the run tried to.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_page(run: Run, path: str | os.PathLike[str]) -> None:
    """Write the page; the file is replaced as a whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_text_atomic(path, page(run))


def page(run: Run) -> str:
    """The HTML document."""
    title = f"{run.data['model']}: {run.data['method']}"
    assets = files(__package__)
    css, script = ((assets / f"page.{end}").read_text(encoding="utf-8") for end in ("css", "js"))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title><style>{css}</style></head><body>",
        f"<header><h1>{escape(title)}</h1>",
        f'<p class="muted">{escape(_budget(run))}</p></header>',
        _cards(run),
        _TABS if run.comparison is not None else "",
        '<div id="plan">',
        *_pictures(run),
        _table(run),
        _levels(run),
        *_classes(run),
        _facts(run),
        "</div>",
        panel(run.comparison),
        f"<script>{script}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"


# Hidden without scripts: then the one part stands below the other.
_TABS = (
    '<nav role="tablist" aria-label="parts of the report" hidden>'
    '<button type="button" role="tab" id="tab-plan" aria-controls="plan">Plan</button>'
    '<button type="button" role="tab" id="tab-microscope" aria-controls="microscope">Microscope'
    "</button></nav>"
)


def _budget(run: Run) -> str:
    budget = run.data.get("budget")
    layers = len(run.layers)
    return f"{layers} layers" + (f"; budget: {budget}" if budget else "")


def _cards(run: Run) -> str:
    cards = "".join(
        f'<div class="card"><span>{escape(what)}</span><b>{escape(figure)}</b>'
        f"<span>{escape(against)}</span></div>"
        for figure, what, against in summary(run)
    )
    return f'<section class="cards" id="summary">{cards}</section>'


def _levels(run: Run) -> str:
    """What every level of quality is; nothing where there is one."""
    rows = run.data.get("levels") or []
    if not rows:
        return ""
    head = "".join(
        f'<th scope="col" class="number">{text}</th>'
        for text in ("level", "average bits", "accuracy %", "ms per image, engine")
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="number">{escape(text)}</td>'
            for text in (
                str(level),
                f"{row['average_bits']:.2f}",
                f"{row['accuracy']:.2f}",
                f"{row['engine_ms']:.3f}" if "engine_ms" in row else "",
            )
        )
        + "</tr>"
        for level, row in enumerate(rows)
    )
    return (
        '<section id="levels"><h2>Levels of quality</h2><p class="muted">One file: '
        "the levels read planes of the same stored weights.</p><table><thead><tr>"
        f"{head}</tr></thead><tbody>{body}</tbody></table></section>"
    )


def _pictures(run: Run) -> list[str]:
    flops = {layer.name: layer.flops for layer in run.layers}
    plan, data = run.plan, run.data
    found = [
        picture("ribbon", "Architecture ribbon", lambda: plot.ribbon(plan)),
        picture("fingerprints", "Layer fingerprints", lambda: plot.fingerprint(plan, flops=flops)),
        picture("bars", "Parameters before and after", lambda: plot.bars(plan)),
    ]
    frontier = data.get("frontier")
    if frontier:
        chosen = {"name": "this plan", "size": data["bytes"] / data["float_bytes"]}
        found.append(
            picture(
                "frontier", "Pareto frontier", lambda: plot.pareto(frontier, chosen=chosen), "small"
            )
        )
    else:
        found.append(
            '<section id="frontier"><h2>Pareto frontier</h2><p class="muted">Not part of this run: '
            "adalayer compress --frontier measures it.</p></section>"
        )
    return found


def _table(run: Run) -> str:
    head = heads((column.heading, column.number) for column in COLUMNS)
    body = "".join(_row(place, layer) for place, layer in enumerate(run.layers))
    foot = "".join(
        f'<td class="{side(column.number)}">{escape(total_of(column, run)) if k else "total"}</td>'
        for k, column in enumerate(COLUMNS)
    )
    widths = sorted({layer.bits for layer in run.layers if layer.bits is not None})
    options = '<option value="">all bits</option>' + "".join(
        f'<option value="{bits}">{bits} bits</option>' for bits in widths
    )
    if any(layer.bits is None for layer in run.layers):
        options += '<option value="float">float</option>'
    return (
        '<section><h2>Layer by layer</h2><div class="tools">'
        f'<input id="filter" type="search" placeholder="{_filtered(run)}" '
        f'aria-label="show the layers with these words in {_filtered(run)}">'
        f'<select id="bits" aria-label="bits">{options}</select>'
        '<span id="count" class="muted" aria-live="polite"></span></div>'
        f'{wide("table", "Layer by layer")}<table id="layers" class="sortable">'
        f"<thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody><tfoot><tr>{foot}</tr></tfoot></table></div>"
        f'<p class="muted">{escape(notes(run))}.</p></section>'
    )


def _filtered(run: Run) -> str:
    """What the filter looks at in this run's layers."""
    places = ["name"]
    if any(layer.sparsity for layer in run.layers):
        places.append("pattern of zeros")
    if any(layer.kernel for layer in run.layers):
        places.append("kernel")
    *most, last = places
    return f"{', '.join(most)} or {last}" if most else f"{last} of the layer"


_CLASS_HEADS = (
    ("class", False),
    ("test images", True),
    ("float %", True),
    ("compressed %", True),
    ("change", True),
)


def _classes(run: Run) -> list[str]:
    """Accuracy class by class, where the run knows it."""
    if not run.classes:
        return []
    body = "".join(_class_row(place, row) for place, row in enumerate(run.classes))
    tall = " tall" if len(run.classes) > 20 else ""
    return [
        f"<section><h2>Class by class</h2>{wide('table' + tall, 'Class by class')}"
        f'<table id="classes" class="sortable"><thead><tr>{heads(_CLASS_HEADS)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    ]


def _class_row(place: int, row: ClassRow) -> str:
    known = row.before is not None and row.after is not None
    change = row.after - row.before if known else None  # type: ignore[operator]
    cells: list[Cell] = [
        (row.name, escape(row.name), False),
        (row.images, f"{row.images:,}", True),
        *(
            (value, "" if value is None else f"{value:.2f}", True)
            for value in (row.before, row.after)
        ),
        (change, "" if change is None else f"{change:+.2f}", True),
    ]
    return row_of(place, cells)


def _row(place: int, layer: Layer) -> str:
    bits = "float" if layer.bits is None else str(layer.bits)
    cells = []
    for column in COLUMNS:
        value, shown = column.value(layer), escape(column.show(layer))
        if column.heading == "bits":
            ink = "#ffffff" if style.is_dark(layer.bits) else "#101010"
            colour = to_hex(style.colour_of(layer.bits))
            shown = f'<span class="bits" style="background:{colour};color:{ink}">{shown}</span>'
        sort = "" if value is None else escape(str(value), quote=True)
        cells.append(f'<td class="{side(column.number)}" data-value="{sort}">{shown}</td>')
    # Not the kind: whoever looks for "conv2" does not mean every conv2d.
    search = escape(f"{layer.name} {layer.pattern if layer.sparsity else ''} {layer.kernel}")
    return (
        f'<tr data-place="{place}" data-bits="{bits}" data-search="{search}">{"".join(cells)}</tr>'
    )


def _facts(run: Run) -> str:
    data = run.data
    facts = [
        ("method", data["method"]),
        ("hyper-parameters", ", ".join(f"{k} = {v:g}" for k, v in data.get("hyper", {}).items())),
        ("fine-tuning", _epochs(data)),
        ("seed", data.get("seed")),
        ("test images", data.get("test_images")),
        ("instruction set", data["isa"]),
        ("threads", data["threads"]),
        ("no engine", data.get("engine", {}).get("why")),
        *_float_rest(data),
        ("protected", protected_text(run.plan)),
        ("model fitted to the layers", fitted_text(data)),
    ]
    for key, words in (("compression", "energy of the compression"), ("float", "energy, float"),
                       ("native", "energy, native")):  # fmt: skip
        use = (data.get("energy") or {}).get(key)
        if use:
            facts.append((words, _energy(use, "" if key == "compression" else " per 1,000 images")))
    rows = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in facts
        if value not in (None, "")
    )
    return f'<section id="facts"><h2>How it was made</h2><dl>{rows}</dl></section>'


def _float_rest(data: dict[str, Any]) -> list[tuple[str, str]]:
    """What stays float, with its share of the multiply-accumulates where a run says it."""
    rest = data.get("float_rest")
    if rest is None:  # a run of an earlier version
        return [(f"{name} stays float", why) for name, why in data.get("kept_float", {}).items()]
    found = []
    for part in rest:
        why = f"{part['reason']}, {100 * part['share']:.2g} % of the work"
        found.append((f"{part['name']} stays float", why))
    return found


def _epochs(data: dict[str, Any]) -> str | None:
    epochs = data.get("epochs")
    return None if epochs is None else f"{epochs} epochs" if epochs else "none"


def _energy(use: dict[str, Any], per: str) -> str:
    text = f"{use['joules']:.4g} J{per} in {use['seconds']:.3g} s, {use['label']}"
    if use.get("co2_grams") is not None:
        text += f"; {use['co2_grams']:.3g} g CO2 ({use.get('country') or 'given intensity'})"
    return text
