"""The first paper's study: float, uniform, layer-wise and optimal plans, measured natively."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import nn

from .. import files
from .._files import require_file, write_atomic
from ..allocation import Budget, float_bytes
from ..compress import compress
from ..engine import compile as compile_engine
from ..engine import load as load_engine
from ..errors import PlanError
from ..measure import accuracy
from ..models import get_model, load_weights
from ..plan import Plan
from ..training import Paused, Watch, fit
from .folder import Clock, Study
from .memory import peak_bytes
from .papers import TABLE2
from .runner import StudySettings, run_study
from .splits import Images
from .timing import EngineModule, energies, latencies, ledger

__all__ = ["METHODS", "AdalayernetSettings", "run_adalayernet"]

NAME = "adalayernet"
METHODS = ("uniform", "adalayer", "optimal", "uniform-paper")
TITLES = {
    "float": "float",
    "uniform": "uniform",
    "adalayer": "layer-wise (eqs. 1–6)",
    "optimal": "optimal",
    "uniform-paper": "uniform, the paper's size",
}
# The paper's uniform model over its float model, both as it states them.
PAPER_UNIFORM = TABLE2["uniform-paper"].kilobytes / TABLE2["float"].kilobytes


@dataclass
class AdalayernetSettings(StudySettings):
    """Arguments of ``adalayer study adalayernet``; see its help.

    Attributes:
        models: weight file of the float network, or a folder with
            ``adalayernet_<dataset>.safetensors``; ``None``: it is trained.
        size: budget, of the float file.
        epochs: of fine-tuning; 0: none.
        float_epochs: of training the float network where no weights are given.
        seeds: of the draw of calibration images, the repair and the fine-tuning.
        methods: some of ``METHODS``.
        calibration: images.
        only: ``"compress"``, ``"timing"`` (anew) or ``"report"``; ``None``: whatever is missing.
        network: a model by name, see :func:`~adalayer_native.models.get_model`.
        allocate_options: further arguments of ``allocate`` by method.
    """

    models: Path | None = None
    size: float = 0.165
    epochs: int = 0
    float_epochs: int = 11
    methods: Sequence[str] = METHODS
    calibration: int = 1000
    network: str = "adalayernet"
    allocate_options: dict[str, dict[str, Any]] | None = None

    def shared(self) -> dict[str, Any]:
        """What every piece of the study must agree on, JSON values."""
        names = ("dataset", "size", "epochs", "calibration", "batch_size", "country",
                 "image_size", "network")  # fmt: skip
        found = {name: getattr(self, name) for name in names}
        found["float_epochs"] = None if self.models is not None else self.float_epochs
        return found

    def check(self) -> None:
        """Raise :class:`~adalayer_native.errors.PlanError` where a value is out of range."""
        if self.epochs < 0 or self.float_epochs < 1 or self.calibration < 1:
            raise PlanError(
                "study adalayernet: epochs must not be negative, float_epochs and calibration at "
                "least 1"
            )
        for what in ("seeds", "methods"):
            given = list(getattr(self, what))
            if not given or len(set(given)) != len(given):
                raise PlanError(
                    f"study adalayernet: {what} must be different and at least one: {given}"
                )
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown:
            raise PlanError(f"study adalayernet: unknown {unknown}: expected some of {METHODS}")

    def weights(self) -> Path | None:
        """The float network's weight file.

        Raises:
            FileFormatError: it is not there.
        """
        if self.models is None:
            return None
        file = self.models
        if file.is_dir():
            file = file / f"{self.network}_{self.dataset}.safetensors"
        require_file(file, "weight file")
        return file


def key_of(method: str, seed: int) -> str:
    """Name of a compressed model's entry."""
    return f"model/{method}/{seed}"


