"""Writing files so that an interruption never leaves half of one; what a path leads to."""

from __future__ import annotations

import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import FileFormatError

__all__ = [
    "found_at",
    "read_json",
    "refuse_overwriting",
    "replacing",
    "require_file",
    "user_cache",
    "write_atomic",
    "write_text_atomic",
]

_KINDS = {
    stat.S_IFREG: "is a file",
    stat.S_IFDIR: "is a directory",
    stat.S_IFIFO: "is a named pipe",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}


def found_at(path: str | os.PathLike[str]) -> str:
    """What a message says of a path: "does not exist", "is a named pipe", …"""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"
    except ValueError as error:  # a zero byte
        return f"cannot be looked at ({error})"
    return _KINDS.get(stat.S_IFMT(mode), "is no file")


def require_file(path: str | os.PathLike[str], what: str = "") -> None:
    """Refuse what is no regular file. (Reading from a named pipe would wait for ever.)

    Args:
        what: comes before the path, such as "weight file".

    Raises:
        FileFormatError: it is none.
    """
    found = found_at(path)
    if found != "is a file":
        shown = f"{what} {os.fspath(path)!r}" if what else f"{os.fspath(path)}:"
        raise FileFormatError(f"{shown} {found}; expected a file")


def refuse_overwriting(
    output: str | os.PathLike[str], *read: str | os.PathLike[str] | None
) -> None:
    """Refuse an output that is one of the files that a command reads: it may be the only copy.

    Raises:
        FileFormatError: it is; names both.
    """
    for each in read:
        try:
            same = each is not None and os.path.samefile(output, each)
        except (OSError, ValueError):  # one of them is not there
            continue
        if same:
            shown = os.fspath(output), os.fspath(each or "")
            raise FileFormatError(
                "the output {!r} would overwrite {!r}, which is read; choose another place".format(
                    *shown
                )
            )


def user_cache() -> Path | None:
    """``adalayer_native`` in the user's cache folder: ``$XDG_CACHE_HOME``, or ``~/.cache`` where it
    is unset or not absolute (the XDG base directory specification says to ignore it then).

    None where nobody knows of a home, as in a container that runs as a number.
    """
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(chosen):
        return Path(chosen) / "adalayer_native"
    try:
        return Path.home() / ".cache" / "adalayer_native"
    except RuntimeError:
        return None


def write_atomic(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write ``data`` to a temporary file beside ``path`` and move it into place.

    Readers see the old file or the new one, never a part; an interrupted write leaves the old.
    Missing parent directories are created.

    Raises:
        OSError: as :func:`replacing`.
    """
    with replacing(path) as temporary:
        # O_EXCL with mode 0o666 lets the umask decide the permissions, as for any other new file.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8; see :func:`write_atomic`."""
    write_atomic(path, text.encode("utf-8"))


def read_json(path: str | os.PathLike[str], kind: tuple[str, int] | None = None) -> dict[str, Any]:
    """A JSON object; ``kind``: its ``"format"`` and ``"version"``.

    Raises:
        FileFormatError: it cannot be read, is none, or of another kind; names the file.
    """
    source = os.fspath(path)
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{source}: not readable as JSON: {error}") from None
    if not isinstance(found, dict) or (kind is not None and found.get("format") != kind[0]):
        wanted = "" if kind is None else f' with "format": "{kind[0]}"'
        raise FileFormatError(f"{source}: expected a JSON object{wanted}")
    if kind is not None and found.get("version") != kind[1]:
        raise FileFormatError(f"{source}: expected version {kind[1]}, got {found.get('version')!r}")
    return found


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is moved into place, else removed.

    Raises:
        OSError: it cannot be written; names ``path``. (A full disk shows in a write, whose error
            knows no name, and nobody has asked for a file of the temporary one.)
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except BaseException as error:
        _removed(temporary)
        if isinstance(error, OSError) and error.filename in (None, os.fspath(temporary), temporary):
            if error.errno is None:  # a library's own words
                words = str(error).replace(os.fspath(temporary), os.fspath(target))
                raise OSError(f"{os.fspath(target)}: {words}") from error
            raise type(error)(error.errno, os.strerror(error.errno), os.fspath(target)) from error
        raise


def _removed(temporary: Path) -> None:
    try:
        temporary.unlink(missing_ok=True)
    except NotADirectoryError:  # what should be a folder is a file
        return
