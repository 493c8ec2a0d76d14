"""``adalayer demo``: the main job on real handwritten digits, in minutes on two cores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from adalayer_native import files, ops
from adalayer_native._console import print_table
from adalayer_native._files import write_text_atomic
from adalayer_native.allocation import Budget, float_bytes, pareto
from adalayer_native.compress import compress
from adalayer_native.data import Loaders, digits, loaders
from adalayer_native.engine import Engine, compile
from adalayer_native.jobs.compiling import save_engine
from adalayer_native.jobs.normalise import Normalisation
from adalayer_native.measure import hits, model_milliseconds
from adalayer_native.models import adalayernet
from adalayer_native.plot import ribbon
from adalayer_native.report import (
    class_rows,
    comparison_table,
    figure6_table,
    load_run,
    record,
    write_page,
)
from adalayer_native.training import fit

__all__ = ["run_demo"]

# The digits have 8x8 pixels: half the network's usual size shows as much in a quarter of the time.
PIXELS = 16
# The digits are few and alike: so many images rank plans as well as more would, in less time.
CALIBRATION = 128
FINETUNE_EPOCHS = 2
TIMING_SECONDS = 2.0
FRONTIER = 16  # points of the report's frontier, from a table of these sparsities
SPARSITIES = (0.0, 0.45, 0.75)


def run_demo(out: Path, *, size: float = 0.10, epochs: int = 5, seed: int = 0) -> None:
    """Trains, compresses uniformly and layer by layer under the same budget, converts, compares.

    Writes plan.json, uniform.safetensors, adalayer.safetensors, adalayer.ada, ribbon.png,
    report.json and report.html to ``out``. Times are those of the engines.

    Args:
        out: directory for the results.
        size: budget, as a fraction of the float file.
        epochs: training epochs of the float network.
        seed: of everything random.

    Raises:
        BudgetError: ``size`` is not reachable. OSError: ``out`` cannot be written.
    """
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    train, test = digits(PIXELS)
    data = loaders(train, test, batch_size=64, calibration=CALIBRATION, augment=False, seed=seed)
    console.print(
        f"AdaLayerNet on scikit-learn's handwritten digits: {len(train)} images to train, "
        f"{len(test)} to test; kernels: {ops.active_isa()}, {ops.get_num_threads()} threads"
    )
    torch.manual_seed(seed)
    model = adalayernet(len(train.classes))
    fit(model, data.train, epochs, lr=0.05, seed=seed)

    x, _ = next(iter(data.test))
    timed: dict[str, nn.Module | Engine] = {"float": model}
    found = {"float": hits(model, data.test, title="testing float")}
    rows: list[dict[str, Any]] = [
        {"name": "float", "accuracy": found["float"].accuracy, "bytes": float_bytes(model)}
    ]
    for method, name in (("uniform", "uniform"), ("adalayer", "layer-wise")):
        console.print(f"compressing to {size:.1%} of the float file, method {method}")
        result = compress(
            model,
            data.calibration,
            Budget(size=size),
            method=method,
            train_loader=data.train,
            epochs=FINETUNE_EPOCHS,
            seed=seed,
        )
        engine = compile(result.model, x[:1], policy="native")
        timed[name] = engine
        found[name] = hits(result.model, data.test, title=f"testing {name}")
        saved = files.save(result.model, out / f"{method}.safetensors")
        rows.append({"name": name, "accuracy": found[name].accuracy, "bytes": saved})
        if method == "adalayer":
            print_table(figure6_table(result.plan), console)
        # All of them anew: times belong together only where they were taken in turn.
        times = model_milliseconds(timed, x[:1], seconds=TIMING_SECONDS)
        for row in rows:
            row["ms"] = times[row["name"]]
        # The first table comes early: most of the time is spent behind it.
        print_table(comparison_table(rows), console)
    result.plan.save(out / "plan.json")
    normalisation = Normalisation(train.mean, train.std, "digits")
    save_engine(engine, out / "adalayer.ada", normalisation, train.classes)
    ribbon(result.plan, out / "ribbon.png")
    about = {
        "budget": str(Budget(size=size)),
        "seed": seed,
        "epochs": FINETUNE_EPOCHS,
        "float_accuracy": rows[0]["accuracy"],
        "accuracy": rows[-1]["accuracy"],
        "classes": class_rows(test.classes, found["float"], found["layer-wise"]),
        "test_images": len(test),
        "float_ms": times["float"],
        "engine_ms": times["layer-wise"],
        "frontier": _frontier(model, data, out),
    }
    packed = out / "adalayer.safetensors"
    report = record("AdaLayerNet on digits", model, result, packed, x, about, engine=engine)
    write_text_atomic(out / "report.json", json.dumps(report, indent=2) + "\n")
    write_page(load_run(out), out / "report.html")
    for line in (
        f"architecture ribbon: {out / 'ribbon.png'}",
        f"report: {out / 'report.html'}, one page with all pictures and layers",
        f"packed model: {packed} (adalayer info shows it)",
        f"engine: {out / 'adalayer.ada'} (adalayer serve and libadalayer run it)",
    ):
        console.print(line, markup=False, soft_wrap=True)  # a path that is cut cannot be copied


def _frontier(model: nn.Module, data: Loaders, out: Path) -> list[dict[str, Any]]:
    """Points of size against predicted loss, for the page."""
    frontier = pareto(
        model,
        data.calibration,
        points=FRONTIER,
        options={"sparsities": SPARSITIES},
        tables=out / "work" / "tables",
    )
    return [
        {key: value for key, value in point.items() if key != "layers"}
        for point in frontier.as_dicts()
    ]
