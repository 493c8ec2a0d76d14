"""What the command line's ``compress`` and ``train`` do: data in, files and a report out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from adalayer_native import files
from adalayer_native._files import write_atomic, write_text_atomic
from adalayer_native.allocation import Budget, float_bytes, pareto
from adalayer_native.compress import Compressed, compress
from adalayer_native.data import Batches, ImageDataset, Loaders, digits, loaders, open_dataset
from adalayer_native.energy import Meter
from adalayer_native.errors import BudgetError, EnergyError, FileFormatError, UnsupportedModelError
from adalayer_native.importance.outputs import has_logits, logits_of
from adalayer_native.measure import accuracy, hits, inference_energy, model_milliseconds
from adalayer_native.models import get_model, load_weights
from adalayer_native.report import (
    class_rows,
    comparison_table,
    error_table,
    figure6_table,
    record,
)
from adalayer_native.training import fit

__all__ = ["CompressJob", "TrainJob", "run_compress", "run_train"]


@dataclass
class CompressJob:
    """Arguments of ``adalayer compress``; see its help."""

    model: str
    weights: Path
    data: str
    out: Path
    budget: Budget | None
    method: str = "adalayer"
    layer_bits: Sequence[int] | None = None
    stages: Sequence[str] | None = None
    fixed: Mapping[str, int] | None = None
    exclude: Sequence[str] = ()
    epochs: int = 2
    lr: float = 0.01
    distill: bool = True
    repair: bool = True
    calibration: int = 512
    image_size: int = 32
    batch_size: int = 128
    classes: int | None = None
    seed: int = 0
    threads: int | None = None
    criterion: str | None = None
    frontier: bool | None = None
    energy: bool = False
    country: str | None = None
    progress: bool = True


@dataclass
class TrainJob:
    """Arguments of ``adalayer train``; see its help."""

    model: str
    data: str
    out: Path
    epochs: int
    lr: float = 0.1
    label_smoothing: float = 0.1
    weight_decay: float = 5e-4
    augment: bool = True
    image_size: int = 32
    batch_size: int = 128
    classes: int | None = None
    seed: int = 0
    threads: int | None = None
    progress: bool = True


def open_splits(job: CompressJob | TrainJob) -> tuple[ImageDataset, ImageDataset]:
    """(train, test) of the job's data."""
    if job.data == "digits":
        return digits(job.image_size)
    train, test = (
        open_dataset(job.data, split, job.image_size, progress=job.progress)
        for split in ("train", "test")
    )
    return train, test


def run_compress(job: CompressJob) -> dict[str, Any]:
    """Runs the job and returns the report that it also writes to ``OUT/report.json``.

    Raises:
        AdaError: bad arguments, data or weights. OSError: the output cannot be written.
    """
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    # What is cheap to check comes first: nobody should wait for minutes to read about a typo.
    if job.budget is None and job.method in ("adalayer", "uniform", "optimal", "rl"):
        more = ", --latency, --bops, --energy or --loss" if job.method == "optimal" else ""
        raise BudgetError(f"method {job.method!r} needs a budget: --size, --bytes or --bits{more}")
    if not job.weights.is_file():
        raise FileFormatError(f"weight file {os.fspath(job.weights)!r} does not exist")
    if job.country is not None and not job.energy:
        raise EnergyError("a country is for the CO2 of the energy used: give --energy-use, too")
    # A missing extra or an unknown country shows now, too.
    meter = Meter(country=job.country) if job.energy else None
    # Also shows now, not at the end, whether the directory can be written.
    write_text_atomic(job.out / "work" / "command.json", json.dumps(arguments(job), indent=2))
    train, test = open_splits(job)
    model = build(job, len(train.classes))
    load_weights(model, job.weights)
    model.eval()
    data = loaders(
        train, test, batch_size=job.batch_size, calibration=job.calibration, seed=job.seed
    )
    check_fit(job, model, data.calibration)
    test.decode()  # an unreadable image shows before the work, not after it
    if job.epochs > 0:
        train.decode()
    options: dict[str, Any] = {}
    if job.layer_bits is not None:
        options["bits"] = job.layer_bits
    if job.stages is not None:
        options["stages"] = job.stages
    if job.fixed:
        options["fixed"] = dict(job.fixed)
    if job.exclude:
        options["exclude"] = list(job.exclude)
    with meter or nullcontext():
        result = _compressed(job, model, data, options)
    return write_results(job, model, result, data, meter)


