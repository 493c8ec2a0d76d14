"""What a model returns: which of it is looked at, which are logits, and how far it has moved.

**Which outputs.** All float tensors in the result, however they are nested, or those that
``output=`` names: a key, an index, or a path of them with dots (``"logits"``, ``0``,
``"heads.0.boxes"``).

**Which are logits.** Those whose own name is ``logits`` or ends in ``_logits``. Where a model names
none so, the only output that counts, or of a tuple or list the last one if it is ``[N, C]`` or
``[N, C, H, W]`` (or has more axes). Never one with fewer than two classes.

**Where their classes are.** On the second axis, ``[N, C, ...]``, as torch's losses have it. On the
last of ``[N, T, C]`` where the output is named as logits, where an integer input of the model is
``[N, T]`` (a class for every token), or where labels are. A map ``[N, C, H, W]`` that nobody calls
logits has none for labels ``[N]``: a warning says that they are not used.

**How far apart two results are.** For logits the KL divergence of their softmax, in nats, a mean
over samples and positions. For everything else the squared error over the batch, relative to the
squared size of the float model's output. Several outputs add up.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from ..errors import CalibrationError

__all__ = [
    "LossFn",
    "Pick",
    "Result",
    "cross_entropy",
    "distance",
    "has_distance",
    "has_logits",
    "kl_divergence",
    "logits_of",
    "loss_key",
    "loss_of",
    "metric_name",
    "picked",
    "results_of",
    "squared_error",
    "target_for",
    "warn_of_guess",
]

LossFn = Callable[[Any, Any], Tensor]
Pick = str | int | None  # of an output: a key, an index, or a path


@dataclasses.dataclass(frozen=True)
class Result:
    """One float tensor that a model returns.

    Attributes:
        path: where it is in the result; empty for a result that is one tensor.
        value: the tensor.
        classes: its axis of classes where it holds logits, else ``None``.
    """

    path: str
    value: Tensor
    classes: int | None = None

    @property
    def is_logits(self) -> bool:
        """Whether it holds logits."""
        return self.classes is not None

    @property
    def logits(self) -> Tensor:
        """The logits as ``[N, C, ...]``."""
        assert self.classes is not None
        return self.value if self.classes == 1 else self.value.movedim(self.classes, 1)


def picked(output: Any, pick: Pick = None) -> Any:
    """The part of a result that ``output=`` names; the whole without.

    Raises:
        CalibrationError: there is no such part; names those that there are.
    """
    if pick is None:
        return output
    found = output
    for part in [pick] if isinstance(pick, int) else str(pick).split("."):
        try:
            found = _child(found, part)
        except (KeyError, IndexError, AttributeError, TypeError):
            known = [path for path, _ in _tensors(output)]
            what = f"its outputs are {known}" if known != [""] else "it returns one tensor"
            raise CalibrationError(
                f"output={pick!r}: the model returns no such output; {what}"
            ) from None
    return found


def _child(value: Any, part: str | int) -> Any:
    number = part if isinstance(part, int) else int(part) if part.lstrip("-").isdigit() else None
    if isinstance(value, Tensor):
        raise TypeError
    if isinstance(value, Mapping):
        if part in value:
            return value[part]
        if number is not None and number in value:
            return value[number]
        # By position, as the fields of a ModelOutput may be read.
        return list(value.values())[_position(number)]
    if isinstance(value, (list, tuple)) and number is not None:
        return value[number]
    if number is not None and dataclasses.is_dataclass(value):
        return getattr(value, dataclasses.fields(value)[number].name)
    if not isinstance(part, str):
        raise TypeError
    return getattr(value, part)


def _position(number: int | None) -> int:
    if number is None:
        raise KeyError
    return number


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in a result and where they are."""
    if isinstance(value, Tensor):
        yield path, value
        return
    items: Any
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = zip(value._fields, value, strict=True)
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif type(value) in pytree.SUPPORTED_NODES:
        items = enumerate(pytree.tree_leaves(value))
    else:
        return
    for key, item in items:
        yield from _tensors(item, f"{path}.{key}" if path else str(key))


