"""Pictures of the studies."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..plan import LayerPlan, Plan
from ..plot import bars, fingerprint, ribbon, widths
from ..plot.style import INK, LINE, MUTED, canvas, finish, heading
from .markdown import data_name
from .papers import FIGURE6
from .text_adalayernet import runs_of as models_of
from .text_green import names_of, runs_of, title_of

__all__ = ["curves", "layers_beside", "native", "write_pictures"]

# Okabe and Ito: apart for colour-blind eyes, too; the line's form says it a second time.
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
FORMS: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)),
                          (0, (3, 1)), (0, (2, 2)), (0, (8, 2)))  # fmt: skip
MARKS = ("o", "^", "v", "s", "D", "P", "X")


def write_pictures(data: Mapping[str, Any], folder: Path, prefix: str = "") -> list[Path]:
    """The pictures of a study for which there are data; returns the files.

    Args:
        data: from ``load_study``.
        folder: where they go.
        prefix: in front of their names.
    """
    if data["study"] == "green":
        if not names_of(data):
            return []
        files = [folder / f"{prefix}curves.png"]
        curves(data, files[0])
        if data["entries"].get("timing"):
            files.append(folder / f"{prefix}native.png")
            native(data, files[1])
        if "dynamic" in names_of(data):
            files.append(folder / f"{prefix}widths.png")
            widths(runs_of(data, "dynamic")[0]["history"], files[-1])
        return files
    runs = models_of(data, "adalayer")
    if not runs:
        return []
    plan = plan_of(runs[0])
    names = ("fingerprint", "ribbon", "bars", "layers")
    files = [folder / f"{prefix}{name}.png" for name in names]
    for draw, file in zip((fingerprint, ribbon, bars), files, strict=False):
        draw(plan, file, dpi=110)
    layers_beside(plan, files[3])
    return files


def plan_of(run: Mapping[str, Any]) -> Plan:
    """A compressed model's plan, as the study keeps it."""
    layers, scores = {}, {}
    flops = run["layer_flops"]
    for name, entry in run["layers"].items():
        layers[name] = LayerPlan(
            name, entry["kind"], entry["params"], entry["bits"], entry["sparsity"]
        )
        scores[name] = {"F": flops[name]}
        if entry["A"] is not None:
            scores[name]["A"] = entry["A"]
    return Plan(layers, method=run["method"], hyper=run["hyper"], scores=scores)


