"""``compile``: a converted model becomes an engine."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from adalayer_native import _C, ops
from adalayer_native.capture import GraphModel, Inputs
from adalayer_native.capture.exporting import untouched
from adalayer_native.engine import (  # noqa: F401  (they fill the table of rules)
    rules_attention,
    rules_floats,
    rules_images,
    rules_layers,
    rules_pointwise,
    rules_recurrent,
    rules_reductions,
    rules_tokens,
    rules_views,
)
from adalayer_native.engine.call import Call
from adalayer_native.engine.coverage import Row
from adalayer_native.engine.emit import emit
from adalayer_native.engine.export import Exported, export, layer_name, op_name
from adalayer_native.engine.interface import Interface
from adalayer_native.engine.parts import WEIGHTS, NativePart
from adalayer_native.engine.policy import fastest_of, float_choices, layer_times
from adalayer_native.engine.ranges import ranged
from adalayer_native.engine.results import INTEGERS, Leaf, Output, Port, thawed
from adalayer_native.engine.runtime import Engine
from adalayer_native.engine.segments import Part, TorchPart, divide, is_layer
from adalayer_native.engine.steps import Step, TorchStep
from adalayer_native.engine.work import multiply_accumulates
from adalayer_native.errors import CalibrationError, UnsupportedModelError

__all__ = ["check_converted", "compile", "compile_exported", "compile_range"]

POLICIES = ("fastest", "native")


def compile(
    model: nn.Module,
    example_inputs: Any,
    *,
    policy: str = "fastest",
    strict: bool = False,
    weights: str = "measured",
    sizes: Any = None,
    levels: Sequence[nn.Module] = (),
) -> Engine:
    """Compile a converted model to one fused integer engine.

    Batch norm, activation, residual addition and requantization join their convolution, values
    between layers are u8, and every function of a single value is a table. What the engine has no
    operation for runs in torch between native parts; ``engine.coverage()`` lists it.

    Args:
        model: what :func:`adalayer_native.convert` or :func:`adalayer_native.compress` gave.
        example_inputs: a tensor, a tuple of positional arguments, or a dictionary of arguments by
            name, with tensors nested in any way. Sizes but the batch are fixed unless ``sizes``
            frees them, and so is whatever else is among them (None, numbers, texts).
        policy: "fastest" measures every layer against a float kernel with the same dequantized
            weights and the same fake-quantized activations, and keeps the faster (by what it is
            compiled for: the batch of ``example_inputs``), up to a network that is all in float;
            "native" computes all quantized layers in integers. Both kinds are the engine's.
        strict: nothing may run in torch: a node that the engine has no operation for is an error.
        weights: weights below 8 bits are "streamed" (packed in memory, unpacked while they are
            used), "resident" (unpacked to bytes once), or, layer by layer, whichever is faster with
            the current number of threads: "measured". The order of every layer's loops and its
            algorithm are then chosen in the same runs, among them algorithms that keep several
            times the packed bytes (Winograd), and all of it is remembered for this machine (in
            ``$XDG_CACHE_HOME``; ``ADALAYER_PLAN_CACHE`` names another file, or is "off"). Results
            are the same bits, and so is the saved file.
        sizes: heights and widths that the engine takes: ``(min, max)``, ``(min, max,
            multiple_of)`` or an :class:`~.sizes.Size` for those of all images; or by name of an
            input, by number of an axis, one of these or a ``torch.export.Dim``:
            ``{"x": {2: (64, 512, 32), 3: (64, 512, 32)}}``. Axes of one name have one size. The
            model is exported at a few of these sizes, and is refused where it does not do the same
            at all of them, or where the engine does not know how a node follows them. The example's
            size is the one that layers are timed at; plans for another one are made at its first
            call (:meth:`Engine.warm_up` makes and times them before).
        levels: models of the same network with fewer bits, the better ones first, whose integers
            are planes of ``model``'s: the others of
            :func:`adalayer_native.compress_levels`. The engine then has as many levels of quality
            and one more (:meth:`Engine.set_quality`), and stores weights once. What runs in float
            is what does at the best quality.

    Raises:
        ValueError: an unknown policy or form of weights, or ``sizes`` that are not understood.
        UnsupportedModelError: not exportable with a dynamic batch, without native layers, or, if
            strict or with ``levels``, with nodes that the engine has no operation for; names them.
            ``levels`` that are another network, or have other weights.
        CalibrationError: the model is prepared but not converted.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}")
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected an nn.Module, got {type(model).__name__}")
    for each in (model, *levels):
        check_converted(each)
    exported = export(model, example_inputs)
    signature = _signature(model)
    batch = Inputs.of(example_inputs).count
    if sizes is None:
        engine, _ = _compiled(exported, policy, strict, batch, weights, signature)
    else:
        engine = compile_range(
            model,
            exported,
            example_inputs,
            sizes,
            policy=policy,
            strict=strict,
            batch=batch,
            weights=weights,
            signature=signature,
        )
    if levels:
        engine = _with_levels(engine, levels, example_inputs)
    if not _treats_one_alike(model, engine, Inputs.of(example_inputs)):
        engine.require_batch(2)
    engine.came_from(model)
    return engine


