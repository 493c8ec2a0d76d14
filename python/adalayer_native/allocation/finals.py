"""The last comparison of method "optimal": a few plans, repaired whole.

Until here every layer was repaired by itself. The repair of a plan does more: a layer also makes up
for what earlier layers did wrong. How much that mends depends on the plan. Pruning shrinks the
outputs of all layers in the same direction, so that layers that were repaired one by one lose most
by it together, and it is also what later layers can correct best.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable

import numpy as np
import torch

from .._progress import ProgressBar
from ..importance.analyze import eval_mode
from ..importance.batches import loss_of
from ..quantization import calibrate, prepare
from ..repair import repair
from .evaluate import Measurement, hits
from .local_search import add_distinct, corrected
from .measuring import Data, loader_of, table_key
from .options import Choice
from .problem import Problem
from .selection import Selection
from .settings import Settings
from .store import Store, cache_dir

__all__ = ["NEGLIGIBLE", "RepairedCheck", "contenders", "finals"]

# What an option that prunes counts in the plans that are compared, and powers of the errors.
CHEAPER = (0.3, 0.1)
POWERS = (1.0, 0.5)
# Nats per image: plans that lose less than this before the whole repair are not worth comparing.
NEGLIGIBLE = 3e-3
UNIFORM = 2  # plans that treat all layers alike among the contenders, at most
PASSES = 1  # of refinement: for a comparison one is enough


class RepairedCheck:
    """Measures plans after calibration and repair, on images that the repair has not seen.

    What was measured is kept beside the tables.

    Args:
        problem: layers.
        data: repaired with ``data.repair``, measured on ``data.check``.
        settings: cache directory.
        selection: options.
    """

    def __init__(
        self, problem: Problem, data: Data, settings: Settings, selection: Selection
    ) -> None:
        self.problem, self.data, self.selection = problem, data, selection
        check = [batch.digest() for batch in data.check]
        key = {
            **table_key(problem, data, settings),
            "check": check,
            "activation_bits": problem.activation_bits,
        }
        self.store = Store(cache_dir(settings.directory), "finals", key)
        with torch.no_grad(), eval_mode(problem.model):
            self.outputs = [problem.model(batch.x) for batch in data.check]

    def measure(self, columns: np.ndarray) -> Measurement:
        """Loss and accuracy of one choice of the solver's."""
        return self.measure_choice(self.selection.choice(columns))

    def measure_choice(self, chosen: Choice) -> Measurement:
        """Loss and accuracy of one choice."""
        choice = self.problem.full(chosen)
        name = json.dumps([[layer, *option.values] for layer, option in choice.items()])
        if f"loss {name}" not in self.store:
            plan = self.problem.plan(choice)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # which layers stay float is said elsewhere
                prepared = prepare(self.problem.model, plan)
            images = loader_of(self.data.repair)
            calibrate(prepared, images, progress=False)
            repair(prepared, images, equalize=False, passes=PASSES, progress=False)
            loss, right, count, images_seen = 0.0, 0, 0, 0
            with torch.no_grad():
                for batch, reference in zip(self.data.check, self.outputs, strict=True):
                    output = prepared(batch.x)
                    target = None if self.data.loss_fn is None else batch.target
                    loss += loss_of(output, reference, target, self.data.loss_fn) * batch.count
                    images_seen += batch.count
                    hit, of = hits(output, reference, batch.target)
                    right, count = right + hit, count + of
            if count:
                self.store[f"accuracy {name}"] = right / count
            self.store[f"loss {name}"] = loss / images_seen
            self.store.save()
        accuracy = f"accuracy {name}"
        return Measurement(
            self.store[f"loss {name}"],
            self.store[accuracy] if accuracy in self.store else float("nan"),
        )


def contenders(selection: Selection, columns: np.ndarray, count: int) -> list[np.ndarray]:
    """Choices to compare: a given one, uniform ones, and the solver's with cheaper pruning."""
    pruned = np.array([option.sparsity > 0 for option in selection.options])
    rows = np.arange(len(selection.errors))
    found = [columns]
    alike = []
    for option in range(len(selection.options)):
        same = np.full(len(rows), option)
        if selection.offered[rows, same].all() and selection.fits(same):
            factor = CHEAPER[0] if pruned[option] else 1.0
            alike.append((factor * selection.predicted(same), option))
    widths: set[int | None] = set()
    for _, option in sorted(alike):
        bits = selection.options[option].bits
        if bits not in widths and len(widths) < UNIFORM:
            widths.add(bits)
            add_distinct(found, np.full(len(rows), option))
    for power in POWERS:
        for factor in (*CHEAPER, 1.0):
            errors = (selection.errors * np.where(pruned, factor, 1.0)) ** power
            add_distinct(found, selection.choose(errors=errors, pairs=()))
    return found[:count]


def finals(
    selection: Selection,
    columns: np.ndarray,
    measure: Callable[[np.ndarray], Measurement],
    *,
    count: int,
    progress: bool = True,
) -> tuple[np.ndarray, Measurement]:
    """The best of at most ``count`` repaired plans, and its measurement.

    The last places go to plans that the solver finds with the table corrected by what the others
    have shown.

    Args:
        selection: tables and limits.
        columns: the best plan so far.
        measure: what a choice loses after the repair.
        count: how many are compared.
        progress: show a progress bar.
    """
    reserved = count // 4
    waiting = contenders(selection, columns, max(1, count - reserved))
    tried: list[np.ndarray] = []
    measured: list[Measurement] = []
    with ProgressBar("comparing repaired plans", count, unit="plan", enabled=progress) as bar:
        while waiting and len(tried) < count:
            tried.append(waiting.pop(0))
            measured.append(measure(tried[-1]))
            bar.advance(1, f"best loss {min(m.loss for m in measured):.4f}")
            if not waiting:
                errors = corrected(selection, tried, measured)
                fresh = selection.choose(errors=errors, pairs=())
                if fresh is not None and not any(np.array_equal(fresh, old) for old in tried):
                    waiting = [fresh]
    best = int(np.argmin([m.loss for m in measured]))
    return tried[best], measured[best]
