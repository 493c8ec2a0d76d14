"""Options that several commands share, checked before anything is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from .data.folders import DATA_HELP
from .plan import MAX_BITS, MIN_BITS, PATTERNS

__all__ = [
    "MAX_SEED",
    "Batch",
    "Classes",
    "ClassesOfRun",
    "Country",
    "Data",
    "Exclude",
    "Group",
    "ImageSize",
    "InputShape",
    "Mean",
    "Model",
    "ModelOfRun",
    "Quiet",
    "Scale",
    "Seed",
    "Source",
    "Std",
    "Threads",
    "above_zero",
    "at_least_zero",
    "averages",
    "fixed_widths",
    "input_widths",
    "normalising",
    "numbers_of",
    "optional_folder",
    "output_file",
    "output_folder",
    "output_kinds",
    "picture_file",
    "share",
    "shares",
    "told",
    "whole_numbers",
    "widths",
    "zero_patterns",
]

# Seeds of several generators are made of one, by factors of a million.
MAX_SEED = 2**32 - 1


def most_threads() -> int:
    """More threads than this are a mistake, and so many of them that they cannot be started."""
    return max(64, 4 * (os.cpu_count() or 1))


class Group(TyperGroup):
    """Commands to which an empty argument is a mistake: ``--out "$NOT_SET"`` is no directory."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click."""
        for place, text in enumerate(args):
            name, equals, value = text.partition("=")
            if text and not (name.startswith("--") and equals and not value):
                continue
            before = args[place - 1] if place and args[place - 1].startswith("-") else ""
            where = f"for {name or before}" if name or before else "among the arguments"
            ctx.fail(f"expected a value {where}, got an empty text")
        return super().parse_args(ctx, args)


Job = TypeVar("Job")


def told(kind: type[Job], options: Mapping[str, Any], **others: Any) -> Job:
    """A job, or settings, with the options that have the names of its fields.

    Args:
        kind: a dataclass.
        options: of a command, as it got them: its ``locals()``.
        others: fields that have another name or form than their option.
    """
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: options[name] for name in names & options.keys()} | others)


def above_zero(value: float | None) -> float | None:
    """Callback of an option that is a finite number above 0."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"expected a finite number above 0, got {value:g}")
    return value


def at_least_zero(value: float | None) -> float | None:
    """Callback of an option that is a finite number, 0 or more."""
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise typer.BadParameter(f"expected a finite number, 0 or more, got {value:g}")
    return value


def _threads(value: int | None) -> int | None:
    if value is not None and not 1 <= value <= most_threads():
        raise typer.BadParameter(
            f"expected 1 to {most_threads()} on this machine of {os.cpu_count()} CPUs, got {value}"
        )
    return value


def _existing_part(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def output_folder(path: Path) -> Path:
    """Callback of an option for a folder that will be written to."""
    there = _existing_part(path)
    if not there.is_dir():
        raise typer.BadParameter(f"{there} is a file; expected a folder")
    return _writable(path, there)


def optional_folder(path: Path | None) -> Path | None:
    """The same for an option that need not be given."""
    return None if path is None else output_folder(path)


def output_file(path: Path | None) -> Path | None:
    """Callback of an option for a file that will be written."""
    if path is None:
        return None
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; expected the name of a file")
    there = _existing_part(path.absolute().parent)
    if not there.is_dir():
        raise typer.BadParameter(f"{there} is a file; expected a folder")
    return _writable(path, there)


def picture_file(path: Path | None) -> Path | None:
    """Callback of an option for a picture that will be written."""
    if path is not None and path.suffix.lower() not in (".png", ".svg"):
        raise typer.BadParameter(f"expected a file name in .png or .svg, got {path.name!r}")
    return output_file(path)


def _writable(path: Path, there: Path) -> Path:
    if not os.access(there, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"{there} cannot be written to")
    return path


def _parsed(text: str, what: Callable[[str], Any], kind: str, example: str) -> list[Any]:
    try:
        return [what(part) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(
            f"expected {kind} separated by commas, such as {example}, got {text!r}"
        ) from None


def whole_numbers(text: str | None, example: str = "2,3,4") -> list[int] | None:
    """What is written with commas."""
    return None if text is None else _parsed(text, int, "whole numbers", example)


def numbers_of(text: str | None) -> list[float] | None:
    """What is written with commas, fractions like 1/255 allowed."""
    return None if text is None else _parsed(text, _number, "numbers", "0.5,0.5,0.5")


def normalising(mean: str | None, std: str | None, scale: str | None) -> dict[str, Any]:
    """The jobs' ``mean``, ``std`` and ``scale`` from the options of these names."""
    values = numbers_of(scale)
    factor = None if values is None else values[0]
    return {"mean": numbers_of(mean), "std": numbers_of(std), "scale": factor}


