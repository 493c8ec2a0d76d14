"""Counts what the inner loops of the ARM rows are made of: ``python -m bench.arm_counts``.

There is no ARM machine here, and what an emulator takes says nothing. What can be known without
one is how many instructions and loads a loop has for how many products, from the disassembly of
``build/aarch64`` (``make test-arm`` builds it), and what llvm-mca makes of that for processors that
the installed LLVM has a model of its own for. ``--write`` puts the table into docs/performance.md;
``--others FILE.o ...`` counts the loops of other people's object files in the same way.
"""

import argparse
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build/aarch64/CMakeFiles/adalayer_core.dir/csrc/cpu/isa"
PAGE = ROOT / "docs/performance.md"
MARKERS = (
    "<!-- arm counts: begin (written by python -m bench.arm_counts --write) -->",
    "<!-- arm counts: end -->",
)

# Products of one instruction on 128 bits, by its name and the type of what it adds to.
PRODUCTS = {
    ("smull", "8h"): 8,
    ("smull2", "8h"): 8,
    ("smlal", "8h"): 8,
    ("smlal2", "8h"): 8,
    ("umull", "8h"): 8,
    ("umull2", "8h"): 8,
    ("umlal", "8h"): 8,
    ("umlal2", "8h"): 8,
    ("smlal", "4s"): 4,
    ("smlal2", "4s"): 4,
    ("sdot", "4s"): 16,
    ("udot", "4s"): 16,
    ("usmmla", "4s"): 32,
    ("smmla", "4s"): 32,
}
# (row, what it computes, object file, pattern of the function's name, products that one stands for)
LOOPS = [
    ("neon", "direct, a weight is -128", "neon/gemm", r"product_pass<.*Bytes<1>, 3>", 1.0),
    ("neon", "direct, weights up to 127", "neon/gemm", r"product_pass<.*Bytes<2>, 3>", 1.0),
    ("neon", "direct, up to 63 (7 bits)", "neon/gemm", r"product_pass<.*Bytes<4>, 3>", 1.0),
    ("neon", "direct, up to 31 (6 bits)", "neon/gemm", r"product_pass<.*Bytes<8>, 3>", 1.0),
    ("neon", "direct, up to 15 (5 to 2 bits)", "neon/gemm", r"product_pass<.*Bytes<16>, 3>", 1.0),
    ("dotprod", "direct", "dotprod/row", r"product_pass<.*Dots, 6>", 1.0),
    ("i8mm", "direct", "i8mm/row", r"product_pass<.*Matrices, 8>", 1.0),
    ("all", "Winograd 4x4, taps s16", "neon/winograd", r"multiply_rows<4, false>", 4.0),
    ("all", "Winograd 4x4, taps s8", "neon/winograd", r"multiply_rows<4, true>", 4.0),
    ("all", "Winograd 2x2, taps s8", "neon/winograd", r"multiply_rows<4, true>", 2.25),
    (
        "dotprod",
        "Winograd 2x2, taps and factors s8",
        "dotprod/winograd",
        r"multiply_rows<5>",
        2.25,
    ),
    ("i8mm", "Winograd 2x2, taps and factors s8", "i8mm/winograd", r"multiply_pairs<3>", 2.25),
    ("neon", "matrix times vector, 8 bits", "neon/gemm", r"gemv_parts<.*Dot, 8, 1, 4>", 1.0),
    ("neon", "matrix times vector, 4 bits", "neon/gemm", r"gemv_parts<.*Dot, 4, 1, 4>", 1.0),
    ("dotprod", "matrix times vector, 8 bits", "dotprod/row", r"gemv_parts<.*Dot, 8, 1, 4>", 1.0),
    ("dotprod", "matrix times vector, 4 bits", "dotprod/row", r"gemv_parts<.*Dot, 4, 1, 4>", 1.0),
]
# LLVM's other ARM processors borrow the model of one of these, or have one only in later versions.
# Of each, the rows that the processor can run.
MODELS = {
    "cortex-a53": ("neon", "all"),
    "cortex-a55": ("neon", "dotprod", "all"),
    "cortex-a57": ("neon", "all"),
}


@dataclass(frozen=True)
class Loop:
    """One pass of an innermost loop."""

    lines: list[str]

    @property
    def products(self) -> int:
        return sum(_products(line) for line in self.lines)

    @property
    def multiplies(self) -> int:
        return sum(_products(line) > 0 for line in self.lines)

    @property
    def loads(self) -> int:
        """Loads of vector registers: pairs count as two, lists as what is in them."""
        return sum(map(_loaded, self.lines))

    @property
    def other_vector(self) -> int:
        """Vector instructions that neither multiply nor load: widening, shuffles, signs, copies."""
        return sum(
            _products(line) == 0 and re.match(r"(?!ld|st)\w+\s+v\d", line) is not None
            for line in self.lines
        )

    @property
    def spills(self) -> int:
        return sum(re.search(r"\bq\d+.*\[sp", line) is not None for line in self.lines)


def _loaded(line: str) -> int:
    if listed := re.match(r"ld[1-4]r?\s+{v(\d+)\.\w+(?:-v(\d+)\.)?([^}]*)}", line):
        first, last, rest = int(listed[1]), listed[2], listed[3]
        return 1 + rest.count("v") if last is None else (int(last) - first) % 32 + 1
    if re.match(r"ldp\s+[qd]\d", line):
        return 2
    return int(re.match(r"(ldr|ldur)\s+[qds]\d", line) is not None)


