"""``compress``: checked, done, measured and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from .. import files
from .._console import print_table, say
from .._files import refuse_overwriting, write_text_atomic
from .._progress import stage
from .._stages import Stage
from .._stages import job as announced
from ..allocation import Budget, check_method, check_request, float_bytes, pareto
from ..allocation.machine_table import MachineTable
from ..allocation.optimal_settings import check_effort
from ..capture import GraphModel
from ..capture.loading import captured_on
from ..compress import Compressed, compress, kept_float, stages_of
from ..data import Loaders, loaders
from ..energy import Meter
from ..engine import Engine
from ..errors import EnergyError, PlanError, UnsupportedModelError
from ..levels import compress_levels, level_plans, level_stages
from ..measure import hits, inference_energy, model_milliseconds
from ..plan import supported_layers
from ..report import (
    COMPARISON,
    class_rows,
    comparison_table,
    compiled,
    error_table,
    figure6_table,
    record,
)
from ..training import check_learned
from .compiling import save_engine
from .job import CompressJob, arguments
from .opening import Opened, check_fit, open_model, warn_chance

__all__ = ["check_compress", "run_compress"]

RESULTS = "tests and timings"
OUTPUTS = ("plan.json", "model.safetensors", "model.ada", "report.json")


@dataclass
class _Ready:
    """What a job needs, all of it checked.

    Attributes:
        opened: model and images.
        data: the loaders over them.
        captured: the model as all steps see it.
        meter: of the energy that it uses.
        free: names of the layers that the method decides about.
    """

    opened: Opened
    data: Loaders
    captured: GraphModel
    meter: Meter | None
    free: list[str]


def _ready(job: CompressJob) -> _Ready:
    """Everything that can be found wrong before the work begins is found here, cheap things first.

    Raises:
        AdaError: bad arguments, data, model or weights.
    """
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    for name in OUTPUTS:
        refuse_overwriting(job.out / name, job.weights, job.data, job.model, job.latency_table)
    options = _options(job)
    check_effort(job.effort)
    if job.allocate is not None:
        if job.levels is not None:
            raise PlanError("--levels are repaired together; --allocate learned trains one plan")
        if job.epochs < 1:
            raise PlanError("--allocate learned needs at least one epoch")
        check_learned(job.allocate, job.budget, job.model)
    elif job.levels is None:
        check_method(
            job.method,
            job.budget,
            criterion=job.criterion,
            bits=job.layer_bits,
            stages=job.stages,
            options=options.get("options"),
        )
    if job.country is not None and not job.energy:
        raise EnergyError("a country is for the CO2 of the energy used: give --energy-use, too")
    # A missing extra or an unknown country shows now, too.
    meter = Meter(country=job.country) if job.energy else None
    opened = open_model(job)
    data = loaders(
        opened.train,
        opened.test,
        batch_size=job.batch_size,
        calibration=job.calibration,
        seed=job.seed,
    )
    check_fit(job, opened.model, data.calibration)
    opened.test.decode()  # an unreadable image shows before the work, not after it
    if job.epochs > 0:
        opened.train.decode()
    captured = captured_on(opened.model, data.calibration)
    budget, method = job.budget, job.method
    if job.allocate is not None:  # the options are those of that method
        method = "optimal"
    if job.levels is not None:  # the narrowest is the hardest
        budget, method = Budget(bits=job.levels[-1]), "optimal"
    problem = check_request(captured, budget, method=method, **options)
    return _Ready(opened, data, captured, meter, problem.free)


def _options(job: CompressJob) -> dict[str, Any]:
    """What the method is told beside the budget."""
    options: dict[str, Any] = {}
    if job.layer_bits is not None:
        options["bits"] = job.layer_bits
    if job.stages is not None:
        options["stages"] = job.stages
    if job.fixed:
        options["fixed"] = dict(job.fixed)
    if job.exclude:
        options["exclude"] = list(job.exclude)
    if job.latency_table is not None:
        options["options"] = {"latency_table": job.latency_table}
    return options


def check_compress(job: CompressJob) -> dict[str, Any]:
    """What the job would do, without doing or writing any of it.

    Raises:
        AdaError: it cannot be done.
    """
    ready = _ready(job)
    opened, layers = ready.opened, supported_layers(ready.captured)
    calibrating = len(ready.data.calibration.indices)
    weights = sum(layers[name].weight.numel() for name in ready.free)
    rest = sorted(set(layers) - set(ready.free))
    done = {
        "model": f"{job.model}: {len(ready.free)} layers with {weights:,} weights to decide about"
        + (f"; decided already, or float: {', '.join(rest)}" if rest else ""),
        "data": f"{len(opened.train):,} training images, of which {calibrating:,} calibrate; "
        f"{len(opened.test):,} test images; {len(opened.train.classes)} classes",
        "normalisation": str(opened.normalisation),
        "float accuracy": f"{warn_chance(opened, ready.data):.2f} % of the calibration images",
        "method": (
            (job.method if job.allocate is None else "bits and zeros learned while fine-tuning")
            if job.levels is None
            else f"levels of {', '.join(f'{bits:g}' for bits in job.levels)} bits"
        )
        + (f", within {job.budget}" if job.budget else "")
        + (f", on {MachineTable.load(job.latency_table).title}" if job.latency_table else "")
        + (", repair" if job.repair and job.allocate is None else "")
        + (
            f", {job.epochs} epochs of fine-tuning"
            if job.epochs and job.levels is None
            else ", no fine-tuning"
        ),
        "output": f"{job.out}: {', '.join(OUTPUTS)}",
    }
    for name, text in done.items():
        say(f"{name}: {text}")
    return done


def run_compress(job: CompressJob) -> dict[str, Any]:
    """Runs the job and returns the report that it also writes to ``OUT/report.json``.

    Raises:
        AdaError: bad arguments, data or weights. OSError: the output cannot be written.
    """
    ready = _ready(job)
    opened = ready.opened
    if job.progress:
        say(f"normalisation: {opened.normalisation}")
    # Shows now, not at the end, whether the directory can be written.
    write_text_atomic(job.out / "work" / "command.json", json.dumps(arguments(job), indent=2))
    warn_chance(opened, ready.data)
    ahead = _ahead(job, ready)
    with announced([*ahead, Stage(RESULTS, 3 * len(ready.data.test), 2)]):
        with ready.meter or nullcontext():
            result = _compressed(job, ready) if job.levels is None else _leveled(job, ready)
        with stage(RESULTS, enabled=job.progress):
            return write_results(job, ready, result)


def _ahead(job: CompressJob, ready: _Ready) -> list[Stage]:
    if job.levels is not None:
        return level_stages(ready.captured, ready.data.calibration, job.levels, job.effort)
    return stages_of(
        ready.captured,
        ready.data.calibration,
        method=job.method if job.allocate is None else None,
        repair=job.repair and job.allocate is None,
        train_loader=ready.data.train,
        epochs=job.epochs,
        effort=job.effort,
    )


def _leveled(job: CompressJob, ready: _Ready) -> Compressed:
    """The best level as a compression of its own, with the others beside it."""
    assert job.levels is not None
    common: dict[str, Any] = {
        "effort": job.effort,
        "work_dir": job.out / "work",
        "progress": job.progress,
    }
    plans = level_plans(
        ready.captured,
        ready.data.calibration,
        job.levels,
        fixed=job.fixed,
        exclude=job.exclude,
        **common,
    )
    found = compress_levels(ready.captured, ready.data.calibration, plans, seed=job.seed, **common)
    return Compressed(
        found.models[0],
        found.plans[0],
        kept_float=kept_float(ready.captured, found.plans[0]),
        repair=found.repairs[0],
        float_work=found.float_work,
        lower=list(zip(found.models[1:], found.plans[1:], strict=True)),
    )


def _compressed(job: CompressJob, ready: _Ready) -> Compressed:
    return compress(
        ready.captured,
        ready.data.calibration,
        job.budget,
        method=job.method,
        train_loader=ready.data.train,
        epochs=job.epochs,
        allocate=job.allocate,
        distill=job.distill,
        repair=job.repair,
        effort=job.effort,
        work_dir=job.out / "work",
        allocate_options=_options(job),
        finetune_options={"lr": job.lr},
        criterion=job.criterion,
        seed=job.seed,
        progress=job.progress,
    )


def write_results(job: CompressJob, ready: _Ready, result: Compressed) -> dict[str, Any]:
    """Saves plan, packed model, engine and report; prints the tables to standard error."""
    model, data = ready.opened.model, ready.data
    # Both in the layout in which they are fastest on a CPU, and measured alike.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # no stub for it
    native = result.model
    (job.out / COMPARISON).unlink(missing_ok=True)  # of an earlier run: about another network
    result.plan.save(job.out / "plan.json")
    packed = job.out / "model.safetensors"
    size = files.save(native, packed)
    original = float_bytes(model)
    sample, _ = next(iter(data.test))
    engine, why = compiled(native, sample[:1], [model for model, _ in result.lower])
    saved = why if engine is None else _save_engine(ready, engine, job.out / "model.ada")
    candidates: dict[str, Any] = {"float": model, "native": native}
    if engine is not None:
        candidates["engine"] = engine
    before, after = (
        hits(each, data.test, title=f"{name} test accuracy", progress=job.progress)
        for name, each in (("float", model), ("native", native))
    )
    more: dict[str, Any] = {
        "budget": str(job.budget) if job.budget else None,
        "criterion": job.criterion,
        "seed": job.seed,
        "epochs": job.epochs if result.history is not None else 0,
        "image_size": job.image_size,
        "model_classes": job.classes or len(ready.opened.train.classes),
        "class_names": ready.opened.train.classes,
        "normalisation": ready.opened.normalisation.as_dict(),
        "float_accuracy": before.accuracy,
        "accuracy": after.accuracy,
        "classes": class_rows(ready.opened.test.classes, before, after),
        "test_images": len(data.test.dataset),
    }
    fewest = 1 if engine is None else engine.least_batch  # some models take no single image
    for name, value in model_milliseconds(candidates, sample[:fewest]).items():
        more[f"{name}_ms"] = value / fewest
    for name, value in model_milliseconds(candidates, sample[:16]).items():
        more[f"{name}_ms_batch16"] = value
    if result.lower:
        more["levels"] = _level_rows(job, result, engine, after.accuracy, data, sample)
    more["energy"] = _energy(job, {"float": model, "native": native}, sample[:16], ready.meter)
    more["frontier"] = _frontier(job, model, data)
    more["ada"] = {"bytes": (job.out / "model.ada").stat().st_size} if not saved else {"why": saved}
    report = record(job.model, model, result, packed, sample, more, engine=engine or why)
    write_text_atomic(job.out / "report.json", json.dumps(report, indent=2) + "\n")
    _show(job, result, report, original, size)
    return report


def _level_rows(
    job: CompressJob,
    result: Compressed,
    engine: Engine | None,
    best: float,
    data: Loaders,
    sample: torch.Tensor,
) -> list[dict[str, Any]]:
    """What every level of quality is: average bits, accuracy, and milliseconds of one image."""
    rows = []
    for level, (model, plan) in enumerate([(result.model, result.plan), *result.lower]):
        accuracy = best
        if level:
            title = f"level {level} test accuracy"
            accuracy = hits(model, data.test, title=title, progress=job.progress).accuracy
        rows.append({"average_bits": plan.average_bits, "accuracy": accuracy})
    if engine is not None:
        candidates = {str(level): engine.at_quality(level) for level in range(engine.levels)}
        fewest = engine.least_batch
        for name, value in model_milliseconds(candidates, sample[:fewest]).items():
            rows[int(name)]["engine_ms"] = value / fewest
    return rows


def _save_engine(ready: _Ready, engine: Engine, path: Path) -> str:
    """Writes the engine; in words why that is not possible, else nothing."""
    try:
        save_engine(engine, path, ready.opened.normalisation, ready.opened.train.classes)
    except UnsupportedModelError as error:
        path.unlink(missing_ok=True)  # of an earlier run: it would be another network
        return str(error)
    return ""


def _show(
    job: CompressJob, result: Compressed, report: dict[str, Any], original: int, size: int
) -> None:
    console = Console(stderr=True)
    print_table(figure6_table(result.plan), console)
    if result.repair is not None:
        print_table(result.repair.table(), console)
    if any("E" in entry for entry in (result.plan.scores or {}).values()):
        print_table(error_table(result.plan), console)
    by_engine = "engine_ms" in report
    rows = [
        {
            "name": "float",
            "accuracy": report["float_accuracy"],
            "bytes": original,
            "ms": report["float_ms"],
        },
        {
            "name": f"{result.plan.method}, " + ("engine" if by_engine else "torch module"),
            "accuracy": report["accuracy"],
            "bytes": size,
            "ms": report["engine_ms" if by_engine else "native_ms"],
        },
    ]
    rows += [
        {
            "name": f"level {level}, {row['average_bits']:.3g} bits",
            "accuracy": row["accuracy"],
            "bytes": size,
            "ms": row.get("engine_ms"),
        }
        for level, row in enumerate(report.get("levels", ()))
        if level
    ]
    print_table(comparison_table(rows), console)
    for part in result.float_work.parts if result.float_work else ():
        say(f"{part.name} stays float, {100 * part.share:.2g} % of the work: {part.reason}")
    written = [name for name in OUTPUTS if name != "model.ada" or "bytes" in report["ada"]]
    if "why" in report["ada"]:
        say(f"no model.ada: {report['ada']['why']}")
    say(
        f"written to {job.out}: {', '.join(written)} "
        f"(adalayer report {job.out} makes a page of them)"
    )


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