def _compressed(
    job: CompressJob, model: nn.Module, data: Loaders, options: dict[str, Any]
) -> Compressed:
    return compress(
        model,
        data.calibration,
        job.budget,
        method=job.method,
        train_loader=data.train,
        epochs=job.epochs,
        distill=job.distill,
        repair=job.repair,
        work_dir=job.out / "work",
        allocate_options=options,
        finetune_options={"lr": job.lr},
        criterion=job.criterion,
        seed=job.seed,
        progress=job.progress,
    )


def arguments(job: CompressJob | TrainJob) -> dict[str, Any]:
    """The job as JSON values, for a reader of the work directory."""
    return {key: value if _plain(value) else str(value) for key, value in vars(job).items()}


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, dict))


def build(job: CompressJob | TrainJob, classes: int) -> nn.Module:
    """The job's model."""
    if ":" in job.model and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as ``python -m`` does
    return get_model(job.model, job.classes or classes)


def check_fit(job: CompressJob | TrainJob, model: nn.Module, data: Batches) -> None:
    """Tries one image.

    Raises:
        UnsupportedModelError: the model cannot take the images, or does not return one value per
            class.
    """
    x, _ = next(iter(data))
    shape = tuple(x[:1].shape)
    try:
        with torch.inference_mode():
            output = model(x[:1])
    except (RuntimeError, ValueError, TypeError) as error:
        raise UnsupportedModelError(
            f"model {job.model!r} cannot take images of shape {shape} (--image-size "
            f"{job.image_size}): {error}"
        ) from error
    classes = len(data.dataset.classes)
    out = logits_of(output) if has_logits(output) else output
    if not isinstance(out, torch.Tensor) or out.dim() != 2 or out.shape[1] != classes:
        got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise UnsupportedModelError(
            f"model {job.model!r} must return logits of shape (N, {classes}) for the {classes} "
            f"classes of the data, got {got}"
        )


def write_results(
    job: CompressJob,
    model: nn.Module,
    result: Compressed,
    data: Loaders,
    meter: Meter | None = None,
) -> dict[str, Any]:
    """Saves plan, packed model and report; prints the tables to standard error."""
    # Both in the layout in which they are fastest on a CPU, and measured alike.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # no stub for it
    native = result.model
    result.plan.save(job.out / "plan.json")
    packed = job.out / "model.safetensors"
    size = files.save(native, packed)
    original = float_bytes(model)
    sample, _ = next(iter(data.test))
    one, sixteen = (
        model_milliseconds({"float": model, "native": native}, sample[:count]) for count in (1, 16)
    )
    before, after = (
        hits(each, data.test, title=f"{name} test accuracy", progress=job.progress)
        for name, each in (("float", model), ("native", native))
    )
    more: dict[str, Any] = {
        "budget": str(job.budget) if job.budget else None,
        "criterion": job.criterion,
        "seed": job.seed,
        "epochs": job.epochs if result.history is not None else 0,
        "float_accuracy": before.accuracy,
        "accuracy": after.accuracy,
        "classes": class_rows(data.test.dataset.classes, before, after),
        "test_images": len(data.test.dataset),
        "float_ms": one["float"],
        "native_ms": one["native"],
        "float_ms_batch16": sixteen["float"],
        "native_ms_batch16": sixteen["native"],
        "energy": _energy(job, {"float": model, "native": native}, sample[:16], meter),
        "frontier": _frontier(job, model, data),
    }
    report = record(job.model, model, result, packed, sample, more)
    write_text_atomic(job.out / "report.json", json.dumps(report, indent=2) + "\n")
    console = Console(stderr=True)
    console.print(figure6_table(result.plan))
    if result.repair is not None:
        console.print(result.repair)
    if any("E" in entry for entry in (result.plan.scores or {}).values()):
        console.print(error_table(result.plan))
    console.print(
        comparison_table(
            [
                {
                    "name": "float",
                    "accuracy": report["float_accuracy"],
                    "bytes": original,
                    "ms": report["float_ms"],
                },
                {
                    "name": result.plan.method,
                    "accuracy": report["accuracy"],
                    "bytes": size,
                    "ms": report["native_ms"],
                },
            ]
        )
    )
    for part in result.float_rest.parts if result.float_rest else ():
        text = f"{part.name} stays float, {100 * part.share:.2g} % of the work: {part.reason}"
        console.print(text, markup=False, soft_wrap=True)
    written = (
        f"written to {job.out}: plan.json, model.safetensors, report.json "
        f"(adalayer report {job.out} makes a page of them)"
    )
    console.print(written, markup=False, soft_wrap=True)  # a path that is cut cannot be copied
    return report