def _frame(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_color(LINE)


def curves(data: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> Any:
    """The paper's Figures 2 and 3: training loss, training and test accuracy over the epochs.

    Lines are means over seeds, bands reach from the lowest to the highest seed.
    """
    from matplotlib.ticker import MaxNLocator

    figure = canvas(12, 4.4)
    panels = (
        ("accuracy", 100.0, "training accuracy, %"),
        ("test_accuracy", 1.0, "test accuracy, %"),
        ("loss", 1.0, "training loss"),
    )
    names = names_of(data)
    handles: list[Any] = []
    for column, (key, factor, label) in enumerate(panels):
        axes = figure.add_axes((0.05 + 0.325 * column, 0.22, 0.265, 0.6))
        _frame(axes, "epoch", label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawn = []
        for position, name in enumerate(names):
            series = [[factor * e[key] for e in run["history"]] for run in runs_of(data, name)]
            # A run that stopped early ends its line; the mean goes on over the others.
            length = max(map(len, series))
            at = [[s[i] for s in series if i < len(s)] for i in range(length)]
            x = range(1, length + 1)
            colour = COLOURS[position % len(COLOURS)]
            axes.fill_between(x, list(map(min, at)), list(map(max, at)), color=colour, alpha=0.12,
                              linewidth=0)  # fmt: skip
            drawn += axes.plot(
                x, [statistics.mean(values) for values in at], color=colour, linewidth=1.5,
                linestyle=FORMS[position % len(FORMS)], label=title_of(data, name),
                marker="o" if length == 1 else None, markersize=4,
            )  # fmt: skip
        handles = drawn
    figure.legend(
        handles=handles, loc="lower center", ncol=min(len(names), 6), fontsize=8.5, frameon=False,
        labelcolor=INK,
    )  # fmt: skip
    settings, seeds = data["settings"], len(data["wanted"]["seeds"])
    heading(
        figure,
        "Accuracy and loss while training",
        f"{data_name(data)}, epochs of {settings['images']:,} images; mean of {seeds} "
        f"seed{'s' * (seeds > 1)}, bands from lowest to highest",
    )
    return finish(figure, path, 100)


def native(data: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> Any:
    """Test accuracy against milliseconds per image, the file's size, and joules where metered."""
    timing = data["entries"]["timing"]
    energy = timing.get("energy") or {}
    labels = ["ms per image, batch 1", "file, kB"]
    if energy:
        used = next(iter(energy.values()))["label"]
        labels.append(f"J per 1,000 images, {used}")
    inches = 2.4 + 3.3 * len(labels)
    figure = canvas(inches, 4.2)
    names = [name for name in names_of(data) if name in timing["latency"]]
    handles: list[Any] = []
    for column, label in enumerate(labels):
        left = (0.65 + 3.25 * column) / inches
        axes = figure.add_axes((left, 0.14, 2.6 / inches, 0.66))
        _frame(axes, label, "test accuracy, %" if column == 0 else "")
        drawn = []
        for position, name in enumerate(names):
            runs = runs_of(data, name)
            x = (
                timing["latency"][name]["1"]["median"],
                runs[0]["bytes"] / 1e3,
                energy.get(name, {}).get("joules", 0.0),
            )[column]
            accuracies = [run["test_accuracy"] for run in runs]
            mean = statistics.mean(accuracies)
            span = [[mean - min(accuracies)], [max(accuracies) - mean]]
            drawn.append(axes.errorbar(
                [x], [mean], yerr=span, fmt=MARKS[position % len(MARKS)], markersize=7,
                color=COLOURS[position % len(COLOURS)], markeredgecolor=INK, capsize=3,
                label=title_of(data, name),
            ))  # fmt: skip
        axes.set_xlim(left=0)
        handles = drawn
    figure.legend(
        handles=handles, loc="center left",
        bbox_to_anchor=((0.4 + 3.25 * len(labels)) / inches, 0.47), fontsize=8.5,
        frameon=False, labelcolor=INK,
    )  # fmt: skip
    heading(
        figure,
        "The same plans, native",
        f"compiled engine, {timing['threads']} thread{'s' * (timing['threads'] > 1)}; full "
        f"precision: torch; bars from lowest to highest seed",
    )
    return finish(figure, path, 110)


def layers_beside(plan: Plan, path: str | os.PathLike[str] | None = None) -> Any:
    """The paper's Figure 6 in bars: bits and pruning of every layer, ours and the paper's."""
    figure = canvas(12, 3.9)
    names = list(plan)
    for column, label in enumerate(("bits", "pruned, %")):
        axes = figure.add_axes((0.05 + 0.485 * column, 0.2, 0.44, 0.58))
        _frame(axes, "", label)
        ours = [
            (layer.bits or 32) if column == 0 else 100 * layer.sparsity
            for layer in plan.layers.values()
        ]
        places = range(len(names))
        axes.bar([p - 0.2 for p in places], ours, width=0.38, color="#0072b2", label="ours")
        known = [(p, FIGURE6[name]) for p, name in enumerate(names) if name in FIGURE6]
        axes.bar(
            [p + 0.2 for p, _ in known],
            [row.bits if column == 0 else row.pruned for _, row in known],
            width=0.38, facecolor="none", edgecolor=MUTED, hatch="////", linewidth=0.8,
            label="the paper",
        )  # fmt: skip
        axes.set_xticks(places, names, rotation=45, ha="right", rotation_mode="anchor")
        axes.grid(axis="x", visible=False)
        if column == 0:
            axes.legend(fontsize=8.5, frameon=False, labelcolor=INK, loc="lower right",
                        bbox_to_anchor=(1, 1), ncol=2)  # fmt: skip
    heading(
        figure,
        "Layer by layer, beside the paper's Figure 6",
        f"{plan.average_bits:.2f} bits per weight in all; the paper's table leaves out the "
        f"classifier",
    )
    return finish(figure, path, 100)
