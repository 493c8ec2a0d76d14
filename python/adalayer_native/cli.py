"""Command line: ``adalayer demo``, ``train``, ``compress``, ``compile``, ``profile``, ``report``, …

What stands here loads nothing but typer; each command imports what it runs.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from . import _console
from ._options import (
    MAX_SEED,
    Batch,
    Classes,
    ClassesOfRun,
    Country,
    Data,
    Exclude,
    Group,
    ImageSize,
    InputShape,
    Mean,
    Model,
    ModelOfRun,
    Quiet,
    Scale,
    Seed,
    Source,
    Std,
    Threads,
    above_zero,
    at_least_zero,
    averages,
    fixed_widths,
    input_widths,
    normalising,
    numbers_of,
    optional_folder,
    output_file,
    output_folder,
    output_kinds,
    picture_file,
    share,
    shares,
    told,
    whole_numbers,
    widths,
    zero_patterns,
)
from .allocation.methods import METHODS, method_of
from .errors import AdaError
from .serve.command import serve
from .study.commands import app as study_app

# Without rich's markup and panels: those read [serve] as markup, and cut what is long.
app = typer.Typer(
    cls=Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Compress PyTorch CNNs layer by layer and run them on native low-bit kernels.",
)

app.add_typer(study_app, name="study", short_help="Repeat the two papers' experiments.")

_INTERRUPTED = 130  # what shells report after Ctrl-C

Method = Enum("Method", {name: name for name in METHODS}, type=str)  # type: ignore[misc]
_ADALAYER = Method("adalayer")
Weights = Enum(  # type: ignore[misc]
    "Weights", {name: name for name in ("measured", "streamed", "resident")}, type=str
)
_MEASURED = Weights("measured")


def _version(wanted: bool) -> None:
    if wanted:
        from ._version import __version__

        print(f"adalayer_native {__version__}")
        raise typer.Exit


@app.callback()
def adalayer(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    """Compress PyTorch CNNs layer by layer and run them on native low-bit kernels."""


def _budget(method: str, limits: dict[str, float | None]) -> Any:
    """The budget that the options give, if any."""
    from .allocation import Budget, refusals

    if any(value is not None for value in limits.values()):
        return Budget(**limits)  # type: ignore[arg-type]
    known = method_of(method)
    if known.budget:
        more = ", --latency, --bops, --energy or --loss" if known.several else ""
        raise refusals.missing(method, f": --size, --bytes or --bits{more}")
    return None


def _check_levels(method: str, limits: dict[str, float | None], *others: Any) -> None:
    """Levels have plans of their own."""
    from .allocation import refusals

    *given, repaired = others
    if any(value is not None for value in (*limits.values(), *given)) or not repaired:
        raise refusals.levels_apart()
    if method not in (_ADALAYER.value, "optimal"):
        raise refusals.levels_of_one_method(method)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _printed(found: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=2))


def _shape(image_size: int | None, input_shape: str | None) -> list[int] | None:
    """Channels, height and width, from one of the two options."""
    if image_size is not None and input_shape is not None:
        raise typer.BadParameter("expected one of --image-size and --input-shape, got both")
    return whole_numbers(input_shape) if image_size is None else [3, image_size, image_size]


@app.command(short_help="Compress a network under a budget.")
def compress(
    model: Model,
    data: Data,
    weights: Annotated[
        Path | None, typer.Option(help="Float weights, safetensors; an ONNX file has its own.")
    ] = None,
    out: Annotated[
        Path, typer.Option(callback=output_folder, help="Directory for the results.")
    ] = Path("compressed"),
    size: Annotated[float | None, typer.Option(help="Budget: fraction of the float file.")] = None,
    size_bytes: Annotated[int | None, typer.Option("--bytes", help="Budget: bytes.")] = None,
    bits: Annotated[float | None, typer.Option(help="Budget: average bits per weight.")] = None,
    levels: Annotated[
        str | None,
        typer.Option(
            callback=averages,
            help="Instead of a budget: average bits of levels of quality in one file, such as "
            "8,4,3; repaired together, not fine-tuned.",
        ),
    ] = None,
    latency: Annotated[
        float | None, typer.Option(help="Budget of optimal: ms per engine call, batch 1.")
    ] = None,
    bops: Annotated[
        float | None, typer.Option(help="Budget of optimal: bit operations per image.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Budget of optimal: modelled µJ per image.")
    ] = None,
    loss: Annotated[
        float | None,
        typer.Option(help="Budget of optimal: nats above 8 bits; the fastest plan within it."),
    ] = None,
    latency_table: Annotated[
        Path | None,
        typer.Option(help="Latencies of the machine that the plan is for: adalayer profile's."),
    ] = None,
    method: Annotated[Method, typer.Option(help="How bits are chosen.")] = _ADALAYER,
    fix: Annotated[
        list[str] | None,
        typer.Option(callback=fixed_widths, help="LAYER=BITS, decided already; may be repeated."),
    ] = None,
    exclude: Exclude = None,
    layer_bits: Annotated[
        str | None,
        typer.Option(callback=widths, help="For fixed/ascending/descending, e.g. 2,3,4."),
    ] = None,
    stages: Annotated[
        str | None, typer.Option(help="Their stages, e.g. layer1,layer2,layer3.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=0, help="Fine-tuning epochs.")] = 2,
    lr: Annotated[
        float, typer.Option(callback=above_zero, help="Peak learning rate of the fine-tuning.")
    ] = 0.01,
    distill: Annotated[bool, typer.Option(help="The float model teaches.")] = True,
    repair: Annotated[
        bool, typer.Option(help="Round and prune by the layers' output errors.")
    ] = True,
    calibration: Annotated[int, typer.Option(min=1, help="Training images to calibrate on.")] = 512,
    effort: Annotated[
        str, typer.Option(help="low, normal or high: learning of the repair, search of optimal.")
    ] = "normal",
    image_size: ImageSize = 32,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    batch_size: Batch = 128,
    classes: Classes = None,
    criterion: Annotated[
        str | None, typer.Option(help="What A of eq. (1), or optimal's error table, comes from.")
    ] = None,
    frontier: Annotated[
        bool | None,
        typer.Option(
            "--frontier/--no-frontier",
            help="Measure the Pareto frontier for the report; default: with method optimal.",
        ),
    ] = None,
    energy_use: Annotated[
        bool, typer.Option("--energy-use", help="Meter energy of the run and of inference.")
    ] = False,
    country: Country = None,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json at the end.")] = False,
    quiet: Quiet = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only check everything, and say what would be done.")
    ] = False,
) -> None:
    """Compress MODEL under a budget.

    OUT gets plan.json, model.safetensors, model.ada (the engine, for adalayer serve and programs in
    C) and report.json. Interrupted? The same command goes on where it stopped.
    """
    limits = {
        "size": size,
        "bytes": size_bytes,
        "bits": bits,
        "latency": latency,
        "bops": bops,
        "energy": energy,
        "loss": loss,
    }
    budget = None if levels is not None else _budget(method.value, limits)
    if levels is not None:
        _check_levels(method.value, limits, layer_bits, stages, criterion, latency_table, repair)
    if not quiet:
        _console.say("checking model, weights and data")
    from .jobs import CompressJob, check_compress, run_compress

    job = told(
        CompressJob,
        locals(),
        method=method.value,
        levels=numbers_of(levels),
        layer_bits=whole_numbers(layer_bits),
        stages=_names(stages),
        fixed={name: int(width) for name, _, width in (text.rpartition("=") for text in fix or [])},
        exclude=exclude or [],
        **normalising(mean, std, scale),
        energy=energy_use,
        progress=not quiet,
    )
    report = check_compress(job) if check else run_compress(job)
    _printed(report, as_json)


@app.command(short_help="Train a float network.")
def train(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(callback=output_file, help="Weight file, safetensors.")],
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 60,
    lr: Annotated[float, typer.Option(callback=above_zero, help="Peak learning rate.")] = 0.1,
    label_smoothing: Annotated[
        float, typer.Option(callback=share, help="Share spread over all classes.")
    ] = 0.1,
    weight_decay: Annotated[
        float, typer.Option(callback=at_least_zero, help="Of SGD, for weights.")
    ] = 5e-4,
    augment: Annotated[bool, typer.Option(help="Random crops and mirroring.")] = True,
    image_size: ImageSize = 32,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    batch_size: Batch = 128,
    classes: Classes = None,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report at the end.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train the float network MODEL; write its weights to OUT and a report beside them.

    Interrupted? The same command goes on where it stopped.
    """
    from .jobs import TrainJob, run_train

    job = told(
        TrainJob,
        locals(),
        **normalising(mean, std, scale),
        progress=not quiet,
    )
    report = run_train(job)
    _printed(report, as_json)


