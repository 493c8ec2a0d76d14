"""What can be refused at the start is refused before Ray is started, which may take a minute."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

from .._files import found_at
from ..errors import AdaError
from .runner import check_inputs, open_runner
from .settings import RUNNER, ModelSource, Settings

__all__ = ["StartError", "bind", "check_start"]


class StartError(AdaError):
    """The server cannot start: its address is taken, or a model cannot be loaded."""


def check_start(settings: Settings, sources: Sequence[ModelSource]) -> None:
    """Models, the repository, the runner and the address for replicas.

    Model files are read whole: their checksums and programs are checked.

    Raises:
        StartError: names the model or option, what was expected and what came.
    """
    try:
        open_runner(settings.runner)
    except (ImportError, AttributeError, ValueError) as error:
        raise StartError(f"runner {settings.runner!r}: {error}") from error
    for source in sources:
        _check_model(source, settings.runner == RUNNER)
    if settings.repository is not None and not settings.repository.is_dir():
        raise StartError(f"repository {settings.repository}: there is no such folder")
    if settings.data_host is not None:
        _bound(settings.data_host, 0, "data host").close()


def _check_model(source: ModelSource, ours: bool) -> None:
    where = f"model {source.name!r}, version {source.version!r}: "
    found = found_at(source.path)
    if found.startswith("is a") and found not in ("is a file", "is a directory"):
        raise StartError(f"{where}{source.path} {found}; expected a file")  # opening it may wait
    try:
        with open(source.path, "rb"):
            pass
    except OSError as error:
        raise StartError(f"{where}{source.path}: {error.strerror}") from error
    if not ours:  # a file of another runtime, which its runner will read
        return
    from ..engine import load

    try:
        check_inputs(load(source.path))
    except AdaError as error:
        raise StartError(f"{where}{error}") from error


def bind(settings: Settings) -> socket.socket:
    """The socket of HTTP at its address; nobody is heard before :meth:`socket.listen`.

    Raises:
        StartError: the address is not this machine's, or is taken.
    """
    return _bound(settings.host, settings.port, "host and port")


def _bound(host: str, port: int, what: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        hint = "; --port 0 takes a free one" if error.errno == errno.EADDRINUSE else ""
        raise StartError(f"{what} {host}:{port}: {error.strerror}{hint}") from error
    listener.setblocking(False)
    return listener