def run_adalayernet(settings: AdalayernetSettings) -> dict[str, Any]:
    """Run what is missing; returns the study's data, which ``study.json`` holds, too.

    Raises:
        AdaError: bad arguments, data or weights, a missing extra. OSError: the output cannot be
            written.
    """
    settings.check()
    Budget(size=settings.size)
    weights = settings.weights()
    clock = Clock(settings.minutes)
    wanted = {"seeds": list(settings.seeds), "methods": list(settings.methods)}

    def work(study: Study, images: Images) -> None:
        _work(settings, study, images, weights, clock)

    return run_study(NAME, settings, settings.shared(), wanted, work, missing)


def missing(data: dict[str, Any]) -> list[str]:
    """Pieces that are wanted and not done."""
    entries, wanted = data["entries"], data["wanted"]
    keys = [key_of(method, seed) for seed in wanted["seeds"] for method in wanted["methods"]]
    found = [key for key in ("float", *keys) if key not in entries]
    if not set(entries.get("timing", {}).get("models", [])) >= {"float", *wanted["methods"]}:
        found.append("timing")
    return found


class _Limit(Watch):
    def __init__(self, clock: Clock) -> None:
        self.pause: Callable[[], bool] = clock.over


def _work(
    settings: AdalayernetSettings,
    study: Study,
    images: Images,
    weights: Path | None,
    clock: Clock,
) -> None:
    example = next(iter(images.tested()))[0][:2]
    try:
        model = _float(settings, study, images, weights, clock)
        if settings.only in (None, "compress"):
            if "float" not in study.entries:
                study.put("float", _judge_float(settings, model, images, example))
            for seed in settings.seeds:
                for method in settings.methods:
                    if key_of(method, seed) in study.entries:
                        continue
                    if clock.over():
                        return
                    study.data["missing"] = missing(study.data)
                    study.save()
                    found = _compress(settings, method, seed, study, model, images, clock)
                    study.put(key_of(method, seed), found)
    except Paused:
        return
    if settings.only == "timing":
        study.drop("timing")
    if settings.only in (None, "timing") and not clock.over():
        _time(settings, study, model, images)


