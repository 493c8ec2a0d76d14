"""Tables and pictures of the results, for the terminal and for docs/performance.md.

    python -m bench.report [--results FILE] [--docs FILE]

replaces the part of the page between its two markers, and the pictures beside it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.interleave import STATES, Comparison, Spread
from bench.markdown import table, with_part
from bench.record import RESULTS, ROOT, Results

PAGE = ROOT / "docs" / "performance.md"
BEGIN = "<!-- measured: begin (written by python -m bench.report) -->"
END = "<!-- measured: end -->"
HEAD = f"""# Performance

{BEGIN}
{END}
"""
OURS = "ours"


def comparison_lines(results: Results, name: str) -> Iterator[str]:
    """One comparison for the terminal: a line per candidate, medians and quartiles per state."""
    yield name
    if results.comparisons[name].info.get("many"):
        return
    for candidate, states in results.table(name).items():
        cells = [
            f"{state} {_ms(spread)} [{spread.count}]"
            for state in (*STATES, "all")
            if (spread := states.get(state)) is not None and (state != "all" or len(states) == 1)
        ]
        yield f"    {candidate:<22}" + "   ".join(cells)


def _ms(spread: Spread) -> str:
    return f"{1e3 * spread.median:.3f} ms ({1e3 * spread.low:.3f}-{1e3 * spread.high:.3f})"


# -------------------------------------------------------------------------------------- markdown


def shown_state(spread_table: Mapping[str, Mapping[str, Spread]]) -> str:
    """The state that a table shows: the first in which every candidate was met."""
    for state in STATES:
        if all(state in row for row in spread_table.values()):
            return state
    return "all"


def _spread_cell(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    digits = 3 if spread.median < 1e-2 else 1
    values = [f"{1e3 * v:.{digits}f}" for v in (spread.median, spread.low, spread.high)]
    return f"{values[0]} ({values[1]}–{values[2]})"


def _candidates(comparisons: Iterable[Comparison]) -> list[str]:
    """All candidates in order of first appearance, ours first."""
    names = dict.fromkeys(name for c in comparisons for name in c.samples)
    return sorted(names, key=lambda n: not n.startswith(OURS))


def comparison_table(results: Results, names: Sequence[str], title: str) -> list[str]:
    """Comparisons as rows, candidates as columns, in ms: median (quartiles)."""
    columns = _candidates(results.comparisons[n] for n in names)
    rows = []
    for name in names:
        spread_table = results.table(name)
        state = shown_state(spread_table)
        cells = [_spread_cell(spread_table.get(c, {}).get(state)) for c in columns]
        rows.append([name.split("/", 1)[1].replace("/", ", "), state, *cells])
    return table([title, "cores", *columns], rows)


def verdict_table(results: Results) -> list[str]:
    """Every target with what was reached, in each state."""
    rows = []
    for verdict in results.verdicts():
        states = [
            f"{verdict.found[s].value:.2f}" if s in verdict.found else "–" for s in (*STATES, "all")
        ]
        ratio = verdict.ratio
        peer = " / ".join(verdict.target.peers) if ratio is None else ratio.peer
        mark = "met" if verdict.met else "**missed**"
        wanted = f"{verdict.target.minimum:g}"
        rows.append([verdict.name, verdict.target.ours, peer, *states, wanted, mark])
    heading = ["comparison", "ours", "over", *STATES, "all", "wanted", ""]
    return table(heading, rows)


def figure_table(results: Results) -> list[str]:
    """Single values with their limits."""
    rows = []
    for figure in results.figures.values():
        limit = "" if figure.at_most is None else f"≤ {figure.at_most:g}"
        if figure.at_least is not None:
            limit = f"≥ {figure.at_least:g}"
        mark = {None: "", True: "met", False: "**missed**"}[figure.met]
        rows.append([figure.name, f"{figure.value:.4g}", figure.unit, limit, mark])
    return table(["figure", "value", "unit", "wanted", ""], rows)


def node_tables(results: Results) -> list[str]:
    """Time per node inside the engine, one table per network and one column per width."""
    networks: dict[str, dict[int, dict[str, Any]]] = {}
    for figure in results.figures.values():
        found = re.fullmatch(r"nodes of (\w+), (\d) bits, 1 thread", figure.name)
        if found:
            networks.setdefault(found[1], {})[int(found[2])] = {
                row["name"]: row for row in figure.info["rows"]
            }
    lines = []
    for network, widths in networks.items():
        bits = sorted(widths, reverse=True)
        heading = [network, "operation", "kernel", *(f"{b} bits, µs" for b in bits), "MMAC"]
        rows = []
        for name, row in widths[bits[0]].items():
            times = [
                f"{widths[b][name]['microseconds']:.1f}" if name in widths[b] else "–" for b in bits
            ]
            rows.append(
                [name, row["op"], row["kernel"] or row["kind"], *times, f"{row['macs'] / 1e6:.1f}"]
            )
        lines += table(heading, rows)
    return lines


def channel_lines(results: Results) -> list[str]:
    """What the pictures of the channel sweeps show."""
    names = [n for n, c in results.comparisons.items() if c.info.get("many")]
    return [f"![{n}](images/{_slug(n)}.png)" for n in names] + [""]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _group(results: Results, prefix: str) -> list[str]:
    return [n for n in results.comparisons if n.startswith(prefix + "/")]


def page_section(results: Results) -> str:
    """The generated part of docs/performance.md."""
    machine = results.machine
    versions = ", ".join(f"{name} {v}" for name, v in machine.get("versions", {}).items())
    probe = 1e6 * results.fastest_probe()
    lines = [
        "Written by `make bench` (`make bench K=resnet18` measures a part and leaves this page as "
        "it is; `.venv/bin/python -m bench.report` writes the page again from the kept samples).",
        "",
        f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('isa')} kernels, Python "
        f"{machine.get('python')}; {versions}.",
        "",
        "Milliseconds, median (quartiles). *fast* and *contended* are the two states of the cores: "
        f"a probe that takes {probe:.1f} µs on a free core ran around every sample, and took more "
        "than 1.7 times as long on a contended one. Ratios compare medians of the same state.",
        "",
    ]
    sections = [
        ("network", "Networks", "network"),
        ("instruction set", "Forced instruction sets, 8 bits, batch 1, 2 threads", "set, network"),
        ("layer", "Layers, 1 thread, cold weights", "layer"),
        ("layer, 2 threads", "Layers, 2 threads", "layer"),
        ("layer per instruction set", "Layers per instruction set, 1 thread", "set, layer"),
        ("unusual layer", "Grouped, dilated and depthwise layers", "layer, threads"),
        ("drop-in layer", "Drop-in layers, floats in and out, 1 thread", "layer, order"),
        ("policy fastest", 'Engines with policy="fastest", batch 1, 1 thread', "network"),
        ("linear", "Linear layer with weights in main memory", "layer"),
    ]
    if _group(results, "network"):
        lines += ["![networks](images/networks.png)", ""]
    for prefix, title, column in sections:
        names = _group(results, prefix)
        if names:
            lines += [f"## {title}", "", *comparison_table(results, names, column)]
        if prefix == "instruction set" and names:
            lines += [
                "The cap (`ONEDNN_MAX_CPU_ISA`) binds oneDNN's kernels only: what OpenVINO "
                "generates itself may use wider instructions.",
                "",
            ]
        if prefix == "layer" and names:
            lines += ["![roofline](images/roofline.png)", ""]
    nodes = node_tables(results)
    if nodes:
        lines += ["## Nodes inside the engine", "", *nodes]
    if any(c.info.get("many") for c in results.comparisons.values()):
        lines += ["## Channel counts 1 to 257", "", *channel_lines(results)]
    lines += ["## Targets", "", *verdict_table(results), *figure_table(results)]
    return "\n".join(lines)


def write_page(results: Results, page: Path = PAGE) -> None:
    """Replaces the generated part of the page, and the pictures."""
    text = page.read_text(encoding="utf-8") if page.is_file() else HEAD
    text = with_part(text, (BEGIN, END), page_section(results), page)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    write_pictures(results, page.parent / "images")


# -------------------------------------------------------------------------------------- pictures


def write_pictures(results: Results, folder: Path) -> None:
    """Bars per network, the roofline of the layers, and the channel sweeps, as small PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    if _group(results, "network"):
        _network_bars(results, folder / "networks.png")
    if _group(results, "layer"):
        _roofline(results, folder / "roofline.png")
    for name, comparison in results.comparisons.items():
        if comparison.info.get("many"):
            _channels(results, name, folder / f"{_slug(name)}.png")


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=80)
    plt.close(figure)