def _products(line: str) -> int:
    match = re.match(r"(\w+)\s+v\d+\.(\w+),", line)
    return PRODUCTS.get((match[1], match[2]), 0) if match else 0


def functions(text: str) -> dict[str, list[tuple[int, str]]]:
    """Address and text of every instruction, by function, from objdump's output."""
    found: dict[str, list[tuple[int, str]]] = {}
    current: list[tuple[int, str]] = []
    for line in text.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            current = found.setdefault(head[1], [])
        elif body := re.match(r"\s+([0-9a-f]+):\s+(.*)$", line):
            current.append((int(body[1], 16), body[2].split("//")[0].strip()))
    return found


def inner_loop(code: list[tuple[int, str]]) -> Loop:
    """The innermost loop with the most products.

    Raises:
        ValueError: there is no loop with products.
    """
    ranges = []
    for address, line in code:
        match = re.match(r"(?:b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s*([0-9a-f]+)", line)
        if match and int(match[1], 16) <= address:
            ranges.append((int(match[1], 16), address))
    loops = []
    for first, last in ranges:
        if any(first <= a and b < last for a, b in ranges if (a, b) != (first, last)):
            continue
        loops.append(Loop([line for address, line in code if first <= address <= last]))
    best = max(loops, key=lambda loop: loop.products, default=Loop([]))
    if best.products == 0:
        raise ValueError("no loop with products")
    return best


def cycles(loop: Loop, model: str) -> float | None:
    """Cycles of one pass by llvm-mca; None where it is missing, or does not know an instruction."""
    if shutil.which("llvm-mca") is None:
        return None
    text = "\n".join(
        re.sub(r"\s[0-9a-f]+ <.*>$", " .", line).replace("\t", " ") for line in loop.lines
    )
    result = subprocess.run(
        [
            "llvm-mca",
            "-mtriple=aarch64",
            f"-mcpu={model}",
            "-mattr=+dotprod,+i8mm",
            "-iterations=100",
        ],
        input=text,
        capture_output=True,
        text=True,
    )
    total = re.search(r"Total Cycles:\s+(\d+)", result.stdout)
    return int(total[1]) / 100 if result.returncode == 0 and total else None


def _heading() -> list[str]:
    return [
        "| row | loop | products | multiplies | other vector | loads | all"
        " | instructions per 100 products | "
        + " | ".join(f"{model} (llvm-mca)" for model in MODELS)
        + " |",
        "|---|---|---:|---:|---:|---:|---:|---:|" + "---:|" * len(MODELS),
    ]


def _disassembled(path: Path) -> dict[str, list[tuple[int, str]]]:
    text = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", "-C", "--no-show-raw-insn", str(path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return functions(text)


def _row(row: str, what: str, loop: Loop, worth: float, models: tuple[str, ...]) -> str:
    """A line of the table: a product of the loop stands for ``worth`` ones of the layer."""
    products = loop.products * worth
    timed = [cycles(loop, model) if model in models else None for model in MODELS]
    return (
        f"| {row} | {what}{f', {loop.spills} spills' if loop.spills else ''} | {products:g} |"
        f" {loop.multiplies} | {loop.other_vector} | {loop.loads} | {len(loop.lines)} |"
        f" {100 * len(loop.lines) / products:.1f} | "
        + " | ".join("–" if t is None else f"{products / t:.1f}" for t in timed)
        + " |"
    )


def others(paths: list[Path]) -> str:
    """The same of other people's object files: the loop with the most products of each."""
    lines = _heading()
    for path in paths:
        loops = []
        for code in _disassembled(path).values():
            try:
                loops.append(inner_loop(code))
            except ValueError:
                continue
        if not loops:
            raise SystemExit(f"{path}: no loop with products")
        best = max(loops, key=lambda loop: loop.products)
        words = {line.split()[0] for line in best.lines}
        kind = "i8mm" if words & {"smmla", "usmmla"} else "neon"
        kind = "dotprod" if words & {"sdot", "udot"} else kind
        models = tuple(m for m, rows in MODELS.items() if kind in rows)
        lines.append(_row(kind, path.name, best, 1.0, models))
    return "\n".join(lines) + "\n"


def table() -> str:
    """Markdown; one row per loop."""
    lines = _heading()
    disassembled: dict[str, dict[str, list[tuple[int, str]]]] = {}
    for row, what, name, pattern, worth in LOOPS:
        if name not in disassembled:
            path = OBJECTS / f"{name}.cpp.o"
            if not path.is_file():
                raise SystemExit(f"{path}: not there; make test-arm builds it")
            disassembled[name] = _disassembled(path)
        codes = [code for f, code in disassembled[name].items() if re.search(pattern, f)]
        if len(codes) != 1:
            raise SystemExit(f"{name}: expected one function {pattern!r}, found {len(codes)}")
        models = tuple(model for model, rows in MODELS.items() if row in rows)
        lines.append(_row(row, what, inner_loop(codes[0]), worth, models))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    parser.add_argument("--others", nargs="+", type=Path, metavar="OBJECT", help="count these")
    arguments = parser.parse_args()
    text = others(arguments.others) if arguments.others else table()
    if arguments.write and not arguments.others:
        from bench.markdown import write_part

        write_part(PAGE, MARKERS, text)
    print(text)


if __name__ == "__main__":
    main()
