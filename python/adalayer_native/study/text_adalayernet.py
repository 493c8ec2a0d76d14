"""The first paper's study in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .adalayernet import TITLES, key_of
from .markdown import machine_line, number, spread_text, table
from .papers import FIGURE6, TABLE2

__all__ = ["lines"]


def runs_of(data: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
    """Entries of a method, by seed."""
    keys = [key_of(method, seed) for seed in data["wanted"]["seeds"]]
    return [data["entries"][key] for key in keys if key in data["entries"]]


def lines(data: Mapping[str, Any], prefix: str) -> list[str]:
    """The whole section, line by line."""
    settings, entries = data["settings"], data["entries"]
    training = (
        f"{settings['epochs']} epochs of fine-tuning" if settings["epochs"] else "no training"
    )
    seeds = ", ".join(map(str, data["wanted"]["seeds"]))
    found = [
        machine_line(data),
        f"Budget: {100 * settings['size']:g} % of the float file; {settings['calibration']} "
        f"calibration images, {training}, seeds {seeds}. A seed draws the calibration images, on "
        f"which plans are chosen, and orders the repair. Accuracy is that of the compiled integer "
        f"engine on all test images.",
        "",
    ]
    if "float" not in entries:
        return [*found, "Nothing is measured yet."]
    return [
        *found,
        *_summary(data),
        *_comparison(data),
        *_costs(data),
        *_layers(data),
        *_pictures(data, prefix),
    ]


def _times(data: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = data["entries"].get("timing") or {}
    return found


def _latency(data: Mapping[str, Any], name: str, size: str) -> float | None:
    entry = _times(data).get("latency", {}).get(name, {}).get(size)
    return None if entry is None else float(entry["median"])


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None or before == 0:
        return "–"
    return f"{100 * (after / before - 1):+.1f} %"


def _summary(data: Mapping[str, Any]) -> list[str]:
    """The paper's Table 1: before and after, for the layer-wise plan."""
    runs = runs_of(data, "adalayer")
    if not runs:
        return []
    whole, first = data["entries"]["float"], runs[0]
    paper, after = TABLE2["float"], TABLE2["adalayer"]
    accuracy = [run["accuracy"] for run in runs]
    mean = sum(accuracy) / len(accuracy)
    memory = _times(data).get("peak_bytes", {})
    before_ms, after_ms = (_latency(data, name, "1") for name in ("float", "adalayer"))
    rows = [
        ["accuracy, %", number(whole["accuracy"]), spread_text(accuracy),
         f"{mean - whole['accuracy']:+.2f}", "86.00 → 84.61 (−1.39)"],
        ["file, bytes", number(whole["bytes"], 0), number(first["bytes"], 0),
         _change(whole["bytes"], first["bytes"]),
         f"{paper.kilobytes} → {after.kilobytes} KB, synthetic (−83.5 %)"],
        ["latency, ms per image", number(before_ms, 3), number(after_ms, 3),
         _change(before_ms, after_ms),
         f"{paper.milliseconds} → {after.milliseconds} ms, synthetic (−7.5 %)"],
        ["parameters, thousands (P and B counted)", number(whole["parameters"] / 1e3, 1),
         number(first["parameters_after"] / 1e3, 1),
         _change(whole["parameters"], first["parameters_after"]),
         f"{paper.parameters} → {after.parameters} (−83.5 %)"],
        ["bits", "32", f"{first['bits'][0]}–{first['bits'][1]}", "", "32 → 4–8"],
        ["FLOPs, millions (of weights left)", number(whole["flops"] / 1e6, 1),
         number(first["nonzero_flops"] / 1e6, 1), _change(whole["flops"], first["nonzero_flops"]),
         "not given"],
        ["BOPs, billions", number(whole["bops"] / 1e9, 2), number(first["bops"] / 1e9, 2),
         _change(whole["bops"], first["bops"]), "not given"],
        ["peak memory, MiB", number(_mib(memory.get("float")), 1),
         number(_mib(memory.get("adalayer")), 1),
         _change(memory.get("float"), memory.get("adalayer")), "not given"],
    ]  # fmt: skip
    heading = ["Table 1", "before", "after (layer-wise)", "change", "the paper"]
    return ["### Table 1: before and after", "", *table(heading, rows)]


def _mib(value: float | None) -> float | None:
    return None if value is None else value / 2**20


