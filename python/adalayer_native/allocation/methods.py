"""The registry of methods: what each needs, and where it is.

It loads nothing, so that asking for names costs nothing: a method's module is imported when it is
asked for a plan. A new method is a module with a function ``solve(request) -> Plan``
(:class:`~adalayer_native.allocation.request.Request`) and an entry here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..plan import unknown_name

if TYPE_CHECKING:
    from ..plan import Plan
    from .request import Request

__all__ = ["METHODS", "REGISTRY", "Method", "method_of"]


@dataclass(frozen=True)
class Method:
    """One registered method, and what it needs.

    Attributes:
        name: as ``allocate(method=...)`` takes it.
        module: in this package; has ``solve(request)``, and ``check(request)`` where ``checks``.
        budget: whether it does nothing without a budget.
        several: whether it takes several limits at once, and those on latency, bit operations,
            energy and loss; others take one of size, bytes and bits.
        data: whether it looks at calibration data: ``"needed"``, ``"used"`` where there are some,
            or ``""``.
        training: whether it trains something to decide, on the loss of whole plans: then it needs
            many times the time of the others.
        scores: whether it needs the scores of ``analyze``; others only carry them on.
        prunes: whether its plans may prune, which decides what the smallest one is.
        options: the class of its ``options``, ``"module.Class"``; empty where it takes none.
        stages: whether it takes ``bits`` and ``stages``.
        checks: whether its module says what cannot work before anything is measured; for the
            others the smallest plan has to keep the budget.
    """

    name: str
    module: str
    budget: bool = True
    several: bool = False
    data: str = "used"
    training: bool = False
    scores: bool = False
    prunes: bool = True
    options: str = ""
    stages: bool = False
    checks: bool = False

    def solve(self, request: Request) -> Plan:
        """The plan that it makes of a request that has been checked."""
        plan: Plan = self._import(self.module).solve(request)
        return plan

    def check(self, request: Request) -> None:
        """Refuse what is known to be impossible before anything is measured."""
        self._import(self.module).check(request)

    def options_class(self) -> Any:
        """What reads its options: a class with ``of(options)``."""
        module, _, name = self.options.rpartition(".")
        return getattr(self._import(module), name)

    @staticmethod
    def _import(module: str) -> Any:
        return import_module(f".{module}", __package__)


REGISTRY = {
    method.name: method
    for method in (
        Method("adalayer", "adalayer", scores=True),
        Method("uniform", "uniform"),
        Method(
            "optimal",
            "optimal",
            several=True,
            data="needed",
            options="optimal_settings.Settings",
            checks=True,
        ),
        Method("rl", "rl", data="needed", training=True, prunes=False, options="rl.RLSettings"),
        *(
            Method(name, "stages", budget=False, data="", prunes=False, stages=True, checks=True)
            for name in ("fixed", "ascending", "descending")
        ),
    )
}
METHODS = tuple(REGISTRY)


def method_of(name: str) -> Method:
    """The method of a name.

    Raises:
        PlanError: there is none; the message names all and the closest.
    """
    if name not in REGISTRY:
        raise unknown_name("method", name, METHODS)
    return REGISTRY[name]