def compile_range(
    model: nn.Module,
    exported: Exported,
    example_inputs: Any,
    sizes: Any,
    *,
    policy: str = "native",
    strict: bool = False,
    batch: int = 1,
    weights: str = "measured",
    signature: inspect.Signature | None = None,
) -> Engine:
    """:func:`compile` for a range of sizes, of a model that is exported at the example's size."""
    engine, in_float = _compiled(exported, policy, strict, batch, weights, signature)
    names = {node.name for node in in_float}

    def lower(inputs: Inputs) -> _Lowered:
        other = export(model, inputs)
        return _lowered(other, [node for node in other.graph.nodes if node.name in names])

    found: Engine = ranged(model, engine, Inputs.of(example_inputs), sizes, lower)
    return found


def _with_levels(engine: Engine, levels: Sequence[nn.Module], example_inputs: Any) -> Engine:
    """The engine with levels of quality below its own."""
    part = engine.only_part()
    if part is None:
        raise UnsupportedModelError(
            "levels: parts of the model run in torch, which have one quality; compile with "
            "strict=True to see which"
        )
    kinds = part.program.constants()
    in_float = {
        name
        for op, name, _, _, _, _, constants in part.program.nodes()
        if op == "float_conv" and kinds[constants[0]][0] == "weights"
    }
    for number, model in enumerate(levels, 1):
        exported = export(model, example_inputs)
        layers = [
            node for node in exported.graph.nodes if is_layer(node) and layer_name(node) in in_float
        ]
        try:
            part.program.add_level(_lowered(exported, layers).program)
        except ValueError as error:
            raise UnsupportedModelError(f"levels: {error}") from None
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"levels: level {number}: {error}") from error
    made = NativePart(part.program, part.outputs, part.weights, plan=part.plan)
    return engine.with_part(made)


@dataclass
class _Lowered:
    """A program that is not made ready for this machine."""

    program: _C.Program
    outputs: list[Output]


def _lowered(exported: Exported, as_float: Collection[fx.Node]) -> _Lowered:
    """All of a model as one program.

    Raises:
        UnsupportedModelError: some of it would run in torch.
    """
    parts, reasons = divide(exported, as_float)
    if reasons or len(parts) != 1:
        why = [f"{op_name(n)} (layer {layer_name(n)!r}): {text}" for n, text in reasons.items()]
        raise UnsupportedModelError(f"{len(reasons)} operators run in torch: {'; '.join(why[:5])}")
    return _Lowered(*_program_of(exported, parts[0]))


def _treats_one_alike(model: nn.Module, engine: Engine, inputs: Inputs) -> bool:
    """Whether a model gives for one sample what its graph for several gives, by the shapes."""
    if isinstance(model, GraphModel) and not model.signature.single:
        return False
    one = inputs[:1]
    with untouched(model), torch.no_grad():
        try:
            wanted = one(model)
        except Exception:  # the model's own code, with a batch that nobody has asked for
            return False
    return _shapes(wanted) == _shapes(one(engine))


def _shapes(result: Any) -> list[tuple[int, ...]]:
    leaves = pytree.tree_leaves(result)
    return [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]


def _signature(model: nn.Module) -> inspect.Signature:
    """Names and defaults of a model's arguments.

    The forward of a captured graph takes what was captured; how the model itself is called stands
    beside it.
    """
    found = getattr(getattr(model, "meta", {}).get("signature"), "forward", None)
    return found if isinstance(found, inspect.Signature) else inspect.signature(model.forward)


