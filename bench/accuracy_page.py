"""docs/accuracy.md from the results of bench/accuracy.py.

The part of the page between its two markers is replaced; what stands around it is written by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adalayer_native._files import write_text_atomic
from bench.markdown import markers, table, with_part
from bench.trained import NAMES

BEGIN, END = markers("bench/accuracy.py")
HEAD = f"""# Accuracy

How much accuracy a file of a given size keeps, measured by one protocol (`bench/accuracy.py`). DATA
is CIFAR-10 as a folder or zip (`train/<class>/…`, `test/<class>/…`), MODELS a folder with
`adalayernet_cifar10.safetensors` and `resnet20_cifar10.safetensors`, and, for the rows "trained
longer", `adalayernet-long_cifar10.safetensors` from `adalayer train adalayernet --epochs 30 --data
DATA --out MODELS/adalayernet-long_cifar10.safetensors`.

- **Test images** are seen once per row, by the finished engine: all 10,000 of them.
- **5,000 training images are held out** (class-balanced, fixed). Calibration images come from the
  other 45,000; whatever was chosen by hand was chosen on the held-out ones. Labels of calibration
  images decide nothing in method `optimal`: it compares with the float network's output.
- **Size** is that of the saved file (weights, scales, biases, header) over the float32 `state_dict`
  saved as safetensors.
- **Accuracy** is that of the compiled integer engine, from the model that the saved file gives
  back; *drop* is the float network's accuracy less it, so a negative drop is a gain.
- Nothing is random but the draw of calibration images, which is fixed. Where two networks differ in
  being right on 4 % of 10,000 images, the standard error of their difference is 0.2 points.

Results go row by row into `build/bench/accuracy.json`; a run that is interrupted goes on.

{BEGIN}
{END}
"""
SINGLE = ("no-training", "longer-training")
METHODS = ("uniform", "adalayer", "optimal")
MIXED = ("uniform", "mixed", "adalayer", "optimal")
NOISE = 0.2  # points: standard error of the difference of two networks
GAIN = 1.0  # points that "optimal" is to be ahead of "uniform" at 2.5 bits, unpruned
BITS = """\
A pruned weight counts 0 bits in eq. (6), so "2.5 bits per weight" can be read in two ways.
**Unpruned**, a uniform plan has one whole number of bits, and the widest that keeps the budget is
2; *mixed* spends the 2.5 bits without measuring anything (3 bits from the first layer on, 2 for the
others). This is where the aim is judged: optimal at least 1 point ahead of uniform. **With
pruning** a uniform plan may be wide and sparse (4 bits with 37.5 % zeros, say), the best of all
widths is taken on calibration images, and where that comes within a point of the float network,
nothing can be a point ahead of it."""


def command(row: Mapping[str, Any]) -> str:
    """What measures a row again."""
    return f"`python -m bench.accuracy --data DATA --models MODELS --rows {row['name']}`"


def share(row: Mapping[str, Any]) -> str:
    """Measured size of the saved file over the float file."""
    return f"{100 * row['bytes'] / row['float_bytes']:.2f} %"


def verdict(drop: float, most: float | None) -> str:
    """The aim and whether it is reached."""
    if most is None:
        return ""
    return f"≤ {most:g}: {'met' if drop <= most + 1e-9 else '**missed**'}"


def page_section(results: Mapping[str, Any]) -> str:
    """The generated part."""
    rows = list(results["rows"].values())
    floats = results["float"]
    lines = [_machine(results["machine"]), ""]
    single = [row for row in rows if row["group"] in SINGLE]
    if single:
        lines += ["### Without training", ""]
        body = []
        for row in single:
            reference = floats[row["network"]]["accuracy"]
            drop = reference - row["accuracy"]
            body.append([
                NAMES[row["network"]], f"{row['bytes']:,} B", share(row), str(row["images"]),
                f"{reference:.2f}", f"{row['accuracy']:.2f}", f"{drop:+.2f}",
                verdict(drop, row["most"]), command(row),
            ])  # fmt: skip
        heading = ["network", "file", "of float", "images", "float", "compressed", "drop", "aim",
                   "command"]  # fmt: skip
        lines += [*table(heading, body), ""]
    for group, title, text, methods in (
        ("equal-size", "### At equal bytes", "", METHODS),
        ("average-bits", "### At 2.5 bits per weight", BITS, MIXED),
    ):
        part = [row for row in rows if row["group"] == group]
        if part:
            run = f"`python -m bench.accuracy --data DATA --models MODELS --rows {group}`"
            lines += [title, "", run, "", *([text, ""] if text else [])]
            lines += [*_comparison(part, methods), ""]
    return "\n".join(lines).rstrip() + "\n"


def _machine(machine: Mapping[str, Any]) -> str:
    if not machine:
        return "Nothing is measured yet."
    torch = machine["versions"]["torch"]
    return f"Machine: {machine['cpu']}, kernels {machine['isa']}, torch {torch}."


def _order(known: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether accuracies rise from uniform to adalayer to optimal."""
    if any(method not in known for method in METHODS):
        return ""
    got = [known[method]["accuracy"] for method in METHODS]
    if got == sorted(got):
        return "rising: met"
    close = got[1] >= got[0] - NOISE and got[2] >= got[1] - NOISE
    return f"rising: within {NOISE:g}" if close else "rising: **missed**"


def _ahead(known: Mapping[str, Mapping[str, Any]], gain: float) -> str:
    """Whether optimal is far enough ahead, where that is asked."""
    if not all(row.get("label") for row in known.values()):
        return ""
    return f"≥ {GAIN:g}: {'met' if gain >= GAIN - 1e-9 else '**missed**'}"


def _comparison(rows: Iterable[Mapping[str, Any]], methods: tuple[str, ...]) -> list[str]:
    """One line per network and budget, a column per method, and the order that is aimed at."""
    groups: dict[tuple[str, str, bool], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        limit = row.get("label") or ", ".join(_limit(k, v) for k, v in row["budget"])
        groups.setdefault((row["network"], limit, row["repair"]), {})[row["method"]] = row
    body = []
    for (network, limit, repaired), found in groups.items():
        cells = [NAMES[network], limit, "yes" if repaired else "no"]
        for method in methods:
            known = found.get(method)
            cells.append("" if known is None else f"{known['accuracy']:.2f} ({share(known)})")
        gain = math.nan
        if {"uniform", "optimal"} <= set(found):
            gain = found["optimal"]["accuracy"] - found["uniform"]["accuracy"]
        cells.append("" if math.isnan(gain) else f"{gain:+.2f}")
        cells.append(_order(found) if methods == METHODS else _ahead(found, gain))
        body.append(cells)
    return table(["network", "budget", "repair", *methods, "optimal − uniform", "aim"], body)


def _limit(key: str, value: float) -> str:
    return f"{100 * value:g} % of the float file" if key == "size" else f"{value:g} {key}"


def write_page(results: Mapping[str, Any], page: Path) -> None:
    """Replace the generated part of the page; a page without one gets it, and the protocol, on top.

    Raises:
        ValueError: only one of the two markers is there.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else HEAD
    if BEGIN not in text and END not in text:
        text = f"{HEAD}\n{text.removeprefix('# Accuracy').lstrip()}"
    write_text_atomic(page, with_part(text, (BEGIN, END), page_section(results), page))
