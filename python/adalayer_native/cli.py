"""Command line: ``adalayer demo | train | compress | report | info | study | serve``."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adalayer_native import files, ops
from adalayer_native.allocation import METHODS, Budget
from adalayer_native.data.layout import DATA_HELP
from adalayer_native.errors import AdaError
from adalayer_native.study.commands import app as study_app

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compress PyTorch CNNs layer by layer and run them on native low-bit kernels.",
)

app.add_typer(study_app, name="study")

_INTERRUPTED = 130  # what shells report after Ctrl-C

Method = Enum("Method", {name: name for name in METHODS}, type=str)  # type: ignore[misc]
_ADALAYER = Method("adalayer")


def _budget(**limits: Any) -> Budget | None:
    if all(value is None for value in limits.values()):
        return None
    return Budget(**limits)


def _fixed(texts: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for text in texts:
        name, _, bits = text.rpartition("=")
        if not name or not bits.isdecimal():
            raise typer.BadParameter(
                f"expected LAYER=BITS, such as conv1=8, got {text!r}", param_hint="--fix"
            )
        found[name] = int(bits)
    return found


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"expected whole numbers separated by commas, such as 2,3,4, got {text!r}",
            param_hint="--layer-bits",
        ) from None


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="Built-in name or package.module:callable.")],
    weights: Annotated[Path, typer.Option(help="Float weights, safetensors.")],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("compressed"),
    size: Annotated[float | None, typer.Option(help="Budget: fraction of the float file.")] = None,
    size_bytes: Annotated[int | None, typer.Option("--bytes", help="Budget: bytes.")] = None,
    bits: Annotated[float | None, typer.Option(help="Budget: average bits per weight.")] = None,
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
    method: Annotated[Method, typer.Option(help="How bits are chosen.")] = _ADALAYER,
    fix: Annotated[
        list[str] | None, typer.Option(help="LAYER=BITS, decided already; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Layer or module to leave in float; repeatable.")
    ] = None,
    layer_bits: Annotated[
        str | None, typer.Option(help="For fixed/ascending/descending, e.g. 2,3,4.")
    ] = None,
    stages: Annotated[
        str | None, typer.Option(help="Their stages, e.g. layer1,layer2,layer3.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=0, help="Fine-tuning epochs.")] = 2,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the fine-tuning.")] = 0.01,
    distill: Annotated[bool, typer.Option(help="The float model teaches.")] = True,
    repair: Annotated[
        bool, typer.Option(help="Round and prune by the layers' output errors.")
    ] = True,
    calibration: Annotated[int, typer.Option(min=1, help="Training images to calibrate on.")] = 512,
    image_size: Annotated[int, typer.Option(min=1, help="Pixels per side.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    classes: Annotated[
        int | None, typer.Option(help="Classes; default: what the data has.")
    ] = None,
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
    country: Annotated[
        str | None, typer.Option(help="Whose electricity, for CO2: ISO alpha-3, e.g. ITA.")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: torch's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json at the end.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bars.")] = False,
) -> None:
    """Compress MODEL under a budget; write plan.json, model.safetensors and report.json to OUT.

    Interrupted? The same command goes on where it stopped.
    """
    from adalayer_native.jobs import CompressJob, run_compress

    job = CompressJob(
        model=model,
        weights=weights,
        data=data,
        out=out,
        budget=_budget(
            size=size,
            bytes=size_bytes,
            bits=bits,
            latency=latency,
            bops=bops,
            energy=energy,
            loss=loss,
        ),
        method=method.value,
        layer_bits=_whole_numbers(layer_bits) if layer_bits else None,
        stages=[name.strip() for name in stages.split(",")] if stages else None,
        fixed=_fixed(fix or []),
        exclude=exclude or [],
        epochs=epochs,
        lr=lr,
        distill=distill,
        repair=repair,
        calibration=calibration,
        image_size=image_size,
        batch_size=batch_size,
        classes=classes,
        criterion=criterion,
        frontier=frontier,
        energy=energy_use,
        country=country,
        seed=seed,
        threads=threads,
        progress=not quiet,
    )
    report = run_compress(job)
    if as_json:
        print(json.dumps(report, indent=2))


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="Built-in name or package.module:callable.")],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    out: Annotated[Path, typer.Option(help="Weight file, safetensors.")],
    epochs: Annotated[int, typer.Option(min=1)] = 60,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.1,
    label_smoothing: Annotated[float, typer.Option(help="Share spread over all classes.")] = 0.1,
    weight_decay: Annotated[float, typer.Option()] = 5e-4,
    augment: Annotated[bool, typer.Option(help="Random crops and mirroring.")] = True,
    image_size: Annotated[int, typer.Option(min=1, help="Pixels per side.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    classes: Annotated[
        int | None, typer.Option(help="Classes; default: what the data has.")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: torch's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report at the end.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bars.")] = False,
) -> None:
    """Train the float network MODEL; write its weights to OUT and a report beside them.

    Interrupted? The same command goes on where it stopped.
    """
    from adalayer_native.jobs import TrainJob, run_train

    job = TrainJob(
        model=model,
        data=data,
        out=out,
        epochs=epochs,
        lr=lr,
        label_smoothing=label_smoothing,
        weight_decay=weight_decay,
        augment=augment,
        image_size=image_size,
        batch_size=batch_size,
        classes=classes,
        seed=seed,
        threads=threads,
        progress=not quiet,
    )
    report = run_train(job)
    if as_json:
        print(json.dumps(report, indent=2))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Output directory of compress or demo.")],
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about a finished run: pictures and a table of layers."""
    from adalayer_native.report import load_run, write_page

    write_page(load_run(run), out)
    Console(stderr=True).print(f"written to {out}", markup=False, soft_wrap=True)