@app.command("compile", short_help="Compile a packed model to an .ada file.")
def compile_packed(
    source: Source,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", callback=output_file, help="The file; default: model.ada beside it."
        ),
    ] = None,
    model: ModelOfRun = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels per side; default: the run's.")
    ] = None,
    input_shape: InputShape = None,
    classes: ClassesOfRun = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    weights: Annotated[
        Weights,
        typer.Option(
            help="Form in which they are timed here, and the choice of kernels is remembered; the "
            "file is the same."
        ),
    ] = _MEASURED,
    batch: Annotated[int, typer.Option(min=1, help="Images per call for the timing.")] = 1,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what came of it.")] = False,
) -> None:
    """Compile a packed model to an .ada file, which needs neither Python nor torch.

    adalayer serve and libadalayer run it.
    """
    shape = _shape(image_size, input_shape)
    from .jobs import CompileJob, run_compile

    job = told(
        CompileJob,
        locals(),
        input_shape=shape,
        **normalising(mean, std, scale),
        weights=weights.value,
    )
    found = run_compile(job)
    _printed(found, as_json)


@app.command(short_help="Measure the latencies of this machine, for plans made elsewhere.")
def profile(
    model: Annotated[
        str,
        typer.Argument(
            help="Built-in name, package.module:callable or an .onnx file; or what --shapes wrote, "
            "or an .ada file."
        ),
    ],
    out: Annotated[Path, typer.Option(callback=output_file, help="The file, JSON.")] = Path(
        "latencies.json"
    ),
    shapes: Annotated[
        Path | None,
        typer.Option(
            callback=optional_folder,
            help="Measure nothing: write into this folder what another machine has to run, which "
            "needs no code of MODEL.",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Float weights, safetensors; default: random ones. They tell on time."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Pixels per side; default: 32.")
    ] = None,
    input_shape: InputShape = None,
    classes: Annotated[int, typer.Option(min=1, help="Of the model.")] = 10,
    exclude: Exclude = None,
    isa: Annotated[
        str | None, typer.Option(help="Instruction set; default: the fastest of this machine.")
    ] = None,
    bits: Annotated[
        str, typer.Option(callback=widths, help="Bits of weights to measure.")
    ] = "2,3,4,5,6,7,8",
    sparsities: Annotated[
        str, typer.Option(callback=shares, help="Shares of zeros to measure, 0 among them.")
    ] = "0,0.3,0.45,0.6,0.75,0.9",
    patterns: Annotated[
        str, typer.Option(callback=zero_patterns, help="Where the zeros lie.")
    ] = "unstructured,block16x64,block32x64",
    input_bits: Annotated[
        str,
        typer.Option(
            callback=input_widths, help="Bits of layers' inputs besides 8; none: no others."
        ),
    ] = "7,6",
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what came of it.")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure how long the layers of MODEL take on this machine with every option of a plan.

    adalayer compress --method optimal --latency MS --latency-table OUT plans with it, on any
    machine. Interrupted? The same command goes on where it stopped.
    """
    shape = _shape(image_size, input_shape)
    from .jobs import ProfileJob, run_profile

    job = told(
        ProfileJob,
        locals(),
        input_shape=shape or [3, 32, 32],
        exclude=exclude or [],
        bits=tuple(sorted(set(whole_numbers(bits) or ()))),
        sparsities=tuple(numbers_of(sparsities) or ()),
        patterns=tuple(_names(patterns) or ()),
        input_bits=() if input_bits == "none" else tuple(whole_numbers(input_bits) or ()),
        progress=not quiet,
    )
    found = run_profile(job)
    _printed(found, as_json)


@app.command(short_help="Find the layers that lost accuracy, and what would recover it.")
def compare(
    source: Source,
    weights: Annotated[
        Path | None, typer.Option(help="Float weights, safetensors; default: the run's.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="As for compress; default: the run's. Training images of it.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(callback=output_file, help="JSON file; default: compare.json beside it."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(callback=picture_file, help="Draw it as well: a .png or .svg file."),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(min=1, help="Images; every second one only judges the suggestions."),
    ] = 256,
    suggest: Annotated[bool, typer.Option(help="Try changes, and measure their effect.")] = True,
    task: Annotated[
        list[str] | None,
        typer.Option(
            callback=output_kinds,
            help="OUTPUT=KIND: the error is a loss of what the output is: classes, binary, "
            "probabilities, values or boxes; may be repeated.",
        ),
    ] = None,
    detection: Annotated[
        str | None,
        typer.Option(
            help="The error is a detector's. JSON, as engine.save has it: which outputs are boxes, "
            "and which scores."
        ),
    ] = None,
    model: ModelOfRun = None,
    classes: ClassesOfRun = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Pixels per side; default: the run's.")
    ] = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of the images, where no run says it.")
    ] = 0,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON at the end.")] = False,
    quiet: Quiet = False,
) -> None:
    """Compare a packed model with its float network, layer by layer, worst first.

    The images are training images that the run was not calibrated with. adalayer report shows the
    result on its page.
    """
    from .jobs import CompareJob, run_compare

    job = told(
        CompareJob,
        locals(),
        task={name: kind for name, _, kind in (text.rpartition("=") for text in task or [])},
        **normalising(mean, std, scale),
        progress=not quiet,
    )
    found = run_compare(job)
    _printed(found, as_json)


@app.command(short_help="Write one HTML page about a finished run.")
def report(
    run: Annotated[Path, typer.Argument(help="Output directory of compress or demo.")],
    out: Annotated[Path, typer.Option(callback=output_file, help="The HTML file.")] = Path(
        "report.html"
    ),
) -> None:
    """Write one self-contained HTML page about a finished run: pictures and a table of layers."""
    from ._files import refuse_overwriting
    from .report import load_run, write_page

    for path in run.glob("*"):
        if path.suffix != ".html":
            refuse_overwriting(out, path)
    write_page(load_run(run), out)
    _console.say(f"written to {out}")


@app.command(short_help="Show a packed model, an engine, a run, or this machine.")
def info(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="Packed model (model.safetensors), engine (.ada), ONNX file (.onnx) or a run "
            "directory; without: this machine's instruction sets and threads."
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Height and width that an ONNX file leaves free."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show what a model's file, a compiled engine or a finished run holds, layer by layer."""
    from . import infos

    onnx = file is not None and file.suffix == ".onnx"
    if image_size is not None and not onnx:
        raise typer.BadParameter("--image-size is for ONNX files")

    if file is None:
        infos.show_machine(as_json)
    elif file.is_dir():
        infos.show_run(file, as_json)
    elif file.suffix == ".ada":
        infos.show_engine(file, as_json)
    elif onnx:
        infos.show_onnx(file, as_json, image_size)
    else:
        infos.show_packed(file, as_json)


@app.command(short_help="Train, compress and compare a small network.")
def demo(
    out: Annotated[
        Path, typer.Option(callback=output_folder, help="Directory for the results.")
    ] = Path("demo-output"),
    size: Annotated[
        float, typer.Option(callback=above_zero, help="Budget: fraction of the float file.")
    ] = 0.10,
    epochs: Annotated[int, typer.Option(min=1, help="Training epochs of the float network.")] = 5,
    seed: Seed = 0,
) -> None:
    """Train AdaLayerNet on handwritten digits, compress it two ways, run it natively, compare."""
    from .demo import run_demo

    run_demo(out, size=size, epochs=epochs, seed=seed)


app.command(short_help="Serve .ada files over HTTP.")(serve)


def main() -> None:
    """Entry point: errors that the package raises on purpose are one sentence, not a traceback."""
    warnings.showwarning = _show_warning
    try:
        code = app(standalone_mode=False)
    except typer.Exit as done:
        code = done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except AdaError as error:
        _fail(str(error), 1)
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        _fail(f"{error.filename}: {error.strerror}" if named else str(error), 1)
    except Exception as error:
        if _is_usage_error(error):
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        if _is_lack_of_memory(error):
            _fail(f"not enough memory ({_first_line(error)}); fewer or smaller images need less", 1)
        raise
    if code == _INTERRUPTED:  # newer versions of typer return it for Ctrl-C
        resumable = sys.argv[1:2] in (["compress"], ["train"], ["profile"], ["study"])
        _fail("interrupted" + "; the same command goes on where it stopped" * resumable, code)
    sys.exit(code)  # commands return None, which is success


def _is_usage_error(error: Any) -> bool:
    # typer carries click inside itself in newer versions, so the class has no one import path.
    return hasattr(error, "show") and hasattr(error, "exit_code")


def _is_lack_of_memory(error: Exception) -> bool:
    """Python's, numpy's (MemoryErrors both) or torch's, which is a RuntimeError."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and re.search("(not enough|can't allocate) memory", str(error)) is not None
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _fail(message: str, code: int) -> NoReturn:
    _console.fail(message)
    sys.exit(code)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _console.warn(str(message))


if __name__ == "__main__":
    main()
