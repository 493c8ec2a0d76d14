"""The second paper's study in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .configurations import configuration
from .green import key_of
from .markdown import machine_line, number, spread, spread_text, table
from .papers import TABLE3

__all__ = ["lines", "runs_of"]

Data = Mapping[str, Any]


def runs_of(data: Data, name: str) -> list[dict[str, Any]]:
    """Entries of a configuration, by seed."""
    keys = [key_of(name, seed) for seed in data["wanted"]["seeds"]]
    return [data["entries"][key] for key in keys if key in data["entries"]]


def names_of(data: Data) -> list[str]:
    """Configurations of which something is there."""
    return [name for name in data["wanted"]["configurations"] if runs_of(data, name)]


def title_of(data: Data, name: str) -> str:
    """A configuration in words."""
    return configuration(name, data["settings"]["fixed_bits"]).title


def lines(data: Data, prefix: str) -> list[str]:
    """The whole section, line by line."""
    settings = data["settings"]
    seeds = ", ".join(map(str, data["wanted"]["seeds"]))
    found = [
        machine_line(data),
        f"{settings['epochs']} epochs of {settings['images']:,} training images, batches of "
        f"{settings['batch_size']}, seeds {seeds} (the paper: 400 epochs of 50,000, one run).",
        "",
        *_reading(settings),
    ]
    if not names_of(data):
        return [*found, "Nothing is trained yet."]
    return [
        *found,
        *_table3(data),
        *_ranking(data),
        *_within(data),
        *_steps(data),
        *_native(data),
        f"![Accuracy and loss over the epochs]({prefix}curves.png)",
        "",
        *([f"![Accuracy and latency]({prefix}native.png)", ""] if _timing(data) else []),
        *_dynamic(data, prefix),
    ]


def _reading(settings: Mapping[str, Any]) -> list[str]:
    """What the paper leaves unsaid, and how we read it."""
    blocks = settings["blocks"]
    stop = settings["stop_accuracy"]
    return [
        "What the paper leaves unsaid, and our reading of it:",
        "",
        f"- Blocks per stage: {blocks} in each of layer1, layer2 and layer3 (ResNet-"
        f"{6 * blocks + 2}; its Table 2 has 16, 32 and 64 channels, but no ResNet-18 has three "
        f"stages). Shortcuts have no parameters.",
        f"- The fixed width: {settings['fixed_bits']} bits. Section 6 speaks of 2, 2 and 2; the "
        f"tables name none.",
        "- A stage's width holds for the weights and the input of each of its convolutions. A "
        "tensor between two stages has the width of the stage that reads it, the output of layer3 "
        "stays float; so do conv1, the classifier and everything in full precision.",
        "- Quantization during training: weights per output channel, activations per tensor, "
        "straight-through gradients, scales learned (LSQ) from calibrated ones.",
        f"- Optimizer: SGD, momentum 0.9, learning rate {settings['lr']:g} as in the paper, with a "
        f"half cosine to 0; no weight decay; random crops and mirroring; float32.",
        f"- The stop: a run ends after the first epoch with a training accuracy of {stop:g} %; one "
        f"that rises or falls over time not before it has its last widths."
        if stop
        else "- The stop at 95 % is off.",
        "- Rising and falling over time: all three stages have 2, 3 and 4 bits (4, 3 and 2) for a "
        "third of the run each.",
        "- Dynamic (its section 7): a layer's weights go from 2 to 4 bits as the signal-to-noise "
        "ratio of its gradient falls by a power of ten, its input has about as many bits as the "
        "entropy of its values; until three quarters of the epochs, if the run gets there.",
        "- Train time, energy and emission of its Table 3 carry no units: seconds, kWh and kg of "
        "CO2 per step, by their numbers.",
        "",
    ]


def _last(run: Mapping[str, Any], key: str) -> float | None:
    value = run["history"][-1].get(key)
    return None if value is None else float(value)


def _paper(data: Data, name: str) -> Any:
    return TABLE3.get(data["settings"]["dataset"], {}).get(name)


def _percent(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else 100 * value for value in values]


def _pair(pair: tuple[float, float], digits: int = 2) -> str:
    return f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"


def _total(run: Mapping[str, Any], key: str) -> float | None:
    values = [epoch.get(key) for epoch in run["history"]]
    return None if any(value is None for value in values) else float(sum(values))


def labels_of(data: Data) -> str:
    """How the energy of the training runs was found."""
    found = {
        epoch["energy_label"]
        for name in names_of(data)
        for run in runs_of(data, name)
        for epoch in run["history"]
        if "energy_label" in epoch
    }
    return ", ".join(sorted(found)) or "not metered"


def _table3(data: Data) -> list[str]:
    rows = []
    for name in names_of(data):
        runs, paper = runs_of(data, name), _paper(data, name)
        grams = [_total(run, "co2_grams") for run in runs]
        rows.append([
            title_of(data, name), str(len(runs)),
            spread_text([run["test_accuracy"] for run in runs]),
            "–" if paper is None else _pair(paper.test),
            spread_text(_percent([_last(run, "accuracy") for run in runs])),
            "–" if paper is None else _pair(paper.train),
            spread_text([_last(run, "loss") for run in runs], 3),
            "–" if paper is None else _pair(paper.loss, 3),
            spread_text([len(run["history"]) for run in runs], 1),
            spread_text([_kilo(_total(run, "joules")) for run in runs], 2),
            spread_text(grams, 2),
        ])  # fmt: skip
    label = labels_of(data)
    heading = ["configuration", "seeds", "test, %", "paper", "train, %", "paper", "loss", "paper",
               "epochs", f"kJ of training, {label}", f"g CO2, {label}"]  # fmt: skip
    stopped = [
        f"{title_of(data, name)} (seed {run['seed']}) after epoch {run['stopped_at']}"
        for name in names_of(data)
        for run in runs_of(data, name)
        if run["stopped_at"]
    ]
    limit = data["settings"]["stop_accuracy"]
    note = f"No run reached a training accuracy of {limit:g} %." if limit else ""
    if stopped:
        note = f"Ended at a training accuracy of {limit:g} %: {', '.join(stopped)}."
    return [
        "### Table 3: after the last epoch, mean ± standard deviation over seeds",
        "",
        "Test accuracy is that of the native network on all test images (in full precision of the "
        "float network). The paper's columns are means and spreads over the 400 epochs of one run. "
        "Energy of training is that of simulated quantization, which computes in float32.",
        "",
        *table(heading, rows),
        note,
        "",
    ]


def _kilo(value: float | None) -> float | None:
    return None if value is None else value / 1000


def _ranking(data: Data) -> list[str]:
    """Configurations by test accuracy, each with its spread."""
    found = []
    for name in names_of(data):
        mean, deviation = spread([run["test_accuracy"] for run in runs_of(data, name)])
        found.append((mean, deviation, name))
    found.sort(reverse=True)
    texts = [
        f"{title_of(data, name)} {mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
        for mean, deviation, name in found
    ]
    return [f"Ranked by test accuracy, %: {'; '.join(texts)}.", ""]


def _within(data: Data) -> list[str]:
    """The paper's way: mean and spread over the epochs of one run."""
    rows = []
    for name in names_of(data):
        run = runs_of(data, name)[0]
        history, steps = run["history"], run["steps_per_epoch"]
        joules = [e["joules"] / steps if e.get("joules") is not None else None for e in history]
        grams = [
            1000 * e["co2_grams"] / steps if e.get("co2_grams") is not None else None
            for e in history
        ]
        paper = _paper(data, name)
        rows.append([
            title_of(data, name), str(run["seed"]),
            spread_text([e["test_accuracy"] for e in history]),
            spread_text(_percent([e["accuracy"] for e in history])),
            spread_text([e["loss"] for e in history], 3),
            spread_text([e["seconds"] / steps for e in history], 3),
            "–" if paper is None else _pair(paper.seconds, 4),
            spread_text(joules, 2), "–" if paper is None else _pair(paper.joules, 2),
            spread_text(grams, 2),
            "–" if paper is None else _pair((1e6 * paper.kg[0], 1e6 * paper.kg[1]), 3),
        ])  # fmt: skip
    label = labels_of(data)
    heading = ["configuration", "seed", "test, %", "train, %", "loss", "s per step", "paper",
               f"J per step, {label}", "paper", f"mg CO2 per step, {label}", "paper"]  # fmt: skip
    count = data["settings"]["curve_images"]
    return [
        "### The paper's spread: mean ± standard deviation over the epochs of one run",
        "",
        f"Test accuracy on {count:,} test images, simulated. Seconds and joules are those of the "
        f"run as it went, whatever else the machine did; the next table was measured in turn.",
        "",
        *table(heading, rows),
    ]