@app.command()
def info(
    file: Annotated[
        Path,
        typer.Argument(help="Packed model (model.safetensors), engine (.ada) or a run directory."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show what a packed model, a compiled engine or a finished run holds, layer by layer."""
    if file.is_dir():
        _run_info(file, as_json)
        return
    if file.suffix == ".ada":
        _engine_info(file, as_json)
        return
    entries = files.describe(file)
    total = file.stat().st_size
    if as_json:
        print(json.dumps({"file": str(file), "bytes": total, "layers": entries}, indent=2))
        return
    layers = [e for e in entries if e["name"] is not None]
    params = sum(e["params"] for e in layers)
    weight_bits = 8 * sum(e["bytes"] for e in layers) / params
    table = Table(title=f"{file.name} — {total:,} bytes, {weight_bits:.2f} bits per weight in all")
    for column in ("layer", "shape"):
        table.add_column(column)
    for column in ("params", "bits", "nonzero", "encoding", "input bits", "bytes", "of float32"):
        table.add_column(column, justify="right")
    for e in layers:
        table.add_row(
            e["name"],
            "×".join(str(v) for v in e["shape"]),
            f"{e['params']:,}",
            str(e["bits"]),
            "all stored" if e["encoding"] == "dense" else f"{e['nonzero']:.1%}",
            e["encoding"],
            str(e["input_bits"]),
            f"{e['bytes']:,}",
            f"{e['bytes'] / (4 * e['params']):.1%}",
        )
    table.caption = (
        f"other tensors: {entries[-1]['bytes']:,} bytes; this machine runs "
        f"{', '.join(ops.isas())}, in use: {ops.active_isa()}"
    )
    Console().print(table)


def _run_info(path: Path, as_json: bool) -> None:
    from adalayer_native.report import load_run, run_table

    run = load_run(path)
    if as_json:
        print(json.dumps(run.data, indent=2))
    else:
        Console().print(run_table(run))


def _engine_info(file: Path, as_json: bool) -> None:
    from adalayer_native.engine import load

    engine = load(file)
    coverage, total = engine.coverage(rounds=0), file.stat().st_size
    if as_json:
        report = {
            "file": str(file),
            "bytes": total,
            "inputs": [{"name": port.name, "shape": list(port.shape)} for port in engine.inputs],
            "preprocessing": engine.preprocessing,
            "classes": engine.class_names,
            "nodes": [asdict(row) for row in coverage],
        }
        print(json.dumps(report, indent=2))
        return
    table = Table(title=f"{file.name} — {total:,} bytes")
    for column in ("node", "operation"):
        table.add_column(column)
    for column in ("bits", "input bits", "bytes", "MACs per image"):
        table.add_column(column, justify="right")
    table.add_column("runs here as")
    for row in coverage:
        numbers = (row.bits, row.input_bits, row.bytes, row.macs)
        counts = (f"{n:,}" if n else "" for n in numbers)
        table.add_row(escape(row.name), row.op, *counts, escape(row.kernel))
    ports = "; ".join(f"{p.name} {p}" for p in engine.inputs)
    classes = f"{len(engine.class_names)} classes" if engine.class_names else "no class names"
    given = "with" if engine.preprocessing else "without"
    table.caption = escape(f"input {ports}; {classes}; {given} preprocessing")
    Console().print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the results.")] = Path("demo-output"),
    size: Annotated[float, typer.Option(help="Budget: fraction of the float file.")] = 0.10,
    epochs: Annotated[int, typer.Option(min=1, help="Training epochs of the float network.")] = 5,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train AdaLayerNet on handwritten digits, compress it two ways, run it natively, compare."""
    from adalayer_native.demo import run_demo

    run_demo(out, size=size, epochs=epochs, seed=seed)


@app.command()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="model.ada, NAME=model.ada or NAME:VERSION=model.ada; several."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of one MODEL; default: its file's.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Processes per model version.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of a replica; default: CPUs over replicas.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Images per engine call.")] = 16,
    batch_wait_ms: Annotated[
        float, typer.Option(min=0, help="Wait for company while a replica is free.")
    ] = 0.0,
    timeout: Annotated[float, typer.Option(help="Seconds until a request is given up.")] = 30.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Waiting requests per model.")] = 256,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 64 << 20,
    max_upload: Annotated[int, typer.Option(min=1, help="Bytes of an uploaded model.")] = 1 << 30,
    max_connections: Annotated[int, typer.Option(min=1, help="Open connections.")] = 4096,
    drain: Annotated[float, typer.Option(min=0, help="Seconds after SIGTERM.")] = 30.0,
    repository: Annotated[
        Path | None, typer.Option(help="Folder of NAME/VERSION/model.ada, to load by name.")
    ] = None,
    control: Annotated[bool, typer.Option(help="Clients may load and unload models.")] = True,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to join: auto, host:port; default: our own."),
    ] = None,
    data_host: Annotated[
        str | None, typer.Option(help="Where replicas reach this process; default: found out.")
    ] = None,
    runner: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve MODELS over HTTP (Open Inference Protocol v2) until SIGTERM; needs extra [serve]."""
    from adalayer_native.serve.settings import RUNNER, Settings, parse_source

    given = models or []
    if name is not None and len(given) != 1:
        raise typer.BadParameter(f"it needs one MODEL, got {len(given)}", param_hint="--name")
    if not given and not control:
        raise typer.BadParameter("without --control, MODELS are needed", param_hint="MODELS")
    try:
        sources = [parse_source(text, name) for text in given]
        settings = Settings(
            host=host,
            port=port,
            replicas=replicas,
            threads=threads,
            max_batch=max_batch,
            batch_wait_ms=batch_wait_ms,
            timeout=timeout,
            max_queue=max_queue,
            max_body=max_body,
            max_upload=max_upload,
            max_connections=max_connections,
            drain=drain,
            repository=repository,
            control=control,
            address=address,
            data_host=data_host,
            runner=RUNNER if runner is None else runner,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    labels = [f"{source.name}:{source.version}" for source in sources]
    if len(set(labels)) < len(labels):
        raise typer.BadParameter(f"two models have one name and version: {', '.join(labels)}")
    try:
        from adalayer_native.serve.server import run
    except ImportError as error:
        _fail(f"serving needs `pip install adalayer_native[serve]` ({error})", 1)
    # On one line, for whoever waits for it.
    run(settings, sources, lambda url: print(f"serving {', '.join(labels)} at {url}", flush=True))


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
        raise
    if code == _INTERRUPTED:  # newer versions of typer return it for Ctrl-C
        resumable = sys.argv[1:2] in (["compress"], ["train"], ["study"])
        _fail("interrupted" + "; the same command goes on where it stopped" * resumable, code)
    sys.exit(code)  # commands return None, which is success


def _is_usage_error(error: Any) -> bool:
    # typer carries click inside itself in newer versions, so the class has no one import path.
    return hasattr(error, "show") and hasattr(error, "exit_code")


def _fail(message: str, code: int) -> NoReturn:
    _say("[bold red]error:[/]", message)
    sys.exit(code)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say("[bold yellow]warning:[/]", str(message))


def _say(label: str, message: str) -> None:
    # Escaped: shapes such as [64, 3] are no markup.
    Console(stderr=True, soft_wrap=True).print(f"{label} {escape(message)}", highlight=False)