def run_train(job: TrainJob) -> dict[str, Any]:
    """Trains a float network and returns the report, which it also writes beside the weights.

    ``OUT`` gets the weights, ``OUT`` with the ending ``.json`` the report and with
    ``.checkpoint.safetensors`` the state of the run. Test images are only looked at in the end.

    Raises:
        AdaError: bad arguments, data or model. OSError: the output cannot be written.
    """
    from safetensors.torch import save as serialise

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    report_file = job.out.with_suffix(".json")
    # Also shows now, not at the end, whether the directory can be written.
    write_text_atomic(report_file, json.dumps({"arguments": arguments(job)}, indent=2) + "\n")
    train, test = open_splits(job)
    torch.manual_seed(job.seed)
    model = build(job, len(train.classes))
    data = loaders(train, test, batch_size=job.batch_size, augment=job.augment, seed=job.seed)
    data.train.drop_last = len(train) > job.batch_size  # batch norm of a few images is noise
    check_fit(job, model, data.calibration)
    test.decode()  # an unreadable image shows before the work, not after it
    train.decode()
    history = fit(
        model,
        data.train,
        job.epochs,
        lr=job.lr,
        weight_decay=job.weight_decay,
        label_smoothing=job.label_smoothing,
        checkpoint=job.out.with_suffix(".checkpoint.safetensors"),
        seed=job.seed,
        progress=job.progress,
    )
    weights = {k: v.detach().contiguous().clone() for k, v in model.state_dict().items()}
    write_atomic(job.out, serialise(weights))
    report: dict[str, Any] = {
        "arguments": arguments(job),
        "accuracy": accuracy(model, data.test, title="test accuracy", progress=job.progress),
        "test_images": len(test),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bf16": history.amp,
        "epochs": history.epochs,
    }
    write_text_atomic(report_file, json.dumps(report, indent=2) + "\n")
    written = f"written to {job.out}: test accuracy {report['accuracy']:.2f} %"
    Console(stderr=True).print(written, markup=False, soft_wrap=True)
    return report


def _energy(
    job: CompressJob, models: Mapping[str, nn.Module], x: torch.Tensor, meter: Meter | None
) -> dict[str, Any] | None:
    """What the compression used, and each model per 1,000 images, in batches of ``x``."""
    if meter is None:
        return None
    uses = inference_energy(models, x, country=job.country)
    return {
        "compression": meter.use.as_dict(),
        **{name: use.as_dict() for name, use in uses.items()},
    }


def _frontier(job: CompressJob, model: nn.Module, data: Loaders) -> list[dict[str, Any]] | None:
    """Points of the frontier; for method "optimal" its tables are there already."""
    if not (job.method == "optimal" if job.frontier is None else job.frontier):
        return None
    found = pareto(
        model,
        data.calibration,
        options={"measure": job.criterion} if job.criterion else None,
        fixed=job.fixed,
        exclude=job.exclude,
        tables=job.out / "work" / "tables",
        progress=job.progress,
    )
    keep = ("bytes", "size", "average_bits", "predicted_loss")
    return [{key: point[key] for key in keep} for point in found.as_dicts()]