def _timing(data: Data) -> Mapping[str, Any]:
    found: Mapping[str, Any] = data["entries"].get("timing") or {}
    return found


def _steps(data: Data) -> list[str]:
    timing = _timing(data)
    if not timing:
        return []
    rows = []
    for name in timing["configurations"]:
        step, paper = timing["step"][name], _paper(data, name)
        use = step.get("energy") or {}
        rows.append([
            title_of(data, name), number(step["seconds"], 3),
            "–" if paper is None else _pair(paper.seconds, 4),
            number(use.get("joules"), 2), "–" if paper is None else _pair(paper.joules, 2),
            number(_milli(use.get("co2_grams")), 3),
            "–" if paper is None else f"{1e6 * paper.kg[0]:.2f}",
            number(_mib(step.get("peak_bytes")), 0),
        ])  # fmt: skip
    label = next(
        (s["energy"]["label"] for s in timing["step"].values() if s.get("energy")), "not metered"
    )
    heading = ["configuration", "s per step", "paper", f"J per step, {label}", "paper",
               f"mg CO2, {label}", "paper", "peak memory, MiB"]  # fmt: skip
    return [
        "### A training step, configurations in turn",
        "",
        *table(heading, rows),
        f"Batches of {timing['batch_size']}, {timing['threads']} thread"
        f"{'s' * (timing['threads'] > 1)}; medians. Training simulates the integers in float32, "
        f"so fewer bits save neither time nor memory here. Peak memory: growth of a fresh "
        f"process over three steps.",
        "",
    ]


