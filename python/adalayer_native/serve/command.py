"""``adalayer serve``. What stands here loads nothing but typer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import _console
from .._options import told
from .settings import RUNNER, Settings, parse_source

__all__ = ["serve"]


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
    degrade: Annotated[
        bool, typer.Option(help="Lower levels of quality while many requests wait.")
    ] = True,
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
    given = models or []
    if name is not None and len(given) != 1:
        hint = "; give each its own, as NAME=model.ada" if given else ""
        raise typer.BadParameter(
            f"it is the name of one MODEL, got {len(given)}{hint}", param_hint="--name"
        )
    if not given and not control:
        raise typer.BadParameter("without --control, MODELS are needed", param_hint="MODELS")
    try:
        sources = [parse_source(text, name) for text in given]
        settings = told(
            Settings,
            locals(),
            runner=RUNNER if runner is None else runner,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    labels = [f"{source.name}:{source.version}" for source in sources]
    if len(set(labels)) < len(labels):
        raise typer.BadParameter(f"two models have one name and version: {', '.join(labels)}")
    try:
        from .server import run
    except ImportError as error:
        _console.fail(f"serving needs `pip install adalayer_native[serve]` ({error})")
        raise typer.Exit(1) from None
    # On one line, for whoever waits for it.
    run(settings, sources, lambda url: print(f"serving {', '.join(labels)} at {url}", flush=True))
