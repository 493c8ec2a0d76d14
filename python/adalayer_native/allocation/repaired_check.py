"""Plans as they will be: calibrated, repaired whole, and measured on images not used for that.

Where plans are searched for, every layer is repaired by itself. The repair of a plan does more: a
layer also makes up for what earlier layers did wrong. How much that mends depends on the plan.
Pruning shrinks the outputs of all layers in the same direction, so that layers that were repaired
one by one lose most by it together, and it is also what later layers can correct best.
"""

from __future__ import annotations

import json
import warnings
from functools import cached_property
from typing import Any

import torch

from ..importance.analyze import eval_mode
from ..importance.outputs import loss_of
from ..quantization import calibrate, prepare
from ..repair import repair
from .evaluate import Measurement, hits
from .measured_tables import Data, loader_of, table_key
from .optimal_settings import Settings
from .options import Choices
from .problem import Problem
from .store import Store, cache_dir

__all__ = ["RepairedCheck"]

PASSES = 1  # of refinement: for a comparison one is enough


class RepairedCheck:
    """Measures plans after calibration and repair, on images that the repair has not seen.

    What was measured is kept beside the tables.

    Args:
        problem: layers.
        data: repaired with ``data.repair``, measured on ``data.check``.
        settings: cache directory.
    """

    def __init__(self, problem: Problem, data: Data, settings: Settings) -> None:
        self.problem, self.data = problem, data
        check = [batch.digest() for batch in data.check]
        key = {
            **table_key(problem, data, settings),
            "check": check,
            "activation_bits": problem.activation_bits,
        }
        # "finals": the files of earlier versions are read on.
        self.store = Store(cache_dir(settings.directory), "finals", key)

    @cached_property
    def outputs(self) -> list[Any]:
        """What the float model makes of the images to compare on."""
        with torch.no_grad(), eval_mode(self.problem.model):
            return [batch.x(self.problem.model) for batch in self.data.check]

    @property
    def samples(self) -> int:
        """Images behind a measurement."""
        return sum(batch.count for batch in self.data.check)

    def measure(self, chosen: Choices) -> Measurement:
        """Loss and accuracy with ``{layer: option}``; layers that are pinned may be left out."""
        choice, data = self.problem.full(chosen), self.data
        name = json.dumps([[layer, *option.values] for layer, option in choice.items()])
        if f"loss {name}" not in self.store:
            plan = self.problem.plan(choice)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # which layers stay float is said elsewhere
                prepared = prepare(self.problem.model, plan)
            images = loader_of(data.repair)
            calibrate(prepared, images, progress=False)
            repair(prepared, images, equalize=False, passes=PASSES, progress=False)
            loss, right, count, images_seen = 0.0, 0, 0, 0
            with torch.no_grad():
                for batch, reference in zip(data.check, self.outputs, strict=True):
                    output = batch.x(prepared)
                    target = None if data.loss_fn is None else batch.target
                    value = loss_of(
                        output, reference, target, data.loss_fn, pick=data.pick, tokens=batch.tokens
                    )
                    loss += value * batch.count
                    images_seen += batch.count
                    hit, of = hits(output, reference, batch, data.pick, data.loss_fn)
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

    def save(self) -> None:
        """Every measurement is kept as soon as it is made."""
