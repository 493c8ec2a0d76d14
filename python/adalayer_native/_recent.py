"""What was used last, up to a limit: for whatever is dear to make and may be asked for again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Recent"]

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values by key; those that nobody has asked for the longest go first. Safe for threads.

    Args:
        limit: of the sum of all costs.
        cost: of a value with its key; default: each counts 1.
    """

    def __init__(
        self, limit: float, cost: Callable[[Key, Value], float] = lambda key, value: 1
    ) -> None:
        self.limit, self.cost = limit, cost
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: Key) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key) -> Value | None:
        """The value, which has been used now; ``None`` where there is none."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Key, value: Value, *, shrink: bool = True) -> None:
        """Keep a value; without ``shrink`` nothing goes for it yet."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
        if shrink:
            self.shrink()

    def get_or(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value, made where there is none; threads that meet there may make it twice."""
        found = self.get(key)
        if found is None:
            found = make()
            self.put(key, found)
        return found

    def clear(self) -> None:
        """Let all of them go."""
        with self._lock:
            self._values.clear()

    def shrink(self, limit: float | None = None, *, keep: int = 1) -> None:
        """Let the oldest go until the others cost no more than a limit, or ``keep`` are left."""
        most = self.limit if limit is None else limit
        with self._lock:
            total = sum(self.cost(key, value) for key, value in self._values.items())
            while total > most and len(self._values) > keep:
                key, value = self._values.popitem(last=False)
                total -= self.cost(key, value)