def results_of(
    output: Any, pick: Pick = None, tokens: Set[int] = frozenset(), target: Any = None
) -> list[Result]:
    """The float tensors that are looked at, see the module's text for the rules.

    Args:
        output: what a model returned.
        pick: ``output=`` of the user.
        tokens: lengths of the model's integer inputs ``[N, T]``.
        target: labels, which may say where the classes are.

    Raises:
        CalibrationError: no such output, or none of floating point.
    """
    prefix = "" if pick is None else str(pick)
    found = [
        (path, value)
        for path, value in _tensors(picked(output, pick), prefix)
        if value.is_floating_point()
    ]
    if not found:
        where = f"output={pick!r} holds" if pick is not None else "the model returns"
        raise CalibrationError(
            f"{where} no tensor of floating point, got {type(picked(output, pick)).__name__}; "
            "there is nothing to compare"
        )
    named = [_is_named(path) for path, _ in found]
    anywhere = any(_is_named(path) for path, _ in _tensors(output))
    results = []
    for position, (path, value) in enumerate(found):
        if anywhere:
            chosen = named[position]
        elif len(found) == 1:
            chosen = True
        else:
            last = position + 1 == len(found) and path.rpartition(".")[2].isdigit()
            chosen = last and value.dim() != 3
        axis = _classes(value, named[position], tokens, target) if chosen else None
        results.append(Result(path, value, axis))
    return results


def _is_named(path: str) -> bool:
    name = path.rpartition(".")[2].lower()
    return name == "logits" or name.endswith("_logits")


def _classes(value: Tensor, named: bool, tokens: Set[int], target: Any) -> int | None:
    if value.dim() < 2:
        return None
    if isinstance(target, Tensor) and target.dim() == 1 and value.dim() > 3 and not named:
        warnings.warn(
            f"labels [N] do not belong to an output of shape {_shape(value)}: they are not used, "
            "and results are compared with the float model's; a loss_fn would use them",
            stacklevel=2,
        )
        return None
    axis = 1
    if value.dim() == 3:
        of_tokens = named or value.shape[1] in tokens
        if isinstance(target, Tensor) and target.dim() == 2:
            by_token = target.shape[1] == value.shape[1]
            by_position = target.shape[1] == value.shape[2]
            if by_token != by_position:
                of_tokens = by_token
        axis = 2 if of_tokens else 1
    return axis if value.shape[axis] >= 2 else None


def _shape(value: Tensor) -> str:
    return "[" + ", ".join(["N", *map(str, value.shape[1:])]) + "]"


def logits_of(
    output: Any, pick: Pick = None, tokens: Set[int] = frozenset(), target: Any = None
) -> Tensor:
    """The one output of logits, as ``[N, C, ...]``.

    Of several that are named so it is the one whose name is ``logits``.

    Raises:
        CalibrationError: none, or several.
    """
    results = results_of(output, pick, tokens, target)
    found = [result for result in results if result.is_logits]
    exact = [result for result in found if result.path.rpartition(".")[2].lower() == "logits"]
    if len(found) > 1 and len(exact) == 1:
        found = exact
    if len(found) == 1:
        return found[0].logits
    shapes = {result.path or "output": tuple(result.value.shape) for result in results}
    if not found:
        raise CalibrationError(
            f"expected the model to return logits [N, classes, ...], got {shapes}; give a loss_fn, "
            "or name the logits with output="
        )
    raise CalibrationError(
        f"several outputs hold logits, {[result.path for result in found]}; name one with output="
    )


def has_logits(
    output: Any, pick: Pick = None, tokens: Set[int] = frozenset(), target: Any = None
) -> bool:
    """Whether there is one output of logits."""
    try:
        logits_of(output, pick, tokens, target)
    except CalibrationError:
        return False
    return True


def has_distance(output: Any, pick: Pick = None) -> bool:
    """Whether :func:`distance` has something of floating point to compare."""
    return any(value.is_floating_point() for _, value in _tensors(picked(output, pick)))


def metric_name(
    loss_fn: LossFn | None,
    target: Any,
    output: Any,
    pick: Pick = None,
    tokens: Set[int] = frozenset(),
) -> str:
    """Which loss :func:`loss_of` computes."""
    if loss_fn is not None:
        return "loss_fn"
    if isinstance(target, Tensor) and has_logits(output, pick, tokens, target):
        return "cross_entropy"
    kinds = {result.is_logits for result in results_of(output, pick, tokens)}
    names = {True: "kl_divergence", False: "squared_error"}
    return " + ".join(names[kind] for kind in sorted(kinds, reverse=True))


def loss_of(
    output: Any,
    float_output: Any,
    target: Any,
    loss_fn: LossFn | None = None,
    *,
    pick: Pick = None,
    tokens: Set[int] = frozenset(),
) -> float:
    """Mean loss of one batch.

    ``loss_fn(output, target)`` if given (``target`` is the float model's output where there are
    no labels, and both are the part that ``pick`` names), else cross-entropy against labels where
    there is one output of logits, else the :func:`distance` from the float model's outputs.
    """
    if loss_fn is not None:
        target = target_for(loss_fn, target)
        wanted = picked(float_output, pick) if target is None else target
        value = loss_fn(picked(output, pick), wanted)
        return float(value.mean() if isinstance(value, Tensor) else value)
    if isinstance(target, Tensor) and has_logits(output, pick, tokens, target):
        return float(cross_entropy(logits_of(output, pick, tokens, target).float(), target))
    return float(distance(float_output, output, pick, tokens))


