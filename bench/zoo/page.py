"""docs/zoo.md from the results of ``python -m bench.zoo``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adalayer_native._files import write_text_atomic
from bench.markdown import table
from bench.zoo.judge import COSINE, MORE, QUANTIZED, misses
from bench.zoo.sanity import VARIED

COMMAND = "python -m bench.zoo"
HEAD = f"""\
# Networks from elsewhere

What becomes of networks as their packages build them, with random weights (seeded, batch norms
settled on noise) unless the package brings some. The same number of bits in every layer; ranges
from 32 noise inputs, or texts of random words; at 4 bits the layers are repaired on the same data.
`pip install 'adalayer_native[zoo]'` installs the packages, and

```sh
{COMMAND}
```

writes this page; `--only NAME` measures one network. One input at a time, one thread.

- *captured*: the captured network has the bits of the original, on the example, on batches of 1 and
  3, and on another size where the network takes one (*this size*: the capture does not).
- *quantized*: share of the float network's multiply-accumulates in layers that were quantized. Of a
  convolutional network at least {100 * QUANTIZED:g} % are wanted; (…) marks the others.
- *growth*: how much more a small relative error of the input is at the float network's output.
- *native*: the converted modules have the bits of the exact simulation. *engine*: the compiled
  engine with every layer native has the bits of the modules.
- *cosine* of the outputs to the float network's, the smallest of several outputs, over 8 inputs;
  behind the bar that of what differs between the inputs. Noise averages out, so that some networks
  answer nearly the same to any of it; a network whose outputs differ by less than
  {100 * VARIED:g} % is named below.
- *noise*: the same cosine of the float network itself, run with noise as large as the rounding of
  ideal grids of these widths on every weight and on every value that a layer reads, clipped to what
  the calibration data reach (bench/zoo/rounding.py). Random convolutions let errors grow from layer
  to layer. Where the noise leaves {COSINE:g} at 8 bits, the network's activations are taken as sane
  and {COSINE:g} is wanted of the quantized network; elsewhere at most {MORE:g} times what the noise
  costs.
- *in engine*: share of the multiply-accumulates that the engine does natively, and how many
  operators run in torch.
- *ms*: the engine as `compile` makes it, beside torch in float32, medians of calls by turns.
- *seconds* to capture, to compress (prepare, calibrate, repair, convert) and to compile.
"""


def page(records: Sequence[Mapping[str, Any]], unmeasured: Sequence[str] = ()) -> str:
    """The whole page; ``unmeasured`` are the names of networks without a result."""
    widths = sorted({int(bits) for record in records for bits in record["bits"]}, reverse=True)
    heading = ["network", "captured", "quantized", "growth"]
    for bits in widths:
        heading += [
            f"{bits} bits: native", "engine", "cosine", "noise", "in engine", "ms", "torch ms", "×",
            "seconds",
        ]  # fmt: skip
    lines = [HEAD, _machine(records), ""]
    lines += table(heading, [_row(record, widths) for record in records])
    if unmeasured:
        lines += [f"Not measured for this page: {', '.join(unmeasured)}.", ""]
    lines += ["## What is missed, and why", ""]
    missed = [(record, found) for record in records if (found := misses(record))]
    lines.append(
        f"{len(records) - len(missed)} of {len(records)} networks miss nothing. Missed is whatever "
        "differs, is refused or kept float; products that run in torch; less than "
        f"{100 * QUANTIZED:g} % quantized; a cosine at 8 bits below what is wanted; an engine "
        "slower than torch."
    )
    for record, found in missed:
        lines += ["", f"**{record['name']}**", "", *(f"- {escape(miss)}" for miss in found)]
    return "\n".join(lines).rstrip() + "\n"


def write_page(
    records: Sequence[Mapping[str, Any]], path: Path, unmeasured: Sequence[str] = ()
) -> None:
    """Replace the page."""
    write_text_atomic(path, page(records, unmeasured))


def escape(text: str) -> str:
    """Texts of errors, as plain text of one line."""
    line = " ".join(text.split())
    return line.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _machine(records: Iterable[Mapping[str, Any]]) -> str:
    keys = [record["key"] for record in records]
    processors = sorted({f"{key['cpu']}, kernels {key['isa']}" for key in keys})
    versions: dict[str, set[str]] = {}
    for key in keys:
        for name, text in key["versions"].items():
            versions.setdefault(name, set()).add(text)
    shown = ", ".join(f"{name} {'/'.join(sorted(texts))}" for name, texts in versions.items())
    return f"Measured on {'; '.join(processors)}, with {shown}."


def _row(record: Mapping[str, Any], widths: Sequence[int]) -> list[str]:
    growth = record.get("sanity", {}).get("growth")
    cells = [record["name"], _captured(record), _quantized(record)]
    cells.append("–" if growth is None else f"{growth:.1f}")
    for bits in widths:
        cells += _width(record, record["bits"].get(str(bits)))
    return cells


def _captured(record: Mapping[str, Any]) -> str:
    if "equal" not in record:
        return "**no**"
    outcomes = list(record["equal"].values())
    fixed = [o for o in outcomes if isinstance(o, dict) and "fixed" in o]
    if any(outcome is not True and outcome not in fixed for outcome in outcomes):
        return "**in part**"
    return "this size" if fixed else "yes"


def _quantized(record: Mapping[str, Any]) -> str:
    shares = [part["quantized_share"] for part in record["bits"].values()
              if "quantized_share" in part]  # fmt: skip
    if not shares:
        return "–"
    text = f"{100 * min(shares):.1f} %"
    if not record["convolutional"]:
        return f"({text})"
    return text if min(shares) >= QUANTIZED else f"**{text}**"


def _width(record: Mapping[str, Any], part: Mapping[str, Any] | None) -> list[str]:
    if part is None:
        return ["–"] * 9
    cells = [_equal(part.get("native")), _equal(part.get("engine"))]
    both = list(zip(*part.get("cosines", {}).values(), strict=True))
    cells.append(" \\| ".join(f"{min(values):.4f}" for values in both) or "–")
    cells.append(
        f"{min(c for c, _ in part['rounded'].values()):.4f}" if part.get("rounded") else "–"
    )
    cells.append(
        f"{100 * part['native_share']:.1f} %, {len(part['in_torch'])}"
        if "native_share" in part
        else "–"
    )
    times = part.get("milliseconds")
    if times:
        ours, theirs = times["engine"], times["torch"]
        ratio = f"{theirs / ours:.2f}"
        cells += [f"{ours:.3f}", f"{theirs:.3f}", ratio if theirs >= ours else f"**{ratio}**"]
    else:
        cells += ["–"] * 3
    steps = (
        record.get("capture_seconds"),
        part.get("compress_seconds"),
        part.get("compile_seconds"),
    )
    cells.append(" + ".join("–" if s is None else f"{s:.1f}" for s in steps))
    return cells


def _equal(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "**no**"
    return "=" if found["equal"] else f"**{found['levels']:.2g} levels**"
