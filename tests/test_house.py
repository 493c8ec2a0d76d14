"""What CONTRIBUTING.md promises of the tree: where things are, and how long functions get."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "python" / "adalayer_native"
MOST_LINES, MOST_PARAMETERS = 80, 10

QUESTIONS = (
    "a kernel family",
    "a convolution algorithm",
    "an importance criterion",
    "an observer of ranges",
    "an operator of the engine",
    "an endpoint of the server",
    "a kind of budget",
    "an encoding of packed weights",
    "a front end",
    "a picture",
)

# Many keyword arguments are what a user can choose.
INTERFACES = {
    "allocation/allocate.py": {"allocate"},
    "allocation/pareto.py": {"pareto"},
    "compress.py": {"compress"},
    "importance/analyze.py": {"analyze"},
    # An operator's arguments are its schema.
    "ops/recurrence.py": {"recurrence"},
    "repair/model.py": {"repair"},
    "training/finetune.py": {"finetune"},
    "training/fit.py": {"fit"},
}
# A command's signature is its help.
COMMANDS = {
    "cli.py": {"compress", "train", "compile_packed", "profile", "compare"},
    "serve/command.py": {"serve"},
    "study/commands.py": {"adalayernet", "green"},
}


def rows() -> dict[str, list[str]]:
    """The table of CONTRIBUTING.md: what is to be added, and the paths that it names."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    part = text.split("## Where would I change …")[1].split("\n## ")[0]
    found = {}
    for line in part.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 2 and "`" in cells[1]:
            found[cells[0]] = re.findall(r"`([\w./*-]+)`", cells[1])
    return found


def test_the_table_answers_ten_questions() -> None:
    assert tuple(rows()) == QUESTIONS


@pytest.mark.parametrize("question", QUESTIONS)
def test_files_that_the_table_names_exist(question: str) -> None:
    paths = rows()[question]
    assert len(paths) >= 3
    for path in paths:
        assert list(REPOSITORY.glob(path)), f"{question}: {path} does not exist"
    assert any(path.startswith("tests/") for path in paths), f"{question}: no test is named"


def functions() -> Iterator[tuple[str, str, int, int]]:
    """File, name, lines without the docstring, and parameters of every function."""
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        for name, node in _defined(ast.parse(path.read_text(encoding="utf-8")), ""):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                text = node.body[0]
                lines -= (text.end_lineno or 0) - text.lineno + 1
            arguments = node.args
            names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            own = bool(names) and names[0].arg in ("self", "cls")
            yield file, name, lines, len(names) - own


def _defined(
    tree: ast.AST, prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        name = prefix
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{prefix}.{node.name}".strip(".")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield name, node
        yield from _defined(node, name)


def test_functions_are_short_and_take_few_parameters() -> None:
    allowed = {
        (file, name)
        for exceptions in (INTERFACES, COMMANDS)
        for file, names in exceptions.items()
        for name in names
    }
    found = list(functions())
    assert len(found) > 1000
    many = {(file, name) for file, name, _, count in found if count > MOST_PARAMETERS}
    assert many == allowed, "what may take many parameters is what does"
    commands = {(file, name) for file, names in COMMANDS.items() for name in names}
    long = {
        f"{file} {name}: {lines} lines"
        for file, name, lines, _ in found
        if lines > MOST_LINES and (file, name) not in commands
    }
    assert not long


@pytest.mark.parametrize("place", ["jobs/*.py", "demo.py", "infos.py", "cli.py", "study/*.py"])
def test_tables_are_printed_whole(place: str) -> None:
    """Commands print tables by ``print_table``, which breaks no number, and texts by themselves."""
    found = False
    for file in PACKAGE.glob(place):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "console.print",
                "Console().print",
                "Console(stderr=True).print",
            ):
                texts = (ast.Constant, ast.JoinedStr, ast.Name)
                assert all(isinstance(each, texts) for each in node.args), ast.unparse(node)
        found = True
    assert found


@pytest.mark.skipif(shutil.which("make") is None, reason="make was not found")
def test_what_a_first_user_waits_for(tmp_path) -> None:
    """``make demo`` compiles and installs what it runs; tests and the server come later."""

    def commands(target: str) -> str:
        folders = (f"VENV={tmp_path}/venv", f"BUILD={tmp_path}/build")
        return subprocess.run(
            ["make", "-n", target, *folders],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    demo = commands("demo")
    assert "pip wheel" in demo and "build.targets=wheel_contents" in demo
    assert "adalayer demo" in demo and '"torch==' in demo
    later = ("torchvision", "adalayer_native[", "cmake --build", "ctest")
    assert not any(word in demo for word in later)
    test = commands("test")
    assert all(word in test for word in later)
    # The second target of a user begins with what the first has left.
    assert demo.rpartition("adalayer demo")[0].count("pip wheel") == test.count("pip wheel") == 1


_HEAD = re.compile(r"([A-Za-z_~][\w:~]*)\s*\(")
_BODY = re.compile(
    r"\s*(?:const|noexcept|override|final|mutable|\s|->\s*[\w:<>,&* ]+)*(?::[^;{]*)?\{"
)
_NO_FUNCTIONS = {"if", "for", "while", "switch", "return", "catch", "sizeof", "decltype", "alignas"}


def _end(text: str, start: int, pair: str) -> int:
    """Where the bracket that opens at ``start`` is closed."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == pair[0]) - (text[place] == pair[1])
        if depth == 0:
            return place
    return len(text)


def _parameters(text: str) -> int:
    depth, count = 0, int(bool(text.strip()))
    for character in text:
        depth += (character in "(<{[") - (character in ")>}]")
        count += character == "," and depth == 0
    return count


def cpp_functions() -> Iterator[tuple[str, int, int]]:
    """Place, lines and parameters of every function in C++ and CUDA."""
    for path in sorted((REPOSITORY / "csrc").rglob("*")):
        if path.suffix not in (".cpp", ".hpp", ".inl", ".cu", ".cuh"):
            continue
        text = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
        text = re.sub(r'"(\\.|[^"\\\n])*"|\'(\\.|[^\'\\])\'', '""', text)
        for head in _HEAD.finditer(text):
            close = _end(text, head.end() - 1, "()")
            body = _BODY.match(text, close + 1)
            if body is None or head[1] in _NO_FUNCTIONS:
                continue
            lines = text.count("\n", head.start(), _end(text, body.end() - 1, "{}")) + 1
            place = f"{path.relative_to(REPOSITORY)}:{text.count(chr(10), 0, head.start()) + 1}"
            yield f"{place} {head[1]}", lines, _parameters(text[head.end() : close])


def test_functions_of_cpp_are_short_and_take_few_parameters() -> None:
    found = list(cpp_functions())
    assert len(found) > 1500
    assert not [
        (place, lines, count)
        for place, lines, count in found
        if lines > MOST_LINES or count > MOST_PARAMETERS
    ]
