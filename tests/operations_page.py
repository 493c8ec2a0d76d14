"""The list of operations in docs/ada-format.md, made of the engine's own table.

``PYTHONPATH=python python tests/operations_page.py`` writes it anew.
"""

from __future__ import annotations

from pathlib import Path

from adalayer_native import _C

PAGE = Path(__file__).resolve().parent.parent / "docs" / "ada-format.md"
BEGIN, END = "<!-- operations: begin -->\n", "<!-- operations: end -->\n"

_LARGEST = 1 << 20


def _inputs(least: int, most: int) -> str:
    if most < 0:
        return f"{least} …"
    return str(least) if least == most else f"{least} to {most}"


def _ints(low: int, high: int) -> str:
    return f"{low} …" if high == _LARGEST else f"{low} to {high}"


def _forms(forms: list[tuple[str, str, int]], reads: bool) -> str:
    return ", ".join(
        f"{inputs} → {output} (1.{minor})" if reads else f"{output} (1.{minor})"
        for inputs, output, minor in forms
    )


def table() -> str:
    """Markdown, a line per operation."""
    lines = [
        "| | operation | inputs | forms (since) | ints | floats | constants |",
        "|---:|---|---|---|---|---|---|",
    ]
    for number, (name, o) in enumerate(_C.operations().items()):
        ints = [f"`{p}` {_ints(low, high)}" for p, low, high, _ in o["ints"]]
        constants = [
            f"`{p}` {kind if kind == other else f'{kind} or {other}'}{' or −1' if optional else ''}"
            for p, kind, other, optional in o["constants"]
        ]
        if o["table_per_input"]:
            constants = ["`table` u8 or −1, per input"]
        cells = (
            _inputs(*o["inputs"]),
            _forms(o["forms"], o["inputs"][1] != 0),
            ", ".join(ints),
            ", ".join(f"`{p}`" for p, _ in o["floats"]),
            ", ".join(constants),
        )
        lines.append(f"| {number} | `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """The page with the list as it is now."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
