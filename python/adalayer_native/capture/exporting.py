"""torch.export of a model: functional operators, free sizes, and errors that a user can act on."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import random
import re
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import export as torch_export
from torch.utils import _pytree as pytree

from adalayer_native.capture.example import Inputs
from adalayer_native.capture.functional import functionalise, inline_regions
from adalayer_native.capture.model import holds
from adalayer_native.capture.opaque import Call, opaque_calls
from adalayer_native.capture.quiet import quiet
from adalayer_native.capture.recurrence import whole_layers
from adalayer_native.errors import AdaError, UnsupportedModelError

__all__ = ["Export", "branches_in", "broken_guards", "export", "exported_of", "untouched"]

# Operations in a size that a layer gets, where sizes are free, and seconds of CPU that an export
# may take then: "same" padding, for one, makes expressions that grow from layer to layer. Five
# layers of stride 2 make three operations, LeViT's fourteen, two of EfficientNet-Lite's layers more
# than a hundred.
FREE_OPERATIONS = 20
FREE_SECONDS = 15.0


@dataclass
class Export:
    """What torch.export made of a model.

    Attributes:
        module: owner of parameters and buffers, with the functional graph.
        program: the exported program.
        guards: conditions on free sizes, see :class:`~.model.Signature`.
        calls: of excluded submodules, by the key that their operator carries.
    """

    module: fx.GraphModule
    program: torch.export.ExportedProgram
    guards: list[tuple[str, str]]
    calls: dict[str, Call] = field(default_factory=dict)


def export(
    model: nn.Module,
    inputs: Inputs,
    *,
    free_sizes: bool,
    thorough: bool = False,
    exclude: Sequence[str] = (),
) -> Export:
    """Export a model in evaluation mode with a free batch; it is left as it was.

    Args:
        inputs: example of a call, on the model's device; at least two samples.
        free_sizes: leave heights, widths and lengths free where the model allows it, else only
            the batch.
        thorough: leave all writes into tensors to torch's own functionalization. It takes minutes
            where sizes are free; so they are not, where it is needed.
        exclude: submodules that are called and not looked into. Free sizes cannot be had then.

    Raises:
        UnsupportedModelError: it cannot be exported; says why, and where in the model's code.
    """
    if free_sizes and not thorough and not exclude and _says_guards():
        try:
            found = _export(model, inputs, True, False, exclude)
            if found is not None:
                return found
        except AdaError:
            raise
        except Exception:  # fixed sizes may still do; their error is the one to show
            pass
    try:
        found = _export(model, inputs, False, thorough, exclude)
    except AdaError:
        raise
    except Exception as error:  # export runs the user's code: anything may come out of it
        raise UnsupportedModelError(_explained(model, error)) from error
    assert found is not None
    return found


def _says_guards() -> bool:
    """Whether this torch says which sizes a model's code has branched on."""
    return "_guards_code" in getattr(torch.export.ExportedProgram, "__annotations__", {})


def _export(
    model: nn.Module, inputs: Inputs, free_sizes: bool, thorough: bool, exclude: Sequence[str]
) -> Export | None:
    """None where free sizes cannot be had."""
    shapes = torch.export.ShapesCollection()
    for tensor in inputs.tensors():
        axes = _free_axes(tensor, inputs.count, free_sizes)
        if axes:
            shapes[tensor] = axes
    with (
        quiet(),
        untouched(model),
        torch.no_grad(),
        opaque_calls(model, exclude, inputs) as calls,
        whole_layers(),
        _simple(FREE_SECONDS if free_sizes else math.inf),
    ):
        program = torch_export(
            model,
            inputs.args,
            inputs.kwargs,
            dynamic_shapes=shapes,  # type: ignore[arg-type]  # documented, and not in its types
            strict=False,
        )
        found = exported_of(program, thorough=thorough, free_sizes=free_sizes)
    if found is not None:
        found.calls = calls
    if found is not None and _fixes_batch(found, inputs):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be captured with a dynamic batch: its code fixes a "
            f"batch of {inputs.count}; expected a forward that treats all samples alike"
        )
    return found


