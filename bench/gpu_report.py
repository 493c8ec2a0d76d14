"""The GPU part of docs/performance.md, from the results of ``bench.gpu``.

    python -m bench.gpu_report [--results FILE] [--docs FILE]

The page has such a part only where results were measured: it is added behind the others by the
first call, and replaced by later ones. The roofline picture needs matplotlib; without it, the rest
is written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.markdown import table, write_part
from bench.record import ROOT
from bench.report import PAGE

RESULTS = ROOT / "build" / "gpu-bench.json"
BEGIN = "<!-- gpu: begin (written by python -m bench.gpu_report) -->"
END = "<!-- gpu: end -->"
_PICTURE = "roofline-gpu.png"

Row = Mapping[str, Any]
# What these sections measured, in the order of the page.
_TITLES = {
    "peaks": "What the device gives",
    "networks": "ResNet-50",
    "compiled": "ResNet-50 beside torch.compile",
    "mobilenet": "MobileNetV2",
    "linears": "Linear layers, half activations, weights from memory",
    "products": "Linear layers, u8 activations",
    "sparse": "Pruned layers",
    "layers": "Convolutions",
}


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def section_table(rows: Sequence[Row]) -> list[str]:
    """Rows as they were measured; columns are all that any row has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row[c]) if c in row else "–" for c in columns] for row in rows]
    return table(columns, cells)


def targets(found: Mapping[str, Sequence[Row]]) -> Iterator[tuple[str, float, float]]:
    """What was hoped for on an H100, as far as it was measured: name, reached, wanted."""
    for row in [*found.get("networks", ()), *found.get("compiled", ())]:
        if row["bits"] == 8 and row["batch"] in (1, 256):
            peers = ", ".join(c.removesuffix(" us") for c in row if c.endswith(" us"))
            name = f"{row['network']} 8 bits, batch {row['batch']}, over the best of {peers}"
            yield name, row["x best"], 1.5
    peaks = {row["what"]: row["value"] for row in found.get("peaks", ())}
    attainable, copied = peaks.get("_int_mm 8192"), peaks.get("copy")
    for row in found.get("layers", ()):
        wide = min(row["channels"], row["out channels"]) >= 256
        if attainable and row["batch"] == 256 and row["layer"].startswith("3x3") and wide:
            yield (
                f"{row['layer']}, share of the int8 rate of _int_mm",
                row["TOPS"] / attainable,
                0.6,
            )
    for row in found.get("linears", ()):
        if row["size"] == 8192 and row["batch"] == 1:
            for bits, least in ((4, 3.3), (2, 5.5)):
                yield f"linear 8192, batch 1, {bits} bits over half", row[f"b{bits} x"], least
            if copied:
                share = row["b4 GB/s"] / copied
                yield "linear 8192, batch 1, 4 bits, share of copy bandwidth", share, 0.85
    for row in found.get("sparse", ()):
        yield f"{row['layer']}, batch {row['batch']}, 2:4 over dense", row["2:4 x"], 1.3
    for row in [*found.get("layers", ()), *found.get("linears", ())]:
        widths = sorted(int(c[1]) for c in row if c[0] == "b" and c[2:] == " us")
        if len(widths) > 1:
            worst = min(
                row[f"b{more} us"] / row[f"b{fewer} us"] for fewer, more in pairwise(widths)
            )
            name = row.get("layer") or f"linear {row['size']}"
            # (Fewer bits shall not be slower; one part in twenty is the noise of a median.)
            yield f"{name}, batch {row['batch']}, more bits over fewer", worst, 0.95


def page_section(found: Mapping[str, Any], picture: bool) -> str:
    """The generated part of the page."""
    lines = [
        "# On a GPU",
        "",
        "Written by `make gpu-bench`: medians of CUDA events in microseconds, results checked "
        "against the CPU engine or float64 first.",
        "",
        f"{found['device']}, compute capability {found['capability']}; torch {found['torch']}.",
        "",
    ]
    if picture:
        lines += [f"![roofline](images/{_PICTURE})", ""]
    reached = list(targets(found))
    if reached:
        rows = [
            [name, f"{value:.2f}", f"{least:g}", "met" if value >= least else "**missed**"]
            for name, value, least in reached
        ]
        lines += ["## Targets", "", *table(["", "reached", "wanted", ""], rows)]
    for section, title in _TITLES.items():
        if found.get(section):
            lines += [f"## {title}", "", *section_table(found[section])]
    return "\n".join(lines)


def points(rows: Sequence[Row]) -> dict[int, list[tuple[float, float]]]:
    """Operations per byte, and 10^12 operations per second, of every convolution by width."""
    found: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        operations = 2e6 * row["MMAC"]
        for column in row:
            if column[0] == "b" and column.endswith(" MB"):
                bits = int(column[1])
                us, moved = row[f"b{bits} us"], 1e6 * row[column]
                found.setdefault(bits, []).append((operations / moved, 1e-6 * operations / us))
    return found


def draw_roofline(found: Mapping[str, Any], path: Path) -> bool:
    """Convolutions under what memory and tensor cores give; False without matplotlib or layers."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not found.get("layers"):
        return False
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    markers = {8: "o", 4: "s", 3: "^", 2: "v"}
    for bits, pairs in sorted(points(found["layers"]).items(), reverse=True):
        across, up = zip(*pairs, strict=True)
        axis.scatter(across, up, s=14, marker=markers.get(bits, "x"), label=f"{bits} bits")
    peaks = {row["what"]: row["value"] for row in found.get("peaks", ())}
    if "copy" in peaks and "_int_mm 8192" in peaks:
        slope, peak = 1e-3 * peaks["copy"], peaks["_int_mm 8192"]
        start, stop = 1.0, 20000.0
        axis.plot([start, peak / slope, stop], [start * slope, peak, peak], "k-", linewidth=1)
        axis.text(stop, peak, f"_int_mm {peak:.0f} TOPS", ha="right", va="bottom", fontsize=8)
        axis.text(start, start * slope, f" copy {peaks['copy']:.0f} GB/s", va="top", fontsize=8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte (packed weights, u8 input and output)")
    axis.set_ylabel(f"TOPS, {found['device']}")
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return True


def write_page(found: Mapping[str, Any], page: Path = PAGE) -> None:
    """Adds or replaces the part of the page, and the picture beside it.

    Raises:
        ValueError: the page has one of the two markers only.
    """
    picture = draw_roofline(found, page.parent / "images" / _PICTURE)
    write_part(page, (BEGIN, END), page_section(found, picture))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=PAGE)
    options = parser.parse_args()
    if not options.results.is_file():
        raise SystemExit(f"{options.results} is missing: make gpu-bench measures on a GPU")
    write_page(json.loads(options.results.read_text(encoding="utf-8")), options.docs)
    print(f"written to {options.docs}")


if __name__ == "__main__":
    main()