# In times of the fastest candidate.
_LONGEST_BAR = 4.0


def _network_bars(results: Results, path: Path) -> None:
    import matplotlib.pyplot as plt

    names = _group(results, "network")
    columns = 4
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(14, 2.2 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        spread_table = results.table(name)
        state = shown_state(spread_table)
        labels = _candidates([results.comparisons[name]])[::-1]
        values = [spread_table[c][state] for c in labels]
        # From zero, cut where torch would leave no room for the others; the time stands beside.
        unit = min(v.median for v in values)
        medians = [v.median / unit for v in values]
        low = [(v.median - v.low) / unit for v in values]
        high = [(v.high - v.median) / unit for v in values]
        colours = ["tab:blue" if c.startswith(OURS) else "tab:gray" for c in labels]
        axis.barh(labels, medians, xerr=[low, high], color=colours, error_kw={"linewidth": 0.8})
        axis.set_xlim(0, _LONGEST_BAR)
        for row, value in enumerate(values):
            x = min(value.high / unit, _LONGEST_BAR * 0.8) + 0.05
            axis.text(x, row, f"{1e3 * value.median:.3g} ms", va="center", fontsize=6)
        axis.tick_params(labelsize=7)
        title = name.split("/", 1)[1].replace("/", ", ")
        axis.set_title(f"{title} (1 = fastest, {state} cores)", fontsize=8)
    _save(figure, path)


def _roofline(results: Results, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    markers = {8: "o", 4: "s", 3: "^", 2: "v"}
    for bits, marker in markers.items():
        points = []
        for name in _group(results, "layer"):
            info, spread_table = results.comparisons[name].info, results.table(name)
            candidate = f"{OURS} {bits} bits"
            if candidate in spread_table:
                spread = spread_table[candidate][shown_state(spread_table)]
                moved = info["bytes"][candidate]
                points.append(
                    (info["operations"] / moved, 1e-9 * info["operations"] / spread.median)
                )
        if points:
            across, up = zip(*points, strict=True)
            axis.scatter(across, up, s=14, marker=marker, label=f"{bits} bits")
    peak = results.figures.get("int8 peak of one core")
    bandwidth = results.figures.get("memory bandwidth of one core")
    if peak is not None and bandwidth is not None:
        # GiB/s to GB/s, times operations per byte.
        slope = bandwidth.value * 1.073741824
        start, knee, stop = 1.0, peak.value / slope, 5000.0
        axis.plot([start, knee, stop], [start * slope, peak.value, peak.value], "k-", linewidth=1)
        axis.text(stop, peak.value, f"{peak.value:.0f} GOPS", ha="right", va="bottom", fontsize=8)
        axis.text(start, start * slope, f" {slope:.1f} GB/s from memory", va="top", fontsize=8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte (packed weights, u8 input and output)")
    axis.set_ylabel("GOPS, one thread")
    axis.legend(fontsize=8)
    _save(figure, path)


def _channels(results: Results, name: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    spread_table = results.table(name)
    channels = results.comparisons[name].info["channels"]
    state = shown_state(spread_table)
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for label in (OURS, "torch fp32"):
        times = [1e6 * spread_table[f"{label} {c}"][state].median for c in channels]
        axis.plot(channels, times, ".-", label="ours, 8 bits" if label == OURS else label)
    axis.set_xlabel("channels")
    axis.set_ylabel(f"µs ({state})")
    axis.set_title(name.split("/", 1)[1], fontsize=9)
    axis.legend(fontsize=8)
    _save(figure, path)


def main() -> None:
    """Writes the page from a file of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=PAGE)
    options = parser.parse_args()
    write_page(Results.load(options.results), options.docs)
    print(f"wrote {options.docs}")


if __name__ == "__main__":
    main()
