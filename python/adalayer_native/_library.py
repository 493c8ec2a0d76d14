"""Where the C library lies, for programs that embed networks (docs/embedding.md)."""

from __future__ import annotations

from pathlib import Path

from adalayer_native.errors import AdaError

__all__ = ["get_cmake_dir", "get_include", "get_library_dir"]

_PACKAGE = Path(__file__).resolve().parent


def _existing(folder: Path, what: str) -> str:
    if not folder.is_dir():
        raise AdaError(
            f"{folder} does not exist: this installation has no {what}; it was built with "
            "ADALAYER_BUILD_LIBRARY=OFF, or it is a source tree (pip install . builds it)"
        )
    return str(folder)


def get_include() -> str:
    """The folder to add to a compiler's include path, for ``#include <adalayer/adalayer.h>``.

    Raises:
        AdaError: the installation has no headers.
    """
    return _existing(_PACKAGE / "include", "headers")


def get_library_dir() -> str:
    """The folder of ``libadalayer.so.1``, with ``cmake/`` and ``pkgconfig/`` below it.

    Raises:
        AdaError: the installation has no library.
    """
    return _existing(_PACKAGE / "lib", "library")


def get_cmake_dir() -> str:
    """The folder for ``cmake -Dadalayer_DIR=...``, where ``find_package(adalayer)`` looks.

    Raises:
        AdaError: the installation has no library.
    """
    return _existing(Path(get_library_dir()) / "cmake" / "adalayer", "CMake package")
