"""Old names of what has a better one: they work for one version more, with a warning."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

__all__ = ["renamed_arguments", "renamed_fields", "renamed_keys", "renamed_names", "warn_renamed"]

Class = TypeVar("Class", bound=type)
Function = TypeVar("Function", bound=Callable[..., Any])


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Say the new name to whoever uses the old one."""
    warnings.warn(
        f"{old} is called {new} now; the old name will be gone in the next version",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


def renamed_keys(given: Mapping[str, Any], names: Mapping[str, str], *, stacklevel: int = 3) -> Any:
    """``given`` with the new names of its keys, as a dictionary."""
    found = {}
    for key, value in given.items():
        if key in names:
            warn_renamed(repr(key), repr(names[key]), stacklevel=stacklevel + 1)
        found[names.get(key, key)] = value
    return found


def renamed_arguments(**names: str) -> Callable[[Function], Function]:
    """Decorator of a function whose arguments had other names: ``(old="new")``."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **renamed_keys(kwargs, names))

        return cast("Function", call)

    return decorate


def renamed_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """``__getattr__`` of a module some of whose public names were others."""

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}", name=name)
        warn_renamed(f"{module}.{name}", repr(names[name]))
        return getattr(sys.modules[module], names[name])

    return get


def renamed_fields(**names: str) -> Callable[[Class], Class]:
    """Decorator of a dataclass whose fields had other names: ``@renamed_fields(old="new")``.

    The old names work as arguments and as attributes.
    """

    def decorate(owner: Class) -> Class:
        init = renamed_arguments(**names)(owner.__init__)  # type: ignore[misc]
        owner.__init__ = init  # type: ignore[misc]
        for old, new in names.items():
            setattr(owner, old, _alias(owner.__name__, old, new))
        return owner

    return decorate


def _alias(owner: str, old: str, new: str) -> property:
    def read(self: Any) -> Any:
        warn_renamed(f"{owner}.{old}", repr(new))
        return getattr(self, new)

    def write(self: Any, value: Any) -> None:
        warn_renamed(f"{owner}.{old}", repr(new))
        setattr(self, new, value)

    return property(read, write, doc=f"Old name of ``{new}``.")