def check_converted(model: nn.Module) -> None:
    """Raise unless a model has native layers; the error says what it is instead."""
    from adalayer_native.nn.layer import NativeLayer

    if any(isinstance(module, NativeLayer) for module in model.modules()):
        return
    meta = getattr(model, "meta", {})
    if "layers" in meta and not meta["layers"]:
        raise UnsupportedModelError(_all_in_float(model, meta.get("kept_float") or {}))
    if "layers" in meta:
        raise CalibrationError(
            "expected a converted model, got a prepared one; call calibrate(prepared, loader) and "
            "convert(prepared) first"
        )
    raise UnsupportedModelError(
        f"{type(model).__name__} has no native layers: it was never calibrated and converted. "
        "adalayer_native.compress(model, calibration, budget).model is what can be compiled"
    )


def _all_in_float(model: nn.Module, reasons: dict[str, str]) -> str:
    """Why a converted model has nothing that the engine could run."""
    shown = [f"layer {name!r}: {why}" for name, why in reasons.items()]
    more = f"; and {len(shown) - 5} more" if len(shown) > 5 else ""
    if not shown:
        return (
            f"{type(model).__name__}: all layers stayed in float, and there is nothing to compile: "
            "the plan gives none of them bits"
        )
    return (
        f"{type(model).__name__}: all {len(shown)} layers that the plan quantizes stayed in float, "
        f"and there is nothing to compile; {'; '.join(shown[:5])}{more}"
    )


def compile_exported(
    exported: Exported,
    *,
    policy: str = "native",
    strict: bool = False,
    batch: int = 1,
    weights: str = "measured",
    signature: inspect.Signature | None = None,
) -> Engine:
    """:func:`compile` of what is exported already.

    Args:
        batch: for which the policy "fastest" measures.
        signature: of the model's ``forward``: names and defaults of the engine's arguments.
    """
    return _compiled(exported, policy, strict, batch, weights, signature)[0]


def _compiled(
    exported: Exported,
    policy: str,
    strict: bool,
    batch: int,
    weights: str,
    signature: inspect.Signature | None,
) -> tuple[Engine, Collection[fx.Node]]:
    """An engine, and its quantized layers that are computed in float."""
    engine = _build(exported, (), strict, weights, signature)
    if policy == "native":
        return engine, ()
    choices = float_choices(layer_times(exported, engine, batch))
    if not choices:
        return engine, ()
    others = [_build(exported, choice, strict, weights, signature) for choice in choices]
    candidates = [engine, *others]
    place = candidates.index(fastest_of(candidates, batch))
    return candidates[place], ((), *choices)[place]


def _build(
    exported: Exported,
    as_float: Collection[fx.Node],
    strict: bool,
    weights: str,
    signature: inspect.Signature | None,
) -> Engine:
    ports, entries = _ports(exported)
    parts, reasons = divide(exported, as_float)
    if strict and reasons:
        shown = [f"{op_name(n)} (layer {layer_name(n)!r}): {why}" for n, why in reasons.items()]
        raise UnsupportedModelError(
            f"strict: {len(shown)} operators cannot run natively: "
            + "; ".join(shown[:5])
            + ("; ..." if len(shown) > 5 else "")
        )
    tensors = (node for node in _placeholders(exported) if _is_port(node))
    numbers: dict[fx.Node, int] = {node: k for k, node in enumerate(tensors)}
    steps: list[Step] = []
    for part in parts:
        if part.native:
            if not part.outputs:
                continue
            steps.append(_native_step(exported, part, numbers, weights))
        else:
            steps.append(_torch_step(exported, part, numbers, reasons))
    leaves = _result(exported, numbers)
    kept = {leaf.number for leaf in leaves if isinstance(leaf, Leaf)}
    for position, step in enumerate(steps):
        later = {number for other in steps[position + 1 :] for number in other.inputs} | kept
        step.done = [n for n in {*step.inputs, *step.outputs} if n not in later]
    # A tensor that two parts read is dropped once, by the last of them.
    seen: set[int] = set()
    for step in reversed(steps):
        step.done = [n for n in step.done if n not in seen]
        seen.update(step.done)
    call = Call.captured(exported.in_spec, entries, ports, signature)
    return Engine(steps, Interface(tuple(ports), leaves, thawed(exported.out_spec), call))


