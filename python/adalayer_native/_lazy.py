"""Packages whose names are imported when they are first used (PEP 562).

Whoever reads ``--help``, serves an engine or asks where the C library lies should not wait for all
that compression needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["lazy"]


def lazy(
    package: str, names: Mapping[str, Iterable[str]], submodules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its ``__name__``.
        names: public names by the submodule that they come from. A name that a submodule has, too
            (``compress``), means what is in it: as if it had been imported from there at once.
        submodules: those that are listed as well; any other is found, too, as after its import.
    """
    module = sys.modules[package]
    sources = {name: where for where, found in names.items() for name in found}
    shadowed = sources.keys() & {where.partition(".")[0] for where in names}

    class Package(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            # The import system makes submodules attributes of their package when they are loaded.
            if name in shadowed and isinstance(value, ModuleType):
                value = getattr(value, name)
            super().__setattr__(name, value)

    module.__class__ = Package

    def get(name: str) -> Any:
        if name not in sources:
            return _submodule(package, name)
        value = getattr(import_module(f"{package}.{sources[name]}"), name)
        setattr(module, name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(module), *sources, *submodules})

    return get, listed


def _submodule(package: str, name: str) -> ModuleType:
    path = f"{package}.{name}"
    missing = AttributeError(f"module {package!r} has no attribute {name!r}", name=name)
    if name.startswith("__"):  # what Python and others ask of any module
        raise missing
    try:
        return import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        raise missing from None
