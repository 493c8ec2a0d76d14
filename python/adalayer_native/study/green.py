"""The second paper's study: widths over depth and time, trained, then the same plans natively."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise

from .. import files
from .._files import write_atomic
from ..allocation import float_bytes
from ..energy import Meter, intensity
from ..engine import compile as compile_engine
from ..errors import PlanError
from ..measure import accuracy
from ..models import load_weights
from ..plan import Plan
from ..quantization import convert, restore
from ..training import Paused
from .configurations import CONFIGURATIONS, Configuration, configuration, network, plan_of
from .folder import Clock, Study
from .memory import peak_bytes
from .runner import StudySettings, run_study
from .splits import Images
from .timing import EngineModule, energies, latencies, ledger
from .training import RunWatch, prepared_of, train

__all__ = ["GreenSettings", "run_green"]

NAME = "green"
STEPS = 3  # of a timed training run
REGIONS = ("SWE", "FRA", "ITA", "DEU", "USA", "CHN", "IND")  # from little coal to much
ROUNDS = 5  # of them per configuration, in turn


@dataclass
class GreenSettings(StudySettings):
    """Arguments of ``adalayer study green``; see its help.

    Attributes:
        epochs, images: epochs of so many images each.
        lr: of training.
        seeds: of weights, order and augmentation.
        configurations: names, see :func:`configuration`.
        fixed_bits: width of ``"fixed"``.
        blocks: basic blocks per stage.
        curve_images: test images whose accuracy is measured after every epoch.
        stop_accuracy: training accuracy in per cent that ends a run; 0: never.
        only: ``"train"``, ``"timing"`` (anew) or ``"report"``; ``None``: whatever is missing.
    """

    epochs: int = 20
    images: int = 5000
    lr: float = 0.1
    configurations: Sequence[str] = CONFIGURATIONS
    fixed_bits: int = 2
    blocks: int = 3
    curve_images: int = 2000
    stop_accuracy: float = 95.0

    def shared(self) -> dict[str, Any]:
        """What every piece of the study must agree on, JSON values."""
        names = ("dataset", "epochs", "images", "batch_size", "lr", "fixed_bits", "blocks",
                 "curve_images", "stop_accuracy", "country", "image_size")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def check(self) -> list[Configuration]:
        """The configurations, checked.

        Raises:
            PlanError: a value out of range, or given twice.
        """
        for name in ("epochs", "images", "batch_size", "curve_images"):
            if getattr(self, name) < 1:
                raise PlanError(
                    f"study green: {name} must be at least 1, got {getattr(self, name)}"
                )
        if not 0 <= self.stop_accuracy <= 100:
            raise PlanError(
                f"study green: stop_accuracy must be from 0 to 100, got {self.stop_accuracy}"
            )
        for what in ("seeds", "configurations"):
            given = list(getattr(self, what))
            if not given or len(set(given)) != len(given):
                raise PlanError(f"study green: {what} must be different and at least one: {given}")
        if any(seed < 0 for seed in self.seeds):
            raise PlanError(f"study green: seeds must not be negative, got {list(self.seeds)}")
        return [configuration(name, self.fixed_bits) for name in self.configurations]


def key_of(name: str, seed: int) -> str:
    """Name of a training run's entry."""
    return f"run/{name}/{seed}"


def run_green(settings: GreenSettings) -> dict[str, Any]:
    """Run what is missing; returns the study's data, which ``study.json`` holds, too.

    Raises:
        AdaError: bad arguments or data, a missing extra. OSError: the output cannot be written.
    """
    chosen = settings.check()
    clock = Clock(settings.minutes)
    wanted = {"seeds": list(settings.seeds), "configurations": list(settings.configurations)}

    def work(study: Study, images: Images) -> None:
        _work(settings, chosen, study, images, clock)

    return run_study(NAME, settings, settings.shared(), wanted, work, missing)


