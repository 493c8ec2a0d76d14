"""``compile``: a packed model as an ``.ada`` file, which needs no Python."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._console import say
from .._files import found_at, read_json, refuse_overwriting
from ..engine import Engine
from ..engine import compile as compile_engine
from ..errors import DataError, FileFormatError, UnsupportedModelError
from ..files import describe
from ..measure import model_milliseconds
from ..models import is_file
from ..ops import get_num_threads
from ..plan import supported_layers
from ..quantization import restore
from .job import CompileJob
from .normalise import CHANNELS, Normalisation, chosen, preset
from .opening import build

__all__ = [
    "classes_of",
    "known_normalisation",
    "network_of",
    "packed_of",
    "run_compile",
    "run_report",
    "save_engine",
]

# Numbers of classes that no layer inside a network has.
_PROBES = (11, 13)


def run_compile(job: CompileJob) -> dict[str, Any]:
    """Compiles, saves and times; returns what it says about the file.

    Raises:
        AdaError: a file, model or shape that does not fit, or parts that run in torch, which an
            ``.ada`` file cannot hold. OSError: the output cannot be written.
    """
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    packed = packed_of(job.source)
    output = packed.with_suffix(".ada") if job.output is None else job.output
    refuse_overwriting(output, packed, packed.with_name("report.json"))
    known = run_report(packed)
    name = network_of(job.model, known, packed)
    shape = _shape(job, known)
    given = chosen(job)
    classes = classes_of(packed, known, name, job.classes)
    model = build(name, job.classes, classes, shape[-1])
    normalisation = given or known_normalisation(known) or preset(name, model)
    x = torch.rand(job.batch, *shape)
    native = restore(model, packed, x)
    engine = compile_engine(native, x, policy="native", weights=job.weights)
    size = save_engine(engine, output, normalisation, known.get("class_names"))
    milliseconds = model_milliseconds({"engine": engine}, x, seconds=1.0)["engine"]
    threads = get_num_threads()
    say(f"normalisation: {normalisation}")
    say(
        f"written to {output}: {size:,} bytes; {milliseconds:.3g} ms per call (batch {job.batch}, "
        f"{threads} thread{'s' if threads != 1 else ''})"
    )
    return {
        "file": str(output),
        "bytes": size,
        "milliseconds": milliseconds,
        "batch": job.batch,
        "threads": threads,
        "input_shape": list(shape),
        "normalisation": normalisation.as_dict(),
    }


def packed_of(source: Path) -> Path:
    """The packed model of a run, or the one that was named.

    Raises:
        FileFormatError: there is none.
    """
    packed = source / "model.safetensors" if source.is_dir() else source
    if not packed.is_file():
        what = "holds no model.safetensors" if source.is_dir() else found_at(source)
        raise FileFormatError(
            f"{os.fspath(source)!r} {what}; expected the output directory of adalayer compress "
            "or a packed model"
        )
    return packed


def run_report(packed: Path) -> dict[str, Any]:
    """What the run that wrote a packed model says about it; nothing where there is no report."""
    path = packed.with_name("report.json")
    if packed.name != "model.safetensors" or not path.is_file():
        return {}
    return read_json(path)


def network_of(name: str | None, known: dict[str, Any], packed: Path) -> str:
    """The name of the network that a packed model is of, as on the command line.

    Raises:
        UnsupportedModelError: neither the option nor the run says it.
    """
    found = name or known.get("model")
    if found is None:
        raise UnsupportedModelError(
            f"{packed} does not say which network it is of, and there is no report.json beside it; "
            "give --model"
        )
    return str(found)


def classes_of(packed: Path, known: dict[str, Any], name: str, wanted: int | None) -> int:
    """How many classes a packed model has, as its run says it; where none does, as many as the
    outputs of the layers that have one for each.

    Raises:
        UnsupportedModelError: these do not say it.
    """
    told = wanted or known.get("model_classes")
    if told is not None:
        return int(told)
    if is_file(name):
        return _PROBES[0]  # the file has its own
    few, more = (supported_layers(build(name, None, count)) for count in _PROBES)
    heads = [
        layer
        for layer, module in few.items()
        if layer in more and (len(module.weight), len(more[layer].weight)) == _PROBES
    ]
    if not heads:
        return _PROBES[0]  # the network does not ask
    sizes = {entry["name"]: entry["shape"][0] for entry in describe(packed) if entry["name"]}
    found = {sizes[layer] for layer in heads if layer in sizes}
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{packed} does not say how many classes it has (layers {', '.join(heads)}); "
            "give --classes"
        )
    return int(found.pop())


def _shape(job: CompileJob, known: dict[str, Any]) -> tuple[int, ...]:
    if job.input_shape is not None:
        return tuple(job.input_shape)
    if "image_size" not in known:
        raise DataError(
            "the size of the input is not known; give --image-size, or --input-shape "
            "(channels, height and width)"
        )
    return CHANNELS, int(known["image_size"]), int(known["image_size"])


def known_normalisation(known: dict[str, Any]) -> Normalisation | None:
    return Normalisation.of_dict(known["normalisation"]) if "normalisation" in known else None


def save_engine(
    engine: Engine,
    path: Path,
    normalisation: Normalisation,
    class_names: Sequence[str] | None,
) -> int:
    """Writes an engine with what a server has to know about its images; the bytes of the file.

    Class names are left out where the engine does not have one output for each.

    Raises:
        UnsupportedModelError: some parts run in torch.
    """
    shape = engine.inputs[0].shape
    preprocessing: dict[str, Any] | None = None
    if len(engine.inputs) == 1 and len(shape) == 3 and shape[0] == CHANNELS:
        preprocessing = {
            "size": list(shape[1:]),
            "mean": list(normalisation.mean),
            "std": list(normalisation.std),
        }
        if shape[1] == shape[2]:  # as the images of compress are: scaled, then cut at the centre
            preprocessing["resize"] = shape[1]
    names = None
    if class_names is not None:
        result = engine(*(port.sample(engine.least_batch) for port in engine.inputs))
        if isinstance(result, torch.Tensor) and result.shape[1:] == (len(class_names),):
            names = list(class_names)
    return engine.save(path, preprocessing=preprocessing, class_names=names)