def _comparison(data: Mapping[str, Any]) -> list[str]:
    """The paper's Table 2, and the methods that it does not have."""
    whole = data["entries"]["float"]
    rows = [[
        TITLES["float"], number(whole["accuracy"]), "", number(whole["bytes"], 0), "100.0 %",
        number(whole["parameters"] / 1e3, 1), "32",
        number(_latency(data, "float", "1"), 3), number(_latency(data, "float", "16"), 3),
        _paper("float"),
    ]]  # fmt: skip
    for method in data["wanted"]["methods"]:
        runs = runs_of(data, method)
        if not runs:
            continue
        low = min(run["bits"][0] for run in runs)
        high = max(run["bits"][1] for run in runs)
        drops = [whole["accuracy"] - run["accuracy"] for run in runs]
        rows.append([
            TITLES[method], spread_text([run["accuracy"] for run in runs]),
            f"{sum(drops) / len(drops):+.2f}",
            number(max(run["bytes"] for run in runs), 0),
            f"{100 * max(run['size'] for run in runs):.1f} %",
            number(runs[0]["parameters_after"] / 1e3, 1),
            f"{low}–{high}" if low != high else str(low),
            number(_latency(data, method, "1"), 3), number(_latency(data, method, "16"), 3),
            _paper(method),
        ])  # fmt: skip
    threads = _times(data).get("threads")
    heading = ["model", "accuracy, %", "drop", "file, bytes", "of float", "K parameters", "bits",
               "ms, 1 image", "ms, 16 images", "the paper: %, KB, ms"]  # fmt: skip
    note = "Latencies are not measured yet."
    if threads:
        note = (
            f"Latency: medians, all models in turn in one process, {threads} thread"
            f"{'s' * (threads > 1)}; float is torch (channels_last), the others the compiled "
            f"engine. The paper's sizes and latencies are synthetic."
        )
    return ["### Table 2: methods compared", "", *table(heading, rows), note, ""]


def _paper(method: str) -> str:
    row = TABLE2.get(method)
    if row is None:
        return "–"
    return f"{row.accuracy:.2f}, {row.kilobytes:g}, {row.milliseconds:g}"


def _costs(data: Mapping[str, Any]) -> list[str]:
    """What one image costs."""
    entries, times = data["entries"], _times(data)
    energy, memory = times.get("energy") or {}, times.get("peak_bytes") or {}
    rows, labels = [], set()
    for name in ("float", *data["wanted"]["methods"]):
        found = [entries["float"]] if name == "float" else runs_of(data, name)
        if not found:
            continue
        entry = found[0]
        use = energy.get(name)
        if use:
            labels.add(use["label"])
        rows.append([
            TITLES[name], number(entry["nonzero_flops"] / 1e6, 1), number(entry["bops"] / 1e9, 2),
            number(entry["weight_bytes"] / 1e3, 1), number(entry["activation_bytes"] / 1e3, 1),
            number(_mib(memory.get(name)), 1), number(entry["modelled_energy_uj"], 1),
            number(use and use["joules"], 2),
            number(use and use["co2_grams"] and 1000 * use["co2_grams"], 3),
        ])  # fmt: skip
    label = ", ".join(sorted(labels)) or "not metered"
    heading = ["model", "MFLOPs", "GBOPs", "weights read, kB", "activations, kB",
               "peak memory, MiB", "modelled µJ", f"J per 1,000 ({label})",
               f"mg CO2 per 1,000 ({label})"]  # fmt: skip
    note = (
        "FLOPs are those of the weights that are left (2 per multiply-add), BOPs MACs × weight "
        "bits × activation bits × share left, per image; both are counted. Peak memory: growth of "
        "a fresh process that loads the model and classifies five images. *modelled* is the model "
        "of docs on energy per operation and memory traffic (Horowitz 2014; scaled below 8 bits), "
        "not a measurement."
    )
    return ["### What an image costs", "", *table(heading, rows), note, ""]


def _layers(data: Mapping[str, Any]) -> list[str]:
    """The paper's Figure 6, beside ours."""
    runs = runs_of(data, "adalayer")
    if not runs:
        return []
    best = (runs_of(data, "optimal") or [{"layers": {}}])[0]["layers"]
    rows = []
    for name, layer in runs[0]["layers"].items():
        paper, other = FIGURE6.get(name), best.get(name)
        rows.append([
            name, number(layer["params"] / 1e3, 3), number(layer["params_after"] / 1e3, 3),
            number(100 * layer["sparsity"], 1), str(layer["bits"]), number(layer["A"], 3),
            "–" if paper is None else
            f"{paper.before:g} → {paper.after:g}, {paper.pruned:g} %, {paper.bits}, "
            f"{paper.contribution:g}",
            "–" if other is None else f"{100 * other['sparsity']:.0f} %, {other['bits']}",
        ])  # fmt: skip
    heading = ["layer", "K before", "K after", "pruned, %", "bits", "A",
               "the paper: K, pruned, bits, A", "optimal: pruned, bits"]  # fmt: skip
    hyper = ", ".join(f"{key} = {value:g}" for key, value in runs[0]["hyper"].items())
    note = (
        f"Layer-wise plan of seed {runs[0]['seed']}: {hyper}. A is the drop of accuracy with that "
        f'layer alone compressed over the largest drop; the paper\'s column sums to 1. "After" is '
        f"before × (1 − P) × B / 32, as in the paper."
    )
    return ["### Figure 6: layer by layer", "", *table(heading, rows), note, ""]


def _pictures(data: Mapping[str, Any], prefix: str) -> list[str]:
    if not runs_of(data, "adalayer"):
        return []
    shown = [
        ("fingerprint", "Figure 2: layer fingerprints"),
        ("ribbon", "Figure 3: architecture ribbon"),
        ("bars", "Figures 4 and 5: parameters per layer, before and after"),
        ("layers", "Figure 6: bits and pruning beside the paper's"),
    ]
    found = []
    for name, title in shown:
        found += [f"![{title}]({prefix}{name}.png)", ""]
    return found