def _work(
    settings: GreenSettings, chosen: list[Configuration], study: Study, images: Images, clock: Clock
) -> None:
    if settings.only in (None, "train"):
        # Every configuration once before the second seed: an early end leaves whole tables.
        for seed in settings.seeds:
            for each in chosen:
                key = key_of(each.name, seed)
                if key in study.entries:
                    continue
                if clock.over():
                    return
                study.data["missing"] = missing(study.data)
                study.save()
                try:
                    study.put(key, _train_run(settings, each, seed, study, images, clock))
                except Paused:
                    return
    if settings.only == "timing":
        study.drop("timing")
    if settings.only in (None, "timing") and not clock.over():
        there = [
            c for c in chosen if any(key_of(c.name, s) in study.entries for s in settings.seeds)
        ]
        if settings.only == "timing" and not there:
            raise PlanError(f"study {str(settings.out)!r} is empty: nothing is trained yet to time")
        known = study.entries.get("timing", {}).get("configurations", [])
        if there and not set(known) >= {c.name for c in there}:
            study.put("timing", _timing(settings, there, study, images))


def missing(data: dict[str, Any]) -> list[str]:
    """Pieces that are wanted and not done."""
    names, entries = data["wanted"]["configurations"], data["entries"]
    found = [
        key_of(name, seed)
        for seed in data["wanted"]["seeds"]
        for name in names
        if key_of(name, seed) not in entries
    ]
    if not set(entries.get("timing", {}).get("configurations", [])) >= set(names):
        found.append("timing")
    return found


# -- training -------------------------------------------------------------------------------------


def first_stop(chosen: Configuration, epochs: int) -> int:
    """The first epoch after which a run may stop: the first one of its last width over time."""
    if chosen.time is None:
        return 1
    return epochs * (len(chosen.time) - 1) // len(chosen.time) + 1


def _train_run(
    settings: GreenSettings,
    chosen: Configuration,
    seed: int,
    study: Study,
    images: Images,
    clock: Clock,
) -> dict[str, Any]:
    folder = study.work(f"{chosen.name}-{seed}")
    loader = images.training(settings.batch_size, settings.images, seed)
    start = network(settings.blocks, images.classes, seed)
    model = prepared_of(start, chosen, images.calibration(settings.batch_size, seed))
    limit = settings.stop_accuracy / 100 if settings.stop_accuracy else None
    watch = RunWatch(
        images.tested(settings.curve_images),
        clock,
        stop=limit,
        first=first_stop(chosen, settings.epochs),
        country=settings.country,
        energy=settings.energy,
    )
    with watch:
        history = train(
            model,
            chosen,
            loader,
            settings.epochs,
            lr=settings.lr,
            seed=seed,
            checkpoint=folder / "checkpoint.safetensors",
            watch=watch,
            progress=settings.progress,
        )
    packed, plan = folder / "model.safetensors", None
    example = next(iter(images.tested()))[0][:2]
    if chosen.depth is None:
        write_atomic(packed, serialise({k: v.contiguous() for k, v in model.state_dict().items()}))
        size, judged, share = float_bytes(model), model, 0.0
    else:
        native = convert(model)  # type: ignore[arg-type]
        size = files.save(native, packed)
        engine = compile_engine(native, example, policy="native")
        share, judged = engine.native_share, EngineModule(engine)
        plan = history.plan or plan_of(start, chosen)
        assert plan is not None
        plan.save(folder / "plan.json")
    epochs = history.epochs
    return {
        "configuration": chosen.name,
        "title": chosen.title,
        "depth": chosen.depth,
        "time": chosen.time,
        "seed": seed,
        "history": epochs,
        "steps_per_epoch": len(loader),
        "stopped_at": len(epochs) if limit and epochs[-1]["accuracy"] >= limit else None,
        "test_accuracy": accuracy(
            judged, images.tested(), title="test accuracy", progress=settings.progress
        ),
        "test_images": len(images.test),
        "bytes": size,
        "float_bytes": float_bytes(start),
        "native_share": share,
        **ledger(start, plan, example),
    }