def _number(text: str) -> float:
    top, slash, bottom = text.partition("/")
    value = float(top) / float(bottom) if slash else float(top)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _checked(parse: Callable[[str | None], Any]) -> Callable[[str | None], str | None]:
    """A callback that only tries; the command parses the text itself."""

    def check(text: str | None) -> str | None:
        parse(text)
        return text

    return check


def _channels(text: str | None) -> str | None:
    values = numbers_of(text)
    if values is not None and len(values) not in (1, 3):
        raise typer.BadParameter(
            f"expected one number, or three for red, green and blue, got {len(values)}"
        )
    return text


def _deviations(text: str | None) -> str | None:
    values: Sequence[float] = numbers_of(_channels(text)) or (1.0,)
    if min(values) <= 0:
        raise typer.BadParameter(f"expected numbers above 0, got {min(values):g}")
    return text


def _scale(text: str | None) -> str | None:
    values: Sequence[float] = numbers_of(text) or (1.0,)
    if len(values) != 1 or values[0] <= 0:
        raise typer.BadParameter(f"expected one number above 0, got {text!r}")
    return text


def fixed_widths(texts: list[str] | None) -> list[str] | None:
    """Callback of options LAYER=BITS."""
    for text in texts or []:
        name, _, bits = text.rpartition("=")
        if not name or not bits.isdecimal():
            raise typer.BadParameter(f"expected LAYER=BITS, such as conv1=8, got {text!r}")
        if not MIN_BITS <= int(bits) <= MAX_BITS:
            raise typer.BadParameter(f"expected {MIN_BITS} to {MAX_BITS} bits, got {text!r}")
    names = [text.rpartition("=")[0] for text in texts or []]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise typer.BadParameter(f"layer {twice[0]!r} is given more than once")
    return texts


def output_kinds(texts: list[str] | None) -> list[str] | None:
    """Callback of options OUTPUT=KIND."""
    names = [text.rpartition("=")[0] for text in texts or []]
    for text, name in zip(texts or [], names, strict=True):
        if not name or text.endswith("="):
            raise typer.BadParameter(f"expected OUTPUT=KIND, such as logits=classes, got {text!r}")
        if names.count(name) > 1:
            raise typer.BadParameter(f"output {name!r} is given more than once")
    return texts


def share(value: float) -> float:
    """Callback of an option that is a share of something."""
    if not 0 <= value < 1:
        raise typer.BadParameter(f"expected a share from 0 to below 1, got {value:g}")
    return value


def widths(text: str | None) -> str | None:
    """Callback of an option of bits, separated by commas."""
    for width in whole_numbers(text) or []:
        if not MIN_BITS <= width <= MAX_BITS:
            raise typer.BadParameter(f"expected {MIN_BITS} to {MAX_BITS} bits, got {width}")
    return text


