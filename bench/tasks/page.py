"""The generated part of docs/tasks.md: figures, bits of layers, what was protected, a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.markdown import markers, table, write_part
from bench.record import ROOT
from bench.tasks.measure import LOSSES, ROWS, Row
from bench.tasks.training import TASKS

__all__ = ["BEGIN", "END", "PAGE", "part", "write"]

PAGE = ROOT / "docs" / "tasks.md"
PICTURE = ROOT / "docs" / "images" / "tasks.png"
BEGIN, END = markers("bench/tasks")
BACKBONE = "backbone."
SHOWN = 4  # protected layers per plan
COMPARED = 4  # average bits of the plans that are compared layer by layer
COMPARED_LOSS = "distilled"

Results = Mapping[str, Mapping[str, Any]]  # by the names of rows


def write(folder: Path) -> None:
    """Rewrite the page from the results in a folder."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    write_part(PAGE, (BEGIN, END), part(results))
    _picture(results)


def part(results: Results) -> str:
    """The page's generated part."""
    machines = sorted({entry["machine"]["cpu"] for entry in results.values()})
    lines = [f"Machine: {'; '.join(machines)}.", "", *_figures(results)]
    lines += ["", "### Bits of the shared backbone", "", *_bits(results)]
    lines += ["", "### What was protected", "", *_protected(results)]
    return "\n".join(lines)


def _figures(results: Results) -> list[str]:
    rows = []
    for row in ROWS:
        found = results.get(row.name)
        if found is None:
            continue
        whole = results.get(Row(row.task, 0).name, found)
        share = 100 * found["bytes"] / whole["bytes"]
        cells = [f"{name} {value:.1f}" for name, value in found["figures"].items()]
        width = "float" if not row.bits else f"{row.bits} on average" if row.loss else f"{row.bits}"
        by = LOSSES[row.loss] if row.loss else ""
        rows.append(
            [row.task, width, by, ", ".join(cells), f"{found['bytes']:,}", f"{share:.1f} %"]
        )
    return table(["task", "bits", "plan judged by", "figure", "bytes", "of float"], rows)


def _plans(results: Results) -> dict[str, Mapping[str, Any]]:
    names = {task: Row(task, COMPARED, COMPARED_LOSS).name for task in TASKS}
    return {task: results[name] for task, name in names.items() if name in results}


def _bits(results: Results) -> list[str]:
    plans = _plans(results)
    layers = [
        name
        for name in next(iter(plans.values()), {"bits": {}})["bits"]
        if name.startswith(BACKBONE)
    ]
    rows = []
    for name in layers:
        found = [plan["bits"][name] for plan in plans.values()]
        weights = next(iter(plans.values()))["weights"][name]
        marks = [
            f"**{bits}** ({share:.0f} %)"
            if bits == max(found) > min(found)
            else f"{bits} ({share:.0f} %)"
            for bits, share in zip(found, _shares(plans, [name]), strict=True)
        ]
        rows.append([f"`{name.removeprefix(BACKBONE)}`", f"{weights:,}", *marks])
    means = []
    for plan in plans.values():
        inside = [(plan["weights"][n], plan["bits"][n]) for n in layers]
        means.append(f"{sum(w * b for w, b in inside) / sum(w for w, _ in inside):.2f}")
    if rows:
        rows.append(["mean, sum", "", *_with_shares(means, _shares(plans, layers))])
    heads = []
    for plan in plans.values():
        own = [(plan["weights"][n], b) for n, b in plan["bits"].items() if n not in layers]
        heads.append(f"{sum(w * b for w, b in own) / sum(w for w, _ in own):.2f}")
    if rows:
        rest = [100 - share for share in _shares(plans, layers)]
        rows.append(["the task's own layers", "", *_with_shares(heads, rest)])
    return table(["layer", "weights", *plans], rows)


def _shares(plans: Mapping[str, Mapping[str, Any]], names: list[str]) -> list[float]:
    """What some layers would lose with even bits, in percent of what all would, per plan."""
    return [
        100 * sum(plan["need"][name] for name in names) / sum(plan["need"].values())
        for plan in plans.values()
    ]


def _with_shares(means: list[str], shares: list[float]) -> list[str]:
    return [f"{mean} ({share:.0f} %)" for mean, share in zip(means, shares, strict=True)]


def _protected(results: Results) -> list[str]:
    lines = []
    for task, plan in _plans(results).items():
        shown = list(plan["protected"].items())[:SHOWN]
        more = len(plan["protected"]) - len(shown)
        lines.append(
            f"- **{task}**: "
            + "; ".join(f"`{name}` ({reason})" for name, reason in shown)
            + (f"; and {more} more" if more > 0 else "")
        )
    return lines


def _picture(results: Results) -> None:
    """Bits of every layer, a row per task."""
    plans = _plans(results)
    if not plans:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.3 + 1.5 * len(plans)), layout="constrained")
    axes = figure.subplots(len(plans), 1, squeeze=False)[:, 0]
    most = max(len(plan["bits"]) for plan in plans.values())
    for axis, (task, plan) in zip(axes, plans.items(), strict=True):
        names = list(plan["bits"])
        colours = ["#31688e" if name.startswith(BACKBONE) else "#d1495b" for name in names]
        axis.bar(range(len(names)), list(plan["bits"].values()), color=colours)
        axis.axhline(COMPARED, color="0.6", linewidth=0.8)
        axis.set(xlim=(-0.6, most - 0.4), ylim=(0, 8.4), ylabel="bits")
        axis.set_title(f"{task}", loc="left", fontsize=10)
        labels = [name.removeprefix(BACKBONE) for name in names]
        axis.set_xticks(range(len(names)), labels, rotation=90, fontsize=6)
    figure.suptitle(
        f"Bits of every layer at an average of {COMPARED}; blue: the backbone, red: the task's own",
        fontsize=11,
    )
    figure.savefig(PICTURE, dpi=80)