def _regions(data: Data) -> list[str]:
    """The same joules in other countries' electricity."""
    timing = _timing(data)
    known, energy = timing.get("intensity"), timing.get("energy")
    if not known or not energy:
        return []
    rows = []
    for name in names_of(data):
        if name in energy:
            kwh = energy[name]["joules"] / 3.6e6
            rows.append([title_of(data, name), *(number(1e3 * kwh * g, 3) for g in known.values())])
    heading = ["mg CO2 per 1,000 images in", *(f"{c} ({g:.0f} g/kWh)" for c, g in known.items())]
    return table(heading, rows)


def _dynamic(data: Data, prefix: str) -> list[str]:
    """Where the widths that follow statistics went."""
    runs = runs_of(data, "dynamic")
    if "dynamic" not in names_of(data):
        return []
    ends = []
    for run in runs:
        last = run["history"][-1]
        means = [statistics.mean(last[key].values()) for key in ("widths", "input_widths")]
        ends.append(
            f"seed {run['seed']}: {means[0]:.2f} bits in weights and {means[1]:.2f} in inputs"
        )
    return [
        f"Dynamic widths ended at means over layers of {'; '.join(ends)}.",
        "",
        f"![Widths that follow gradients and activations]({prefix}widths.png)",
        "",
    ]


def _milli(value: float | None) -> float | None:
    return None if value is None else 1000 * value


def _mib(value: float | None) -> float | None:
    return None if value is None else value / 2**20


def _native(data: Data) -> list[str]:
    """What the paper could not do: the same plans on kernels for their widths."""
    timing = _timing(data)
    rows, labels = [], set()
    for name in names_of(data):
        run = runs_of(data, name)[0]
        times = timing.get("latency", {}).get(name, {})
        use = (timing.get("energy") or {}).get(name)
        if use:
            labels.add(use["label"])
        rows.append([
            title_of(data, name), number(run["bytes"], 0),
            f"{100 * run['bytes'] / run['float_bytes']:.1f} %",
            number(run["weight_bytes"] / 1e3, 1), number(run["activation_bytes"] / 1e3, 1),
            number(run["bops"] / 1e9, 3), f"{100 * run['native_share']:.1f} %",
            number(times.get("1", {}).get("median"), 3),
            number(times.get("16", {}).get("median"), 3),
            number(use and use["joules"], 2), number(use and _milli(use["co2_grams"]), 3),
            number(run["modelled_energy_uj"], 1),
        ])  # fmt: skip
    label = ", ".join(sorted(labels)) or "not metered"
    heading = ["configuration", "file, bytes", "of float", "weights read, kB", "activations, kB",
               "GBOPs", "native", "ms, 1 image", "ms, 16 images", f"J per 1,000 images, {label}",
               f"mg CO2 per 1,000, {label}", "modelled µJ per image"]  # fmt: skip
    return [
        "### The same plans, native",
        "",
        "Compiled engine; full precision is torch (channels_last). *native*: share of the "
        "multiply-adds that run on integer kernels; conv1 and the classifier are float. Weights "
        "and activations: bytes read and written for one image, counted. Modelled energy scales "
        "published figures below 8 bits and is no measurement.",
        "",
        *table(heading, rows),
        *_regions(data),
    ]