def _is_port(node: fx.Node) -> bool:
    """Whether a placeholder is a tensor of the call, and not a constant that was captured."""
    return isinstance(node.meta.get("val"), Tensor)


def _ports(exported: Exported) -> tuple[list[Port], list[Any]]:
    """The tensors that a call takes, and what every placeholder is: one of them, or a constant."""
    found: list[Port] = []
    entries: list[Any] = []
    for node in _placeholders(exported):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            entries.append(value)
            continue
        sizes, batched = exported.sizes(node), True
        if sizes is None:
            sizes, batched = tuple(value.shape), False
            if not all(type(size) is int for size in sizes):
                raise UnsupportedModelError(
                    f"input {node.name!r}: expected sizes that are fixed but for a batch in front, "
                    f"got {list(map(str, sizes))}"
                )
        if not value.is_floating_point() and value.dtype not in INTEGERS:
            raise UnsupportedModelError(
                f"input {node.name!r}: expected floats, integers or bools, got {value.dtype}"
            )
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        entries.append(Leaf(len(found)))
        found.append(Port(node.name, sizes, dtype, batched))
    if not any(port.batched for port in found):
        raise UnsupportedModelError("expected a model with a batch among its inputs")
    return found, entries


def _placeholders(exported: Exported) -> list[fx.Node]:
    """The leaves of the arguments, in order: tensors, and constants that were captured."""
    return [node for node in exported.graph.nodes if node.op == "placeholder"]


def _new_numbers(nodes: list[fx.Node], numbers: dict[fx.Node, int]) -> list[int]:
    for node in nodes:
        numbers[node] = len(numbers)
    return [numbers[node] for node in nodes]


def _program_of(exported: Exported, part: Part) -> tuple[_C.Program, list[Output]]:
    """The program of a native part, and how tensors show its outputs."""
    lowered = part.lowered
    assert lowered is not None
    outputs = []
    for node, source, dims in zip(lowered.outputs, lowered.sources, lowered.views, strict=True):
        sizes = exported.sizes(node)
        assert sizes is not None
        outputs.append(Output.of(source, sizes, dims, folded=exported.folds(node) > 1))
    return emit(lowered.program), outputs


def _native_step(exported: Exported, part: Part, numbers: dict[fx.Node, int], weights: str) -> Step:
    lowered = part.lowered
    assert lowered is not None
    program, outputs = _program_of(exported, part)
    inputs = [numbers[node] for node in lowered.inputs]
    run = NativePart(program, outputs, weights)
    return Step(run, inputs, _new_numbers(lowered.outputs, numbers), [])


def _torch_step(
    exported: Exported,
    part: Part,
    numbers: dict[fx.Node, int],
    reasons: dict[fx.Node, str],
) -> Step:
    run = TorchPart(exported, part)
    rows = []
    for node in part.nodes:
        bits = packed = 0
        kernel = op_name(node)
        if is_layer(node):
            weight = node.args[1]
            assert isinstance(weight, fx.Node)
            tensor = exported.tensor(weight)
            bits, packed = int(ops.packed_info(tensor)["bits"]), tensor.numel()
        macs = multiply_accumulates(exported, node)
        row = Row(
            layer_name(node), op_name(node), "torch", kernel, bits, 0.0, packed, macs,
            reasons.get(node, ""),
        )  # fmt: skip
        rows.append((node.name, row))
    inputs = [numbers[node] for node in part.inputs]
    return Step(TorchStep(run, rows), inputs, _new_numbers(part.outputs, numbers), [])


def _result(exported: Exported, numbers: dict[fx.Node, int]) -> list[Any]:
    leaves: list[Any] = []
    for item in exported.outputs:
        if isinstance(item, fx.Node):
            if item not in numbers and item.op == "get_attr":
                leaves.append(exported.tensor(item).clone())
                continue
            if item not in numbers:
                raise UnsupportedModelError(
                    f"the model returns {item} ({item.op}), which is no tensor that it computes"
                )
            leaves.append(Leaf(numbers[item]))
        else:
            leaves.append(item)
    return leaves