def branches_in(
    model: nn.Module,
    inputs: Inputs,
    free: Sequence[dict[int, int]],
    ranges: Sequence[tuple[str, range]],
) -> list[tuple[tuple[int, ...], str]]:
    """Sizes at which a model's code, or an operator of torch, takes another branch than at the
    example's: one for each condition, and what it asks.

    Conditions are tried at the sizes of the ranges: at all of them, or a thousand where there are
    more.

    Raises:
        UnsupportedModelError: torch.export finds that the model takes some of the sizes alone.

    Args:
        inputs: example of a call; at least two samples.
        free: per tensor of it, by axis, the number of a range.
        ranges: names and sizes.
    """
    shapes = torch.export.ShapesCollection()
    for tensor, axes in zip(inputs.tensors(), free, strict=True):
        dims = dict.fromkeys(axes, torch.export.Dim.AUTO)
        if tensor.dim() and tensor.shape[0] == inputs.count:
            dims[0] = torch.export.Dim.AUTO
        if dims:
            shapes[tensor] = dims
    try:
        with quiet(), untouched(model), torch.no_grad(), _simple(FREE_SECONDS):
            program = torch_export(
                model,
                inputs.args,
                inputs.kwargs,
                dynamic_shapes=shapes,  # type: ignore[arg-type]  # as above
                strict=False,
            )
    except Exception as error:  # export runs the user's code: anything may come out of it
        place = _place(error)
        where = f"at {place}: " if place else ""
        raise UnsupportedModelError(f"{where}{_first_lines(str(error))}") from error
    problem = _fixed_size(program, free, ranges)
    if problem is not None:
        raise UnsupportedModelError(problem)
    guards = _guards(program)
    if guards is None:
        raise UnsupportedModelError("the conditions of its code on sizes cannot be read")
    return broken_guards(guards, inputs, free, ranges)


def _fixed_size(
    program: torch.export.ExportedProgram,
    free: Sequence[dict[int, int]],
    ranges: Sequence[tuple[str, range]],
) -> str | None:
    """Sizes that an export has fixed, or that have to be equal."""
    wanted = set(program.graph_signature.user_inputs)
    values = [
        node.meta.get("val")
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in wanted
    ]
    tensors = [value for value in values if isinstance(value, Tensor)]
    known: dict[str, int] = {}
    for value, axes in zip(tensors, free, strict=True):
        for axis, number in axes.items():
            name, sizes = ranges[number]
            size: Any = value.shape[axis]
            if not isinstance(size, torch.SymInt):
                if len(sizes) > 1:
                    return f"its code takes {name} {size} alone"
                continue
            if known.setdefault(str(size), number) != number:
                return f"it wants {ranges[known[str(size)]][0]} and {name} to be equal"
            bounds = program.range_constraints.get(size.node.expr)
            # (2 stands for "no lower bound".)
            if bounds is not None and (
                (bounds.lower > 2 and sizes[0] < bounds.lower) or sizes[-1] > bounds.upper
            ):
                return f"it wants {name} to be {bounds.lower} to {bounds.upper}"
    return None


_MOST_TRIED = 1000
_SIZE = re.compile(r"\bs\[(\d+)\]\[(\d+)\]")


def broken_guards(
    guards: Iterable[tuple[str, str]],
    inputs: Inputs,
    free: Sequence[dict[int, int]],
    ranges: Sequence[tuple[str, range]],
) -> list[tuple[tuple[int, ...], str]]:
    """Sizes of the ranges that break conditions of an export, which the example meets, and one of
    the conditions that each breaks. Arguments as of :func:`branches_in`."""
    shapes = [list(tensor.shape) for tensor in inputs.tensors()]
    example = [ranges[k][1][0] for k in range(len(ranges))]
    for shape, axes in zip(shapes, free, strict=True):
        for axis, number in axes.items():
            example[number] = shape[axis]
    found: list[tuple[tuple[int, ...], str]] = []
    for text, shown in guards:
        asked = {(int(k), int(axis)) for k, axis in _SIZE.findall(text)}
        used = sorted({free[k][axis] for k, axis in asked if axis in free[k]})
        condition = compile(text, "guard", "eval")
        # One size may break many.
        known = (sizes for sizes, _ in found)
        for numbers in itertools.chain(known, _combinations(example, used, ranges)):
            other = [
                tuple(numbers[axes[a]] if a in axes else n for a, n in enumerate(shape))
                for shape, axes in zip(shapes, free, strict=True)
            ]
            if not holds(condition, other):
                if all(tuple(numbers) != sizes for sizes, _ in found):
                    found.append((tuple(numbers), shown))
                break
    return found