def target_for(loss_fn: LossFn, target: Any) -> Any:
    """Labels, or ``None`` where a loss compares with the float model's outputs in any case."""
    return None if getattr(loss_fn, "distills", False) else target


def loss_key(loss_fn: LossFn | None) -> str:
    """What a loss computes, for files that keep what was measured with it.

    Of a function that is its code, its defaults and what it closes over; globals that it reads are
    not known. Other objects are what they print as.
    """
    if loss_fn is None:
        return "None"
    if isinstance(loss_fn, functools.partial):
        rest = loss_fn.args, sorted(loss_fn.keywords.items())
        return f"partial {loss_key(loss_fn.func)} {rest!r}"
    code = getattr(loss_fn, "__code__", None)
    name = f"{getattr(loss_fn, '__module__', '')}.{getattr(loss_fn, '__qualname__', loss_fn)}"
    if code is None:
        return name
    cells = [cell.cell_contents for cell in getattr(loss_fn, "__closure__", None) or ()]
    own = getattr(loss_fn, "__defaults__", None), getattr(loss_fn, "__kwdefaults__", None), cells
    return f"{name} {hashlib.sha256(f'{_steps(code)} {own!r}'.encode()).hexdigest()[:16]}"


def _steps(code: types.CodeType) -> str:
    consts = [_steps(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {consts}"


def warn_of_guess(
    output: Any, pick: Pick = None, tokens: Set[int] = frozenset(), target: Any = None
) -> None:
    """Warn where a map is taken for logits because nothing says what it is.

    A detector's head has the shape of a segmenter's, and the KL divergence of a softmax over boxes
    means nothing.
    """
    if not has_distance(output, pick):
        return
    for result in results_of(output, pick, tokens):
        if result.classes != 1 or result.value.dim() < 3 or _is_named(result.path):
            continue
        positions = (result.value.shape[0], *result.value.shape[2:])
        if isinstance(target, Tensor) and tuple(target.shape) == positions:
            continue
        if isinstance(target, Tensor) and target.dim() == 1 and result.value.dim() > 3:
            continue  # that such labels do not belong to it was said
        warnings.warn(
            f"output {result.path or 'of the model'} {_shape(result.value)} is taken for logits of "
            f"{result.value.shape[1]} classes at every position. If it is something else, such as "
            "boxes, say so: loss_fn=TaskLoss.of({...}); if it is, call it 'logits', give labels, "
            "or loss_fn=TaskLoss.of({'output': 'classes'})",
            stacklevel=4,
        )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits ``[N, C, ...]``; labels below 0 are left out where they are -100.

    Raises:
        CalibrationError: labels that do not fit.
    """
    try:
        return functional.cross_entropy(logits, labels)
    except (IndexError, RuntimeError) as error:
        raise CalibrationError(
            f"labels {tuple(labels.shape)} of {labels.dtype} do not fit logits "
            f"{tuple(logits.shape)} ({error}); give a loss_fn, or name the logits with output="
        ) from error


def distance(
    float_output: Any, output: Any, pick: Pick = None, tokens: Set[int] = frozenset()
) -> Tensor:
    """How far a result is from the float model's, see the module's text; differentiable."""
    wanted = results_of(float_output, pick, tokens)
    found = results_of(output, pick, tokens)
    parts = [
        _divergence(a.logits, b.logits) if a.is_logits else squared_error(a.value, b.value)
        for a, b in zip(wanted, found, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def kl_divergence(float_output: Tensor, output: Tensor) -> float:
    """Mean over samples (and positions) of KL(softmax(float) || softmax(output)), in nats."""
    return float(_divergence(float_output, output))


def _divergence(float_output: Tensor, output: Tensor) -> Tensor:
    reference = functional.log_softmax(float_output.float(), dim=1)
    logp = functional.log_softmax(output.float(), dim=1)
    terms = reference.exp() * (reference - logp)
    # A class that is masked out, with logits of -inf, has no part in it.
    terms = torch.where(reference == -torch.inf, 0.0, terms)
    return terms.sum(dim=1).mean()


def squared_error(float_output: Tensor, output: Tensor) -> Tensor:
    """``|y' - y|^2 / |y|^2`` over a batch; the mean square where the float output is all zero."""
    reference = float_output.detach().float()
    error = (output.float() - reference).square().sum()
    energy = reference.square().sum()
    return error / torch.where(energy > 0, energy, max(1, reference.numel()))