# -- timing ---------------------------------------------------------------------------------------


def load_native(
    settings: GreenSettings, chosen: Configuration, folder: Path, classes: int, x: torch.Tensor
) -> Any:
    """The trained network of a folder: an engine, or in full precision the float network.

    Raises:
        FileFormatError: the files are missing or damaged. PlanError: the plan there is of another
            model or configuration.
    """
    model = network(settings.blocks, classes, 0)
    packed = folder / "model.safetensors"
    expected = plan_of(model, chosen)
    if expected is None:
        return load_weights(model, packed).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan = Plan.load(folder / "plan.json")
    try:
        plan.validate(model)
    except PlanError as error:
        raise PlanError(f"{folder / 'plan.json'} is the plan of another model: {error}") from None
    if chosen.dynamic is None and plan.layers != expected.layers:
        raise PlanError(
            f"{folder / 'plan.json'} is not the plan of configuration {chosen.name!r}; delete the "
            f"study's entry to train it again"
        )
    return compile_engine(restore(model, packed), x, policy="native")


def _timing(
    settings: GreenSettings, chosen: list[Configuration], study: Study, images: Images
) -> dict[str, Any]:
    """Latency and energy of inference, time, energy and memory of training steps, side by side."""
    x, labels = next(iter(images.tested()))
    runners = {}
    for each in chosen:
        seed = next(s for s in settings.seeds if key_of(each.name, s) in study.entries)
        folder = study.path / "work" / f"{each.name}-{seed}"
        runners[each.name] = load_native(settings, each, folder, images.classes, x[:2])
    batch = (x[: settings.batch_size], labels[: settings.batch_size])
    found: dict[str, Any] = {
        "configurations": [each.name for each in chosen],
        "threads": torch.get_num_threads(),
        "batch_size": len(batch[0]),
        "latency": latencies(runners, x, seconds=settings.seconds),
        "step": _steps(settings, chosen, images.classes, batch),
        "energy": None,
    }
    if settings.energy:
        found["energy"] = energies(
            runners, x[:16], seconds=settings.seconds, country=settings.country
        )
        found["intensity"] = {country: intensity(country) for country in REGIONS}
    return found


def _steps(
    settings: GreenSettings, chosen: list[Configuration], classes: int, batch: Any
) -> dict[str, Any]:
    """Training steps of every configuration in turn; medians."""
    models = {
        each.name: prepared_of(network(settings.blocks, classes, 0), each, [batch])
        for each in chosen
    }

    def steps(each: Configuration) -> float:
        """Seconds per step. A tiny rate: what a step costs does not depend on where it goes."""
        history = train(models[each.name], each, [batch] * STEPS, 1, lr=1e-6, progress=False)
        return float(history.epochs[-1]["seconds"]) / STEPS

    times: dict[str, list[float]] = {each.name: [] for each in chosen}
    for _ in range(ROUNDS):
        for each in chosen:
            times[each.name].append(steps(each))
    found: dict[str, Any] = {}
    for each in chosen:
        entry: dict[str, Any] = {
            "seconds": statistics.median(times[each.name]),
            "samples": ROUNDS,
            "peak_bytes": None,
        }
        if settings.energy:
            with Meter(country=settings.country) as meter:
                taken = 0
                spent = 0.0
                while taken == 0 or spent < settings.seconds:
                    spent += STEPS * steps(each)
                    taken += STEPS
            entry["energy"] = meter.use.per(taken).as_dict()
        if settings.memory:
            entry["peak_bytes"] = peak_bytes({
                "mode": "train", "blocks": settings.blocks, "classes": classes,
                "configuration": each.name, "fixed": settings.fixed_bits,
                "batch": settings.batch_size, "size": settings.image_size,
            })  # fmt: skip
        found[each.name] = entry
    return found