def _combinations(
    example: Sequence[int], used: Sequence[int], ranges: Sequence[tuple[str, range]]
) -> Iterator[list[int]]:
    """Sizes of all ranges, of which those in use vary."""
    sizes = [ranges[number][1] for number in used]
    tried: Iterable[Sequence[int]]
    if math.prod(map(len, sizes)) <= _MOST_TRIED:
        tried = itertools.product(*sizes)
    else:
        draw = random.Random(0)
        ends = [(item[0], item[-1]) for item in sizes]
        some = ([draw.choice(item) for item in sizes] for _ in range(_MOST_TRIED))
        tried = itertools.chain(itertools.product(*ends), some)
    for numbers in tried:
        found = list(example)
        for number, n in zip(used, numbers, strict=True):
            found[number] = n
        yield found


@contextmanager
def _simple(seconds: float) -> Iterator[None]:
    """Raise :class:`TimeoutError` in a module's call after so much of this thread's time, or where
    a size has become a long expression."""
    thread, end = threading.get_ident(), time.thread_time() + seconds

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if threading.get_ident() != thread:
            return
        if time.thread_time() > end:
            raise TimeoutError(f"free sizes take more than {seconds} seconds")
        sizes: list[Any] = [n for item in inputs if isinstance(item, Tensor) for n in item.shape]
        for size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.count_ops() > FREE_OPERATIONS:
                raise TimeoutError(f"a free size has become {size}")

    if seconds == math.inf:
        yield
        return
    handle = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _fixes_batch(found: Export, inputs: Inputs) -> bool:
    """Whether one more sample breaks a condition that the example meets."""
    count = inputs.count
    sizes = [tuple(tensor.shape) for tensor in inputs.tensors()]
    more = [(count + 1, *size[1:]) if size and size[0] == count else size for size in sizes]
    return any(holds(text, sizes) and not holds(text, more) for text, _ in found.guards)


def exported_of(
    program: torch.export.ExportedProgram,
    *,
    thorough: bool = False,
    free_sizes: bool = False,
) -> Export | None:
    """An exported program with functional operators.

    With ``free_sizes``, None where its guards cannot be read or torch's functionalization is
    needed.
    """
    guards = _guards(program)
    if guards is None:
        if free_sizes:
            return None
        guards = []
    with quiet():
        module = None if thorough else _module(program)
        if module is None or not (inline_regions(module) and functionalise(module.graph)):
            if free_sizes:
                return None
            program = program.run_decompositions({})
            module = _module(program)
            inline_regions(module)
    return Export(module, program, guards)


def _module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    options = inspect.signature(program.module).parameters
    # Checks of ours, with texts of ours: Signature.check.
    module = program.module(**({"check_guards": False} if "check_guards" in options else {}))
    assert isinstance(module, fx.GraphModule)
    return module


def _free_axes(leaf: Tensor, batch: int, free_sizes: bool) -> dict[int, Any]:
    """Which axes of an input may have any size."""
    rank = leaf.dim()
    axes: dict[int, Any] = {}
    dim = torch.export.Dim
    if rank and leaf.shape[0] == batch:
        axes[0] = dim.AUTO
    if free_sizes:
        # Channels stay: a layer fixes them anyhow.
        first = 1 if rank == 3 or (rank == 2 and not leaf.is_floating_point()) else 2
        axes |= {axis: dim.AUTO for axis in range(first, rank) if leaf.shape[axis] > 1}
    return axes


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of an export; whatever the model's code keeps is undone."""
    modules = list(model.modules())
    before = [dict(module.__dict__) for module in modules]
    held = [_Held(value) for state in before for value in state.values() if _is_container(value)]
    written = [_Written(tensor) for tensor in _state_tensors(before)]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # Fused attention kernels would hide the layers in them.
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, state in zip(modules, before, strict=True):
            module.__dict__.clear()
            module.__dict__.update(state)
        for container in held:
            container.restore()
        for tensor in written:
            tensor.restore()


def _state_tensors(states: list[dict[str, Any]]) -> Iterator[Tensor]:
    """Buffers and other tensors that modules keep; no forward writes into its parameters."""
    for state in states:
        for key, value in state.items():
            if key == "_parameters":
                continue
            items = list(value.values()) if isinstance(value, dict) else value
            for item in items if isinstance(items, (list, tuple)) else [items]:
                if isinstance(item, Tensor) and not item.is_inference():
                    yield item