def averages(text: str | None) -> str | None:
    """Callback of an option of falling average widths, separated by commas."""
    values = numbers_of(text)
    if values is None:
        return None
    if not all(MIN_BITS <= v <= MAX_BITS for v in values):
        raise typer.BadParameter(f"expected {MIN_BITS} to {MAX_BITS} bits, got {text!r}")
    if len(values) < 2 or any(a <= b for a, b in pairwise(values)):
        raise typer.BadParameter(
            f"expected two or more widths, the best level first, such as 8,4,3, got {text!r}"
        )
    return text


def shares(text: str) -> str:
    """Callback of an option of different shares with 0 among them, separated by commas."""
    from .allocation.closed_form import MAX_SPARSITY  # brings numpy

    values = numbers_of(text) or []
    if not all(0 <= v <= MAX_SPARSITY for v in values) or 0 not in values:
        raise typer.BadParameter(f"expected shares from 0 to {MAX_SPARSITY} with 0, got {text!r}")
    return _different(text, values)


def zero_patterns(text: str) -> str:
    """Callback of an option of patterns, "unstructured" among them, separated by commas."""
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= set(PATTERNS) or "unstructured" not in names:
        raise typer.BadParameter(
            f"expected some of {', '.join(PATTERNS)} with unstructured among them, got {text!r}"
        )
    return _different(text, names)


def input_widths(text: str) -> str:
    """Callback of an option of bits below 8, separated by commas, or ``none``."""
    if text != "none":
        for width in whole_numbers(text, "7,6") or []:
            if not MIN_BITS <= width < MAX_BITS:
                raise typer.BadParameter(
                    f"expected {MIN_BITS} to {MAX_BITS - 1} bits, or none, got {text!r}"
                )
    return text


def _different(text: str, values: Sequence[Any]) -> str:
    if len(set(values)) != len(values):
        raise typer.BadParameter(f"expected each only once, got {text!r}")
    return text


def input_sizes(text: str | None) -> str | None:
    """Callback of an option of channels, height and width."""
    sizes = whole_numbers(text, "3,32,64")
    if sizes is not None and (len(sizes) != 3 or min(sizes) < 1):
        raise typer.BadParameter(f"expected channels, height and width, got {text!r}")
    return text


Model = Annotated[
    str, typer.Argument(help="Built-in name, package.module:callable or an .onnx file.")
]
Data = Annotated[str, typer.Option(help=DATA_HELP)]
Classes = Annotated[int | None, typer.Option(min=1, help="Classes; default: what the data has.")]
Mean = Annotated[
    str | None,
    typer.Option(
        callback=_channels,
        help="Mean of the training's images, one number or R,G,B, of values from 0 to 1. Default: "
        "the model's own where it is known (built-in, timm, torchvision), else ImageNet's. "
        "--mean 0 --std 1: values from 0 to 1 as they are.",
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        callback=_deviations,
        help="Their standard deviation, likewise. Given one of the two, the other is 0 or 1.",
    ),
]
Scale = Annotated[
    str | None,
    typer.Option(
        callback=_scale,
        help="What pixels from 0 to 255 are multiplied by before mean and deviation: 1 where these "
        "are of values from 0 to 255. Default: 1/255.",
    ),
]
Source = Annotated[
    Path, typer.Argument(help="Output directory of compress, or a packed model.safetensors.")
]
ModelOfRun = Annotated[
    str | None, typer.Option(help="Built-in name or package.module:callable; default: the run's.")
]
ClassesOfRun = Annotated[int | None, typer.Option(min=1, help="Default: the run's.")]
ImageSize = Annotated[int, typer.Option(min=1, max=4096, help="Pixels per side.")]
InputShape = Annotated[
    str | None,
    typer.Option(callback=input_sizes, help="Channels, height and width instead, e.g. 3,32,64."),
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Layer or module to leave in float; repeatable.")
]
Batch = Annotated[int, typer.Option(min=1, help="Images per batch.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of everything that is drawn.")]
Threads = Annotated[int | None, typer.Option(callback=_threads, help="Default: torch's.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Country = Annotated[
    str | None, typer.Option(help="Whose electricity, for CO2: ISO alpha-3, such as ITA.")
]
