"""What the command line's ``compress`` does: data in, three files and a report out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from adalayer_native import files, ops
from adalayer_native._files import write_text_atomic
from adalayer_native.allocation import Budget, float_bytes
from adalayer_native.compress import Compressed, compress
from adalayer_native.data import ImageDataset, Loaders, digits, loaders, open_dataset
from adalayer_native.errors import FileFormatError
from adalayer_native.measure import accuracy, model_milliseconds
from adalayer_native.models import get_model, load_weights
from adalayer_native.report import comparison_table, figure6_table

__all__ = ["CompressJob", "layer_entries", "run_compress"]


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
    epochs: int = 2
    lr: float = 0.01
    distill: bool = True
    calibration: int = 512
    image_size: int = 32
    batch_size: int = 128
    classes: int | None = None
    seed: int = 0
    threads: int | None = None
    progress: bool = True


def open_splits(job: CompressJob) -> tuple[ImageDataset, ImageDataset]:
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
    if not job.weights.exists():
        raise FileFormatError(f"{job.weights}: no such file")
    job.out.mkdir(parents=True, exist_ok=True)
    train, test = open_splits(job)
    model = get_model(job.model, job.classes or len(train.classes))
    load_weights(model, job.weights)
    model.eval()
    data = loaders(
        train, test, batch_size=job.batch_size, calibration=job.calibration, seed=job.seed
    )
    options: dict[str, Any] = {}
    if job.layer_bits is not None:
        options["bits"] = job.layer_bits
    if job.stages is not None:
        options["stages"] = job.stages
    result = compress(
        model,
        data.calibration,
        job.budget,
        method=job.method,
        train_loader=data.train,
        epochs=job.epochs,
        distill=job.distill,
        work_dir=job.out / "work",
        allocate_options=options,
        finetune_options={"lr": job.lr},
        seed=job.seed,
        progress=job.progress,
    )
    return write_results(job, model, result, data)


def write_results(
    job: CompressJob, model: nn.Module, result: Compressed, data: Loaders
) -> dict[str, Any]:
    """Saves plan, packed model and report; prints the tables to standard error."""
    native = result.model
    result.plan.save(job.out / "plan.json")
    packed = job.out / "model.safetensors"
    size = files.save(native, packed)
    original = float_bytes(model)
    sample, _ = next(iter(data.test))
    one, sixteen = (
        model_milliseconds({"float": model, "native": native}, sample[:count]) for count in (1, 16)
    )
    report: dict[str, Any] = {
        "model": job.model,
        "method": result.plan.method,
        "budget": str(job.budget) if job.budget else None,
        "hyper": result.plan.hyper,
        "seed": job.seed,
        "epochs": job.epochs if result.history is not None else 0,
        "float_accuracy": accuracy(
            model, data.test, title="float test accuracy", progress=job.progress
        ),
        "accuracy": accuracy(
            native, data.test, title="native test accuracy", progress=job.progress
        ),
        "test_images": len(data.test.dataset),
        "bytes": size,
        "float_bytes": original,
        "size_fraction": size / original,
        "average_bits": result.plan.average_bits,
        "float_ms": one["float"],
        "native_ms": one["native"],
        "float_ms_batch16": sixteen["float"],
        "native_ms_batch16": sixteen["native"],
        "threads": ops.get_num_threads(),
        "isa": ops.active_isa(),
        "kept_float": result.kept_float,
        "layers": layer_entries(result, packed),
    }
    write_text_atomic(job.out / "report.json", json.dumps(report, indent=2) + "\n")
    console = Console(stderr=True)
    console.print(figure6_table(result.plan))
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
    console.print(f"written to {job.out}: plan.json, model.safetensors, report.json")
    return report


def layer_entries(result: Compressed, packed: Path) -> list[dict[str, Any]]:
    """One entry per layer of the plan: what was decided, and what the file holds of it."""
    stored = {e["name"]: e for e in files.describe(packed) if e["name"] is not None}
    entries = []
    for name in result.plan:
        layer = result.plan[name]
        entry: dict[str, Any] = {
            "name": name,
            "kind": layer.kind,
            "params": layer.params,
            "bits": layer.bits if name in stored else None,
            "activation_bits": layer.activation_bits,
            "planned_sparsity": layer.sparsity,
        }
        if name in stored:
            file = stored[name]
            entry |= {"encoding": file["encoding"], "bytes": file["bytes"]}
        if result.scores is not None:
            score = result.scores[name]
            entry |= {"A": score.A, "F": score.F, "R": score.R, "I": score.I}
        entries.append(entry)
    return entries
