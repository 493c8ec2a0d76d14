"""``adalayer demo``: the main job on real handwritten digits, in minutes on two cores."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console

from adalayer_native import files, ops
from adalayer_native._files import write_text_atomic
from adalayer_native.allocation import Budget, float_bytes, pareto
from adalayer_native.compress import compress
from adalayer_native.data import digits, loaders
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

# The digits are few and alike: so many images rank plans as well as more would, in less time.
CALIBRATION = 128
FINETUNE_EPOCHS = 2
FRONTIER = 16  # points of the report's frontier, from a table of these sparsities
SPARSITIES = (0.0, 0.45, 0.75)


def run_demo(out: Path, *, size: float = 0.10, epochs: int = 5, seed: int = 0) -> None:
    """Trains, compresses uniformly and layer by layer under the same budget, converts, compares.

    Writes plan.json, uniform.safetensors, adalayer.safetensors, ribbon.png, report.json and
    report.html to ``out``.

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
    train, test = digits(32)
    data = loaders(train, test, batch_size=64, calibration=CALIBRATION, augment=False, seed=seed)
    console.print(
        f"AdaLayerNet on scikit-learn's handwritten digits: {len(train)} images to train, "
        f"{len(test)} to test; kernels: {ops.active_isa()}, {ops.get_num_threads()} threads"
    )
    torch.manual_seed(seed)
    model = adalayernet(len(train.classes))
    fit(model, data.train, epochs, lr=0.05, seed=seed)

    budget = Budget(size=size)
    results = {}
    for method in ("uniform", "adalayer"):
        console.print(f"compressing to {size:.1%} of the float file, method {method}")
        results[method] = compress(
            model,
            data.calibration,
            budget,
            method=method,
            train_loader=data.train,
            epochs=FINETUNE_EPOCHS,
            seed=seed,
        )
    sizes = {
        name: files.save(result.model, out / f"{name}.safetensors")
        for name, result in results.items()
    }
    plan = results["adalayer"].plan
    plan.save(out / "plan.json")
    ribbon(plan, out / "ribbon.png")

    models = {"float": model, **{name: result.model for name, result in results.items()}}
    x, _ = next(iter(data.test))
    milliseconds = model_milliseconds(models, x[:1], seconds=4)
    titles = {"float": "float", "uniform": "uniform", "adalayer": "layer-wise"}
    found = {
        name: hits(each, data.test, title=f"testing {titles[name]}")
        for name, each in models.items()
    }
    rows = [
        {
            "name": titles[name],
            "accuracy": found[name].accuracy,
            "bytes": sizes.get(name, float_bytes(model)),
            "ms": milliseconds[name],
        }
        for name in models
    ]
    console.print(figure6_table(plan))
    console.print(comparison_table(rows))
    frontier = pareto(
        model,
        data.calibration,
        points=FRONTIER,
        options={"sparsities": SPARSITIES},
        tables=out / "work" / "tables",
    )
    report = record(
        "AdaLayerNet on digits",
        model,
        results["adalayer"],
        out / "adalayer.safetensors",
        x,
        {
            "budget": str(budget),
            "seed": seed,
            "epochs": FINETUNE_EPOCHS,
            "float_accuracy": rows[0]["accuracy"],
            "accuracy": rows[2]["accuracy"],
            "classes": class_rows(test.classes, found["float"], found["adalayer"]),
            "test_images": len(test),
            "float_ms": milliseconds["float"],
            "native_ms": milliseconds["adalayer"],
            "frontier": [
                {key: value for key, value in point.items() if key != "layers"}
                for point in frontier.as_dicts()
            ],
        },
    )
    write_text_atomic(out / "report.json", json.dumps(report, indent=2) + "\n")
    write_page(load_run(out), out / "report.html")
    for line in (
        f"architecture ribbon: {out / 'ribbon.png'}",
        f"report: {out / 'report.html'}, one page with all pictures and layers",
        f"packed model: {out / 'adalayer.safetensors'} (adalayer info shows it)",
    ):
        console.print(line, markup=False, soft_wrap=True)  # a path that is cut cannot be copied