class _Written:
    """A tensor with its values, in case code writes into it: counters, caches, running sums."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version
        self.values = tensor.detach().clone()

    def restore(self) -> None:
        if self.tensor._version != self.version:
            with torch.no_grad():
                self.tensor.detach().copy_(self.values)


def _is_container(value: Any) -> bool:
    return isinstance(value, (list, dict, set))


class _Held:
    """A list, dictionary or set with what is in it: code that appends to one is undone, too."""

    def __init__(self, container: Any) -> None:
        self.container, self.content = container, copy.copy(container)

    def restore(self) -> None:
        """Put back what was in it; others may hold the container itself."""
        if isinstance(self.container, list):
            self.container[:] = self.content
        else:
            self.container.clear()
            self.container.update(self.content)


# -- guards ---------------------------------------------------------------------------------------


def _guards(program: torch.export.ExportedProgram) -> list[tuple[str, str]] | None:
    """Conditions on sizes as expressions over ``s[port][axis]``; None if one cannot be read."""
    texts = getattr(program, "_guards_code", None)
    if texts is None or program.example_inputs is None:
        return None if texts is None else []
    sources = _sources(program)
    found = []
    for text in texts:
        expression = text
        for source, port in sources:
            expression = expression.replace(f"{source}.size()[", f"s[{port}][")
        shown = text
        for source, _ in sources:
            shown = shown.replace(f"{source}.size()[", f"{_readable(source)}.shape[")
        if "L[" in expression:
            return None
        found.append((expression, shown))
    return found


def _sources(program: torch.export.ExportedProgram) -> list[tuple[str, int]]:
    """How guards call the input tensors, the longest first, and their port."""
    args, kwargs = program.example_inputs
    spec = program.module_call_graph[0].signature
    names = list(getattr(spec, "forward_arg_names", None) or ())
    found = []
    port = 0
    leaves, _ = pytree.tree_flatten_with_path((args, kwargs))
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor):
            continue
        rest = pytree.keystr(path[2:])
        key = path[1]
        if isinstance(key, pytree.SequenceKey):
            name = names[key.idx] if key.idx < len(names) else f"args_{key.idx}"
            spelled = [f"L['{name}']", f"L['args'][{key.idx}]"]
        else:
            assert isinstance(key, pytree.MappingKey)
            spelled = [f"L['{key.key}']", f"L['kwargs']['{key.key}']"]
        found += [(f"{text}{rest}", port) for text in spelled]
        port += 1
    return sorted(found, key=lambda item: -len(item[0]))


def _readable(source: str) -> str:
    return re.sub(r"^L\['(\w+)'\]", r"\1", source).replace("args[0]", "args_0")


# -- errors ---------------------------------------------------------------------------------------

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parents[1])


def _explained(model: nn.Module, error: Exception) -> str:
    """Why a model cannot be captured, where in its code, and what to write instead."""
    place = _place(error)
    text = _first_lines(str(error))
    name = type(model).__name__
    where = f" at {place}" if place else ""
    lower = f"{type(error).__name__} {error}".lower()
    if "data-dependent" in lower or "data dependent" in lower or "control flow" in lower:
        advice = (
            "the model's code branches on tensor values there; write it with torch.where, or name "
            "the submodule that does it in capture(..., exclude=[...]), where it stays as it is"
        )
    elif "scriptmodule" in lower or "torchscript" in lower:
        advice = "it holds a TorchScript module; give the Python module it was made from"
    else:
        advice = (
            "expected a model that torch.export.export(model, example, strict=False) accepts with "
            "a free batch: two or more samples stand for it, also where the example has one"
        )
    return f"{name} cannot be captured{where} ({type(error).__name__}: {text}); {advice}"


def _first_lines(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return " ".join(lines)[:500]


def _place(error: BaseException) -> str:
    """File and line of the last frame that belongs to neither torch nor this package."""
    frames: Sequence[traceback.FrameSummary] = ()
    seen: BaseException | None = error
    while seen is not None:
        own = [
            frame
            for frame in traceback.extract_tb(seen.__traceback__)
            if not frame.filename.startswith((_TORCH, _OURS, "<"))
        ]
        frames = own or frames
        seen = seen.__cause__ or seen.__context__
    if not frames:
        return ""
    last = frames[-1]
    code = f", `{last.line}`" if last.line else ""
    return f"{last.filename}:{last.lineno}{code}"
