"""Scoring layers on several processes or machines, as tasks of Ray actors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._ray import connect, import_ray
from ..errors import AdaError
from .batches import Batch
from .outputs import LossFn

__all__ = ["Measure", "Scorers"]

# What measures one batch in one process: criterion, model, loss_fn, batch, layers that are known,
# report.
Measure = Callable[
    [str, nn.Module, "LossFn | None", Batch, dict[str, float], Callable[..., None]],
    tuple[float, str],
]


@dataclass
class _Reports:
    """What one task found, in the order of its reports."""

    loss: tuple[float, str]
    values: list[tuple[str, float]]


class _Scorer:
    """One process: holds the model, measures some layers of one batch at a time."""

    def __init__(self, model: nn.Module, loss_fn: LossFn | None, measure: Measure, threads: int):
        torch.set_num_threads(threads)
        self._model, self._loss_fn, self._measure = model, loss_fn, measure

    def score(self, criterion: str, batch: Batch, done: dict[str, float]) -> _Reports:
        """Every layer that is not in ``done``."""
        values: list[tuple[str, float]] = []
        loss = self._measure(
            criterion,
            self._model,
            self._loss_fn,
            batch,
            done,
            lambda name, value: values.append((name, value)),
        )
        return _Reports(loss, values)


class Scorers:
    """Processes that share the layers of every batch.

    Each computes with as many threads as this process (:func:`torch.get_num_threads`), so that its
    sums are added in the same order and have the same bits.

    Args:
        model: in eval mode, on the CPU; a copy goes to every process.
        loss_fn: or None; it has to be picklable.
        measure: measures one batch; a module's function.
        workers: number of processes; None: one per CPU of the cluster.
        address: Ray cluster; None starts one on this machine for the time of the analysis.

    Raises:
        ImportError: Ray is not installed.
        ValueError: ``workers`` below 1, or a model that is not on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None,
        measure: Measure,
        workers: int | None,
        address: str | None,
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers: expected at least 1, got {workers}")
        if any(p.device.type != "cpu" for p in model.parameters()):
            raise ValueError("workers: expected a model on the CPU")
        self._ray = import_ray()
        self._model, self._loss_fn, self._measure = model, loss_fn, measure
        self._workers, self._address = workers, address
        self._owned = False
        self._actors: list[Any] = []
        # Criteria that get all layers from one pass gain nothing from being divided.
        self._undivided: set[str] = set()

    def __enter__(self) -> Scorers:
        ray, threads = self._ray, torch.get_num_threads()
        size = sum(t.numel() * t.element_size() for t in self._model.state_dict().values())
        cpus = 1 if self._workers is None else self._workers
        self._owned = connect(self._address, cpus, object_store=4 * size + (256 << 20))
        if self._workers is None:
            cpus = max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        # On one machine Ray's count of CPUs means nothing; in a cluster it spreads the processes.
        share = threads if self._address is not None else 0
        actor = ray.remote(num_cpus=share, max_restarts=2, max_task_retries=2)(_Scorer)
        model = ray.put(self._model)  # once per machine, not once per process
        self._actors = [
            actor.remote(model, self._loss_fn, self._measure, threads) for _ in range(cpus)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._owned:
            self._ray.shutdown()

    def score(
        self,
        criterion: str,
        batch: Batch,
        layers: list[str],
        done: dict[str, float],
        report: Callable[[str, float], None],
    ) -> tuple[float, str]:
        """Measure the layers that are not in ``done``; returns the float model's loss and metric.

        Args:
            criterion: its name.
            layers: all names, in the model's order.
            report: called with every result, as a criterion does.

        Raises:
            AdaError: what a criterion raised, or a process that cannot be started again.
        """
        open_ = [name for name in layers if name not in done]
        count = max(1, min(len(self._actors), len(open_)))
        if criterion in self._undivided:
            count = 1
        parts = [open_[k::count] for k in range(count)]
        sent = self._ray.put(batch)
        tasks = {}
        for part, actor in zip(parts, self._actors, strict=False):
            known = {name: 0.0 for name in layers if name not in part} | done
            tasks[actor.score.remote(criterion, sent, known)] = set(part)
        losses = []
        while tasks:
            (ready,), _ = self._ray.wait(list(tasks), num_returns=1)
            asked = tasks.pop(ready)
            found = self._get(ready)
            losses.append(found.loss)
            for name, value in found.values:
                if name in asked:
                    report(name, value)
                else:
                    self._undivided.add(criterion)
        return losses[0]

    def _get(self, task: Any) -> _Reports:
        try:
            found: _Reports = self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, AdaError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayActorError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise AdaError(
                "a process of the analysis did not start, or died "
                f"({lines[-1].strip() if lines else type(error).__name__}); expected the loss "
                "function, and modules that the model holds as they are, where every machine can "
                "import them"
            ) from error
        return found
