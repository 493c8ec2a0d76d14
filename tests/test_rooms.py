"""Imports and includes point only to a room listed above one's own (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "python" / "adalayer_native"
PYTHON_ROOMS = [
    *(
        "_lazy",
        "_version",
        "errors",
        "_deprecated",
        "_recent",
        "detection",
        "_console",
        "_files",
        "_json_cache",
        "_checkpoint",
        "_stages",
        "_fingerprint",
        "_library",
        "_progress",
        "_ray",
        "_C",
        "plan",
        "operations",
        "cuda",
        "rounding",
        "recurrent",
        "padding",
        "ops",
        "files",
        "nn",
        "pruning",
        "energy",
        "capture",
    ),
    *(
        "quantization",
        "repair",
        "engine",
        "onnx",
        "importance",
        "allocation",
        "tensor_train",
        "distributed",
        "training",
        "models",
        "data",
        "_options",
        "compress",
        "levels",
    ),
    *(
        "measure",
        "microscope",
        "plot",
        "report",
        "study",
        "serve",
        "jobs",
        "demo",
        "infos",
        "cli",
        "__main__",
    ),
]
CPP_ROOMS = ["core", "formats", "reference", "cpu", "engine", "capi", "bindings", "cuda"]
# Folders of csrc/cpu; the kernel table and the interfaces of its kernels lie in none.
CPU_ROOMS = ["", "isa", "image", "conv", "layer"]


def _imports(path: Path) -> Iterator[str]:
    """Rooms that a module imports; inside functions too."""
    package = ["adalayer_native", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], base]).rstrip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            first, _, rest = name.partition(".")
            if first == "adalayer_native" and rest:
                yield rest.split(".")[0]


def test_python_rooms():
    checked = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room == "__init__":
            continue
        for imported in _imports(path):
            if imported == room:
                continue
            checked += 1
            assert PYTHON_ROOMS.index(imported) < PYTHON_ROOMS.index(room), f"{path}: {imported}"
    assert checked > 50


def _cycle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a ring, else none."""
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(imports.get(module, ())):
            if found := follow(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(imports) if (found := follow(module, []))), [])


@pytest.mark.parametrize("room", ["cuda", "ops", "nn", "quantization", "engine"])
def test_no_ring_of_imports_within_a_room(room: str) -> None:
    """Imports for types alone and those inside functions too."""
    files = {path.stem: path for path in (PACKAGE / room).glob("[!_]*.py")}
    imports = {}
    for name, path in files.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}".split(".") for alias in node.names]
                found |= {n[2] for n in names if n[:2] == ["adalayer_native", room]}
        imports[name] = found & files.keys()
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert any(imports.values()) and _cycle(imports) == []


@pytest.mark.parametrize("room", CPP_ROOMS)
def test_cpp_rooms(room):
    allowed = set(CPP_ROOMS[: CPP_ROOMS.index(room) + 1])
    checked = 0
    for path in sorted(p for p in (REPOSITORY / "csrc" / room).rglob("*") if p.is_file()):
        for include in re.findall(r'#include "([^"]+)"', path.read_text(encoding="utf-8")):
            checked += 1
            # Plain structs and scalar formulas, which includes nothing of ours itself.
            if include == "reference/spec.hpp":
                continue
            # The public header, which includes nothing of ours.
            if room == "capi" and include == "adalayer/adalayer.h":
                continue
            assert include.split("/")[0] in allowed, f"{path}: {include}"
    assert checked > 0


@pytest.mark.parametrize("room", CPU_ROOMS)
def test_rooms_of_the_cpu(room):
    allowed = set(CPU_ROOMS[: CPU_ROOMS.index(room) + 1])
    if room != "isa":
        allowed.discard("isa")  # drivers reach kernels through the table
    folder = REPOSITORY / "csrc" / "cpu" / room
    checked = 0
    for path in sorted(folder.rglob("*") if room else folder.glob("*")):
        if not path.is_file():
            continue
        for include in re.findall(r'#include "cpu/([^"]+)"', path.read_text(encoding="utf-8")):
            checked += 1
            first, _, rest = include.partition("/")
            assert (first if rest else "") in allowed, f"{path}: {include}"
    assert checked > 0
