"""How the arguments of a call become one tensor per input: the signature that was captured."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

from adalayer_native.engine.results import Leaf, Port, described, nest, skeleton
from adalayer_native.errors import InputError, UnsupportedModelError

__all__ = ["Argument", "Call"]


@dataclass(frozen=True)
class Argument:
    """One argument, with what it held when the model was exported.

    Attributes:
        name: as it is written in a call.
        spec: how it is nested, a ``TreeSpec``.
        entries: per leaf the number of an input as :class:`Leaf`, or the constant that it was.
        position: whether it may be given by position.
        keyword: whether it may be given by name.
        optional: whether it may be left out: it holds no tensor, and was what it is by default.
    """

    name: str
    spec: Any
    entries: tuple[Any, ...]
    position: bool = True
    keyword: bool = True
    optional: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        held = self.entries, self.position, self.keyword, self.optional
        return _argument_of, (self.name, skeleton(self.spec), *held)

    def place(self, value: Any, found: list[Any]) -> None:
        """Put the tensors of ``value`` where they belong in ``found``.

        Raises:
            InputError: another nest, or another constant than was captured.
        """
        if self.spec.is_leaf():
            items = [value]
        else:
            try:
                items = self.spec.flatten_up_to(value)
            except ValueError as error:
                kind = type(value).__name__
                raise InputError(
                    f"argument {self.name!r}: expected what the engine was compiled for, got a "
                    f"{kind}: {error}"
                ) from None
        for entry, item in zip(self.entries, items, strict=True):
            if isinstance(entry, Leaf):
                found[entry.number] = item
            elif not _same(entry, item):
                raise InputError(
                    f"argument {self.name!r}: the engine was compiled for {entry!r}, got "
                    f"{_shown(item)}; compile again with it in example_inputs"
                )


def _argument_of(name: str, containers: Any, *held: Any) -> Argument:
    return Argument(name, pytree.tree_structure(containers), *held)


def _same(captured: Any, given: Any) -> bool:
    """Whether a constant is the one that the graph was made for; 1 and True are two things."""
    if captured is given:
        return True
    # Only what has one answer to ==; a tensor that was a default value, for one, has many.
    return type(captured) is type(given) and (captured == given) is True


def _shown(value: Any) -> str:
    plain = value is None or isinstance(value, (bool, int, float, str))
    return repr(value)[:80] if plain else f"a {type(value).__name__}"


class Call:
    """The arguments of an engine, in the order of the model's signature.

    Attributes:
        arguments: those that may be given by position first.
        plain: whether one tensor per input, by position, is a call.
    """

    def __init__(self, arguments: Sequence[Argument], inputs: int) -> None:
        self.arguments = tuple(arguments)
        self._inputs = inputs
        self._names = {item.name: item for item in self.arguments if item.keyword}
        self._places = sum(item.position for item in self.arguments)
        plain = 0
        for argument in self.arguments:
            if not (argument.position and argument.spec.is_leaf()):
                break
            if argument.entries != (Leaf(plain),):
                break
            plain += 1
        # Almost every call: every tensor by position, and what is left is left out.
        self.plain = plain == inputs and all(item.optional for item in self.arguments[plain:])

    @classmethod
    def flat(cls, ports: Sequence[Port]) -> Call:
        """One tensor per input, by position or by its name."""
        leaf = pytree.tree_structure(0)
        return cls([Argument(p.name, leaf, (Leaf(k),)) for k, p in enumerate(ports)], len(ports))

    @classmethod
    def captured(
        cls,
        in_spec: Any,
        entries: Sequence[Any],
        ports: Sequence[Port],
        signature: inspect.Signature | None = None,
    ) -> Call:
        """From what was exported.

        Args:
            in_spec: ``TreeSpec`` of (args, kwargs).
            entries: one per leaf of it: the number of an input as :class:`Leaf`, or a constant.
            ports: the inputs.
            signature: of the model's ``forward``, for the names of arguments given by position, and
                for those that were left out. One that does not fit the call is not used.
        """
        args, kwargs = pytree.tree_unflatten([_Entry(entry) for entry in entries], in_spec)
        found = _by_signature(signature, args, kwargs) if signature is not None else None
        if found is None:
            found = [
                _argument(_name(value, ports, k), value, inspect.Parameter.empty, keyword=None)
                for k, value in enumerate(args)
            ]
            found += [
                _argument(name, value, inspect.Parameter.empty, position=False)
                for name, value in kwargs.items()
            ]
        return cls(found, len(ports))

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """One object per input.

        Raises:
            InputError: arguments are missing, unknown, given twice or nested otherwise, or a
                constant is not the one that the model was exported with.
        """
        if self.plain and not kwargs and len(args) == self._inputs:
            return args
        found: list[Any] = [None] * self._inputs
        missing: list[str] = []
        named = 0
        for position, argument in enumerate(self.arguments):
            by_name = argument.keyword and argument.name in kwargs
            named += by_name
            if position < len(args) and argument.position:
                if by_name:
                    raise InputError(f"argument {argument.name!r} is given twice")
                argument.place(args[position], found)
            elif by_name:
                argument.place(kwargs[argument.name], found)
            elif not argument.optional:
                missing.append(argument.name)
        if missing or len(args) > self._places:
            wanted = [item.name for item in self.arguments if not item.optional]
            raise InputError(
                f"expected {len(wanted)} inputs ({', '.join(wanted)}), got "
                f"{len(args) + len(kwargs)}"
                + (f"; {', '.join(missing)} missing" if missing and kwargs else "")
            )
        if named != len(kwargs):
            unknown = next(name for name in kwargs if name not in self._names)
            raise InputError(
                f"there is no input {unknown!r}; expected "
                + ", ".join(item.name for item in self.arguments)
            )
        return found

    # -- files ----------------------------------------------------------------------------------

    def as_json(self, ports: Sequence[Port]) -> list[dict[str, Any]] | None:
        """For a file; None for the call that a file without this says.

        Raises:
            UnsupportedModelError: a container or a constant that JSON has no form for.
        """
        if self == Call.flat(ports):
            return None
        rows = []
        for argument in self.arguments:
            try:
                structure, leaves = _as_json(argument)
            except UnsupportedModelError:
                if not argument.optional:
                    raise
                # A default value of another kind: it can still be left out.
                structure, leaves = 0, [{"constant": None}]
            rows.append(
                {
                    "name": argument.name,
                    "position": argument.position,
                    "keyword": argument.keyword,
                    "optional": argument.optional,
                    "structure": structure,
                    "leaves": leaves,
                }
            )
        return rows

    @classmethod
    def from_json(cls, rows: Any, ports: Sequence[Port]) -> Call:
        """From :meth:`as_json`.

        Raises:
            LookupError, TypeError, ValueError: it says something else.
        """
        arguments = []
        for row in rows:
            entries = [
                Leaf(int(item["input"])) if "input" in item else item["constant"]
                for item in row["leaves"]
            ]
            spec, entries = nest(row["structure"], entries)
            flags = (bool(row[key]) for key in ("position", "keyword", "optional"))
            arguments.append(Argument(str(row["name"]), spec, tuple(entries), *flags))
        numbers = [
            entry.number for item in arguments for entry in item.entries if isinstance(entry, Leaf)
        ]
        optional = any(
            item.optional and any(isinstance(entry, Leaf) for entry in item.entries)
            for item in arguments
        )
        by_position = [item.position for item in arguments]
        if (
            sorted(numbers) != list(range(len(ports)))
            or optional
            or by_position != sorted(by_position, reverse=True)
        ):
            raise ValueError("the arguments do not give every input once")
        return cls(arguments, len(ports))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Call) and self.arguments == other.arguments

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class _Entry:
    """Carries an entry through containers, which may look at what they are given."""

    value: Any


def _argument(
    name: str,
    value: Any,
    default: Any,
    *,
    position: bool = True,
    keyword: bool | None = True,
) -> Argument:
    """An argument from a nest of entries; ``keyword`` None: if it has a name of its own."""
    places, spec = pytree.tree_flatten(value)
    entries = tuple(item.value if isinstance(item, _Entry) else item for item in places)
    optional = False
    if not any(isinstance(entry, Leaf) for entry in entries):
        if default is inspect.Parameter.empty:  # unknown: nothing is what a missing one means
            optional = entries == (None,)
        else:
            usual, usual_spec = pytree.tree_flatten(default)
            optional = spec == usual_spec and all(map(_same, entries, usual))
    named = name.isidentifier() if keyword is None else keyword
    return Argument(name, spec, entries, position, named, optional)


def _name(value: Any, ports: Sequence[Port], position: int) -> str:
    if isinstance(value, _Entry) and isinstance(value.value, Leaf):
        return ports[value.value.number].name
    return f"args[{position}]"


def _by_signature(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Argument] | None:
    """Arguments in the order of a signature; None if the call does not belong to it."""
    rest, named = list(args), dict(kwargs)
    found: list[Argument] = []
    by_name: list[Argument] = []
    for parameter in signature.parameters.values():
        name, default = parameter.name, parameter.default
        if parameter.kind is parameter.VAR_POSITIONAL:
            found += [
                _argument(f"{name}[{k}]", value, parameter.empty, keyword=False)
                for k, value in enumerate(rest)
            ]
            rest = []
        elif parameter.kind is parameter.VAR_KEYWORD:
            by_name += [
                _argument(key, value, parameter.empty, position=False)
                for key, value in named.items()
            ]
            named = {}
        else:
            position = parameter.kind is not parameter.KEYWORD_ONLY
            keyword = parameter.kind is not parameter.POSITIONAL_ONLY
            if position and rest:
                value = rest.pop(0)
            elif keyword and name in named:
                value = named.pop(name)
            elif default is not parameter.empty:
                value = default
            else:
                return None
            argument = _argument(name, value, default, position=position, keyword=keyword)
            (found if position else by_name).append(argument)
    return None if rest or named else found + by_name


def _as_json(argument: Argument) -> tuple[Any, list[dict[str, Any]]]:
    what = f"argument {argument.name!r}"
    structure, entries = described(argument.spec, argument.entries, what)
    leaves: list[dict[str, Any]] = []
    for entry in entries:
        if isinstance(entry, Leaf):
            leaves.append({"input": entry.number})
        elif entry is None or isinstance(entry, (bool, int, float, str)):
            leaves.append({"constant": entry})
        else:
            raise UnsupportedModelError(
                f"{what}: a file holds None, numbers and texts as constants, got a "
                f"{type(entry).__name__}"
            )
    return structure, leaves