def _float(
    settings: AdalayernetSettings,
    study: Study,
    images: Images,
    weights: Path | None,
    clock: Clock,
) -> nn.Module:
    """The float network: given, trained before, or trained now."""
    torch.manual_seed(0)
    model = get_model(settings.network, images.classes)
    file = study.work() / "float.safetensors"
    if weights is not None:
        load_weights(model, weights)
        write_atomic(file, serialise({k: v.contiguous() for k, v in model.state_dict().items()}))
    elif file.is_file():
        load_weights(model, file)
    elif settings.only == "timing":
        raise PlanError(f"study {str(settings.out)!r} is empty: nothing is there yet to time")
    else:
        loader = images.training(settings.batch_size, len(images.train), 0)
        fit(
            model,
            loader,
            settings.float_epochs,
            checkpoint=study.work() / "float-checkpoint.safetensors",
            watch=_Limit(clock),
            progress=settings.progress,
        )
        write_atomic(file, serialise({k: v.contiguous() for k, v in model.state_dict().items()}))
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _judge_float(
    settings: AdalayernetSettings, model: nn.Module, images: Images, x: torch.Tensor
) -> dict[str, Any]:
    return {
        "accuracy": accuracy(
            model, images.tested(), title="float test accuracy", progress=settings.progress
        ),
        "test_images": len(images.test),
        "trained_epochs": None if settings.models is not None else settings.float_epochs,
        "bytes": float_bytes(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        **ledger(model, None, x),
    }


def _compress(
    settings: AdalayernetSettings,
    method: str,
    seed: int,
    study: Study,
    model: nn.Module,
    images: Images,
    clock: Clock,
) -> dict[str, Any]:
    folder = study.work(f"{method}-{seed}")
    size = PAPER_UNIFORM if method == "uniform-paper" else settings.size
    name = method.partition("-")[0]
    calibration = images.calibration(settings.calibration, seed)
    options = dict((settings.allocate_options or {}).get(name, {}))
    training: dict[str, Any] = {}
    if settings.epochs:
        training = {
            "train_loader": images.training(settings.batch_size, len(images.train), seed),
            "epochs": settings.epochs,
            "finetune_options": {"watch": _Limit(clock)},
        }
    result = compress(
        model,
        calibration,
        Budget(size=size),
        method=name,
        work_dir=folder,
        allocate_options=options,
        seed=seed,
        progress=settings.progress,
        **training,
    )
    plan = result.plan
    plan.save(folder / "plan.json")
    packed = files.save(result.model, folder / "model.safetensors")
    example = calibration[0][0][:2]
    engine = compile_engine(result.model, example, policy="native", strict=True)
    engine_bytes = engine.save(folder / "model.ada")
    bits = [layer.bits for layer in plan.layers.values() if layer.bits is not None]
    return {
        "method": method,
        "seed": seed,
        "accuracy": accuracy(
            EngineModule(engine),
            images.tested(),
            title=f"{method} test accuracy",
            progress=settings.progress,
        ),
        "bytes": packed,
        "engine_bytes": engine_bytes,
        "size": packed / float_bytes(model),
        "budget": size,
        "parameters": sum(layer.params for layer in plan.layers.values()),
        "parameters_after": sum(layer.params_after for layer in plan.layers.values()),
        "average_bits": plan.average_bits,
        "bits": [min(bits), max(bits)],
        "hyper": plan.hyper,
        "layers": {
            layer.name: {
                "kind": layer.kind,
                "params": layer.params,
                "params_after": layer.params_after,
                "sparsity": layer.sparsity,
                "bits": layer.bits,
                "A": (plan.scores or {}).get(layer.name, {}).get("A"),
            }
            for layer in plan.layers.values()
        },
        **ledger(model, plan, example),
    }


# -- timing ---------------------------------------------------------------------------------------


def load_plan(settings: AdalayernetSettings, folder: Path, model: nn.Module) -> Plan:
    """The plan of a compressed model.

    Raises:
        FileFormatError: it is missing or damaged. PlanError: it is of another model.
    """
    plan = Plan.load(folder / "plan.json")
    try:
        plan.validate(model)
    except PlanError as error:
        raise PlanError(f"{folder / 'plan.json'} is the plan of another model: {error}") from None
    return plan


def _time(settings: AdalayernetSettings, study: Study, model: nn.Module, images: Images) -> None:
    """Latency, energy and memory of all models of the first seed that is there."""
    folders = {}
    for method in settings.methods:
        for seed in settings.seeds:
            if method not in folders and key_of(method, seed) in study.entries:
                folders[method] = study.path / "work" / f"{method}-{seed}"
    if not folders:
        if settings.only == "timing":
            raise PlanError(f"study {str(settings.out)!r} is empty: nothing is there yet to time")
        return
    if set(study.entries.get("timing", {}).get("models", [])) >= {"float", *folders}:
        return
    runners: dict[str, Any] = {"float": model}
    for method, folder in folders.items():
        load_plan(settings, folder, model)
        runners[method] = load_engine(folder / "model.ada")
    x, _ = next(iter(images.tested()))
    found: dict[str, Any] = {
        "models": list(runners),
        "threads": torch.get_num_threads(),
        "latency": latencies(runners, x, seconds=settings.seconds),
        "energy": None,
        "peak_bytes": {},
    }
    if settings.energy:
        found["energy"] = energies(
            runners, x[:16], seconds=settings.seconds, country=settings.country
        )
    if settings.memory:
        found["peak_bytes"]["float"] = peak_bytes({
            "mode": "float", "network": settings.network, "classes": images.classes,
            "weights": str(study.work() / "float.safetensors"), "size": settings.image_size,
        })  # fmt: skip
        for method, folder in folders.items():
            found["peak_bytes"][method] = peak_bytes(
                {"mode": "engine", "file": str(folder / "model.ada")}
            )
    study.put("timing", found)
